"""What ranks say to each other during generate(): which model each calls next, and the help of those that are done."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from tritonmoe.errors import PeerFailure, TransportError
from tritonmoe.runtime.other_ranks import dummy_forwards
from tritonmoe.transports import Transport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAILED", "JointGenerate", "announce", "under_way"]

ENDED, FAILED = 0, 2**40
"""What a rank says instead of the number of the model that it calls, counted from 1."""
Arguments: TypeAlias = tuple[tuple[object, ...], dict[str, object]]
"""Those of a forward: positional, and by name."""


class _UnderWay:
    """What this process generates now. Compiled forwards read the two flags, and nothing else of it."""

    is_open = False
    is_announced = False
    """Whether the next forward has been announced already, by who calls it."""
    generate: "JointGenerate | None" = None


under_way = _UnderWay()


class JointGenerate:
    """One generate of this rank: the models that it may call, and the ranks that call the same ones."""

    def __init__(self, callees: "list[PreTrainedModel]", transports: list[Transport]) -> None:
        self.callees = callees
        """Alike on every rank."""
        self.transports = transports
        self.last: dict[nn.Module, Arguments] = {}
        """The arguments of the last forward of each."""

    def announce(self, callee: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
        """Return when all ranks that still generate call this model; until then help with what they call."""
        number = next((n for n, other in enumerate(self.callees, 1) if other is callee), None)
        if number is None:
            return
        self.last[callee] = arguments, keywords
        while (asked := self.ask(number)) != number:
            self.help(asked)

    def help_others(self) -> None:
        """Return when the generate of every rank has ended."""
        devices = {p.device for p in self.callees[0].parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices):  # dropout of training mode draws
            while asked := self.ask(ENDED):
                self.help(asked)

    def ask(self, number: int) -> int:
        """Say what this rank does next, and give the largest number that any rank says."""
        own = number
        for transport in self.transports:
            try:
                number = max(transport.share_number(number))
            except TransportError as error:
                raise type(error)(
                    "generate() of a model whose experts are spread over ranks needs every rank until the last text "
                    f"ends, so each must call it, and as often: {error}"
                ) from error
        if number == FAILED != own:
            raise PeerFailure(
                "generate() failed on another rank, and this rank can't go on without that one: see the error of the "
                "other rank"
            )
        return number

    def help(self, number: int) -> None:
        if number > len(self.callees):
            raise ValueError(
                "another rank generates with an assistant_model whose experts are spread, and this rank without one: "
                "give all ranks the same assistant_model"
            )
        callee = self.callees[number - 1]
        arguments, keywords = self._least(callee)
        with dummy_forwards(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            under_way.is_announced = True
            callee(*arguments, **keywords)

    def _least(self, callee: "PreTrainedModel") -> Arguments:
        """Return arguments for a forward of little work that leaves no trace: one token at the first position."""
        positional, named = self.last.get(callee, ((), {}))
        ids = torch.zeros(1, 1, dtype=torch.int64, device=callee.device)
        if not hasattr(callee, "generate"):  # an encoder
            if callee.main_input_name == "input_ids":
                return (), {"input_ids": ids}
            if not positional and not named:
                raise ValueError(
                    "another rank runs the encoder, and this rank has only encoder_outputs, so no input for the "
                    "encoder: give encoder_outputs on every rank, or on none"
                )
            return positional, named  # again, of which an encoder keeps nothing
        accepted = inspect.signature(callee.forward).parameters
        # two_batches, which splits no batch with a cache, takes it from here whether this one may be split
        keywords = {"use_cache": named.get("use_cache", True)} if "use_cache" in accepted else {}
        if not callee.config.is_encoder_decoder:
            return (), {"input_ids": ids, **keywords}
        outputs = cast("Sequence[Tensor] | None", named.get("encoder_outputs"))
        if outputs is None:
            raise ValueError(
                f"another rank runs the decoder of {type(callee).__name__}, and this rank has no encoder_outputs for "
                "it, since its own generate() ran no forward: let every rank generate at least one token"
            )
        keywords |= {name: named[name] for name in ("encoder_outputs", "attention_mask") if name in named}
        return (), {"decoder_input_ids": ids.expand(len(outputs[0]), 1), **keywords}


def announce(callee: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
    """Return when this rank may run this forward of what it generates."""
    if under_way.generate is not None:
        under_way.generate.announce(callee, arguments, keywords)
