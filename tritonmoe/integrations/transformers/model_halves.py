"""two_batches(): a model runs both halves of each batch at once, and gives what the whole batch gives."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from tritonmoe.expert_parallel.plans.halves import two_batches as run_two_batches
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.halved_arguments import Arguments, batch_size, by_name, num_targets, split
from tritonmoe.integrations.transformers.halves_trial import HalvesTrial
from tritonmoe.integrations.transformers.names import CACHES
from tritonmoe.integrations.transformers.requirements import check_model, check_transformers
from tritonmoe.layer import MoELayer
from tritonmoe.overlap.report import LayerReport
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.transports import Transport, as_transport

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

__all__ = ["HalvedForward", "two_batches"]

JOINED = ("logits", "last_hidden_state", "hidden_states", "attentions", "router_logits")
"""The results, or tuples of results, whose first dimension is the batch."""


class HalvedForward:
    """A model's forward in two halves; what two_batches() puts in the place of the model's own."""

    def __init__(
        self,
        model: "PreTrainedModel",
        spread: Sequence[nn.Module],
        transports: Sequence[Transport],
        trial: HalvesTrial | None,
    ) -> None:
        self.model = model
        self.spread = spread
        """Its experts modules that are spread over ranks."""
        self.transports = transports
        """Over which ranks agree: those of the experts, and the replicas of these."""
        self.trial = trial
        """What decides; None where batches are always halved."""
        self.choice = "there was no forward yet"
        """What the last forward did, and why, in one sentence."""
        self._own = model.__dict__.get("forward")
        self.__signature__ = inspect.signature(self.forward)  # Trainer reads it

    @property
    def forward(self) -> "Callable[..., ModelOutput]":
        """The model's own forward."""
        return self._own or type(self.model).forward.__get__(self.model)

    def remove(self) -> None:
        """Return the model its own forward back."""
        if self._own is None:
            del self.model.__dict__["forward"]
        else:
            self.model.forward = self._own

    def __call__(self, *positional: object, **named: object) -> object:
        given = self.__signature__.bind(*positional, **named)
        arguments = by_name(given, self.__signature__)
        why_whole = self._why_whole(arguments)
        if why_whole and self.trial is not None:
            self.trial.interrupt()
        is_halved, reason = (False, why_whole) if why_whole else self._agree(arguments)
        before = self._reports()
        if is_halved:
            output = self._run_halves(arguments, reason)
        else:
            self.choice = f"one batch: {reason}"
            output = self.forward(*positional, **named)
        for report, earlier in zip(self._reports(), before, strict=True):
            if report is not None and report is not earlier:
                report.choice += f" ({self.choice})"
        return output

    def _reports(self) -> list[LayerReport | None]:
        return [shards.calls.last_report for shards in map(shards_of, self.spread) if shards is not None]

    def _agree(self, arguments: Arguments) -> tuple[bool, str]:
        """Say whether all ranks halve this batch, and why.

        Raises:
            ValueError: some rank's batch can't be split.
        """
        is_training = self.model.training and torch.is_grad_enabled()
        trial = self.trial if is_training and not torch.are_deterministic_algorithms_enabled() else None
        if trial is None and self.trial is not None:
            self.trial.interrupt()
        elapsed_ns = 0 if trial is None else trial.elapsed_ns()
        size, refusal = 2, None
        try:
            size = batch_size(arguments)
            split(arguments, size, size // 2)
        except ValueError as error:
            refusal = error
        told = torch.tensor([-size, elapsed_ns, refusal is not None], device="cpu")
        for transport in self.transports:
            transport.all_reduce(told, "max")
        smallest, slowest_ns, is_refused = -int(told[0]), int(told[1]), bool(told[2])
        if trial is not None:
            trial.end(slowest_ns)
        if smallest < 2:
            return False, f"the batch of some rank has {smallest} sequences, and one sequence is not split"
        is_halved, reason = (True, "") if trial is None else trial.begin()
        if is_halved and is_refused:
            if trial is not None:
                trial.interrupt()  # this step's time will be none
            raise refusal or ValueError("two_batches can't split the batch of another rank, whose own error says why")
        return is_halved, reason

    def _why_whole(self, arguments: Arguments) -> str:
        """Say why no rank splits this batch, "" where they may; it follows from how the model is called."""
        if any(arguments.get(name) is not None for name in CACHES):
            return "the keys and values of earlier tokens are in one cache"
        use_cache = arguments.get("use_cache")
        if use_cache is None and not self.model.training:
            use_cache = getattr(self.model.config, "use_cache", False)
        if use_cache:
            return "use_cache=True asks for one cache of the keys and values of all sequences"
        return ""

    def _run_halves(self, arguments: Arguments, reason: str) -> "ModelOutput | tuple":
        size = batch_size(arguments)
        first = (size + 1) // 2
        self.choice = f"two halves, of {first} and {size - first} sequences" + (reason and f": {reason}")
        returns_dict = arguments.pop("return_dict", None)
        if returns_dict is None:
            returns_dict = self.model.config.return_dict
        labels = arguments.get("labels")
        shared = {**arguments, "return_dict": True}
        kinds = {parameter.kind for parameter in self.__signature__.parameters.values()}
        if "use_cache" in self.__signature__.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
            shared["use_cache"] = False
        halves = [shared | part for part in split(arguments, size, first)]
        with nullcontext() if labels is None else self._loss_over_whole_batch(arguments):
            outputs = run_two_batches(lambda half: self.forward(**half), *halves)
        joined = self._join(outputs, arguments)
        return joined if returns_dict else joined.to_tuple()

    @contextmanager
    def _loss_over_whole_batch(self, arguments: Arguments) -> Iterator[None]:
        """Let the model's loss of a half be its share of the mean over all target tokens of the batch."""
        from transformers import PreTrainedModel
        from transformers.loss.loss_utils import ForCausalLMLoss

        # the one whose loss it is, inside of PEFT's model
        model = next(inner for inner in self.model.modules() if isinstance(inner, PreTrainedModel))
        if model.loss_function is not ForCausalLMLoss:
            raise ValueError(
                f"{type(model).__name__} computes its loss itself, and two_batches can't compute that loss from "
                "halves: leave out `labels`, and compute the loss of the logits"
            )
        loss = _ShareOfLoss(model.loss_function, num_targets(arguments))
        before = model.__dict__.get("_loss_function")
        model.loss_function = loss
        try:
            yield
        finally:
            if before is None:
                del model.__dict__["_loss_function"]
            else:
                model.loss_function = before
        if loss.num_calls != 2:
            raise ValueError(
                f"{type(model).__name__} doesn't compute its loss by one call of its loss_function, so two_batches "
                "can't weight the losses of the halves: leave out `labels`, and compute the loss of the logits"
            )

    def _join(self, outputs: tuple["ModelOutput", ...], arguments: Arguments) -> "ModelOutput":
        """Return one output of the halves' outputs."""
        first, second = outputs
        joined: Arguments = {}
        for name in first:
            parts = first[name], second[name]
            if name in ("loss", "aux_loss") or parts[0] is None:
                continue
            if name not in JOINED:
                raise ValueError(
                    f"{type(self.model).__name__} gives {name}, and two_batches doesn't know how to join the values "
                    "of two halves: switch that output off"
                )
            if isinstance(parts[0], Tensor):
                joined[name] = torch.cat(parts)
            else:
                joined[name] = tuple(torch.cat(pair) for pair in zip(*parts, strict=True))
        if first.get("loss") is not None:
            joined["loss"] = first["loss"] + second["loss"]
        if first.get("aux_loss") is not None:
            self._join_aux_loss(joined, first["aux_loss"] + second["aux_loss"], arguments)
        return type(first)(**joined)

    def _join_aux_loss(self, joined: Arguments, of_halves: Tensor, arguments: Arguments) -> None:
        """Put in the auxiliary loss of the whole batch, which is no mean of the halves', and into the loss too."""
        model = self.model
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        names = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        if function is None or not all(hasattr(model, name) for name in names) or "router_logits" not in joined:
            raise ValueError(
                f"two_batches can't compute the auxiliary loss of {type(model).__name__} from its router logits: "
                "call it with output_router_logits=False"
            )
        whole = function(
            joined["router_logits"], model.num_experts, model.num_experts_per_tok, arguments.get("attention_mask")
        )
        joined["aux_loss"] = whole
        if "loss" in joined:  # each half has added its own; their gradients cancel exactly
            joined["loss"] = joined["loss"] + model.router_aux_loss_coef * (whole - of_halves).to(joined["loss"].device)


class _ShareOfLoss:
    """A loss function of transformers that divides by the number of targets of the whole batch."""

    def __init__(self, function: Callable[..., Tensor], num_targets: Tensor | int) -> None:
        self._function, self._num_targets = function, num_targets
        self.num_calls = 0

    def __call__(self, *positional: object, **named: object) -> Tensor:
        self.num_calls += 1
        return self._function(*positional, **{**named, "num_items_in_batch": self._num_targets})


def two_batches(model: nn.Module, when: Literal["always", "auto"] = "always") -> HalvedForward:
    """Let every forward of a model run both halves of its batch at once, each while rows of the other are under way.

    The model's experts are spread over ranks before, by `parallelize` or at loading (`ep_implementation`); wrappers
    (DistributedDataParallel, FSDP2, Trainer) come after. Outputs, the loss and all gradients are those of the whole
    batch: the loss is the mean over its target tokens, the auxiliary loss is taken of all router logits. Ranks may have
    other numbers of sequences. Where some rank has one sequence only, and where a cache is asked for, as in generation,
    every rank runs its batch whole: `choice` of what this gives says which it was. Its remove() gives the model its own
    forward back. Dropout draws other numbers than in one batch. See tritonmoe.two_batches for what can't be done.

    Args:
        when: "auto" tries both ways for some training steps, once num_chunks="auto" has settled, and keeps halves if
            steps are faster by at least 2 %; ranks decide alike. No time decides, and batches are halved, under
            torch.use_deterministic_algorithms and outside of training.
    Raises:
        ValueError: the model's experts are not spread over ranks, or the model was upcycled in place, whose auxiliary
            loss is of the whole batch; in a forward: an argument, loss or result that can't be of two halves.
        TypeError: model is no module. ImportError: transformers or greenlet is missing.
    """
    if when not in ("always", "auto"):
        raise ValueError(f'when must be "always" or "auto", got {when!r}')
    check_transformers()
    check_model(model)
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} was upcycled in place, and its auxiliary loss is computed from the whole batch: "
            "call tritonmoe.two_batches with a function that computes the loss of a half"
        )
    over = {experts: shards for experts in experts_modules(model).values() if (shards := shards_of(experts))}
    if not over:
        raise ValueError(
            f"the experts of {type(model).__name__} are not spread over ranks, and two halves would hide nothing: call "
            "parallelize(model, group) first"
        )
    if isinstance(model.__dict__.get("forward"), HalvedForward):
        raise ValueError(f"this {type(model).__name__} runs its batches in halves already: call two_batches() once")
    transports = dict.fromkeys(shards.transport for shards in over.values())
    replicas = [shards.sharding.replicas for shards in over.values() if shards.sharding.replicas is not None]
    transports |= dict.fromkeys(as_transport(mesh) for mesh in replicas)
    trial = HalvesTrial(len(over)) if when == "auto" else None
    halved = HalvedForward(cast("PreTrainedModel", model), list(over), tuple(transports), trial)
    model.forward = halved
    return halved
