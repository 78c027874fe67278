"""generate() of models whose experts are spread over ranks: each rank ends with its own text, and helps the others.

Every forward needs all ranks, and texts end at different lengths. So a rank says before each forward which model it
calls, and one whose own generate has ended runs forwards of one token until all have; transformers' synced_gpus would
go on with the text itself, beyond its cache and its last position.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from tritonmoe.errors import PeerFailure, TransportError
from tritonmoe.integrations.transformers.requirements import wrap_method
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.runtime.other_ranks import dummy_forwards
from tritonmoe.transports import Transport, as_transport
from tritonmoe.transports.base import run_outside_graphs

if TYPE_CHECKING:
    from collections import OrderedDict

    from transformers import PreTrainedModel

__all__ = ["announce_forwards", "patch_generate"]

log = logging.getLogger("tritonmoe")

MARK = "_tritonmoe_keeps_step"
Original: TypeAlias = Callable[..., Any]
"""A method of transformers, or what stands in its place."""
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
        """Send what this rank does next, and return the largest number that any rank sends."""
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


def patch_generate(model: nn.Module | None = None) -> None:
    """Make generate() of models whose experts are spread keep step with the other ranks, from now on.

    Refused are continuous batching, whose threads run on each rank by themselves, and assistants that are
    the first layers of a spread model.

    Args:
        model: of which the classes with a generate() of their own are meant too.
    """
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.generation import candidate_generator
    from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

    own = (kind for module in model.modules() for kind in type(module).__mro__) if model is not None else ()
    for kind in dict.fromkeys([GenerationMixin, *own]):
        if issubclass(kind, nn.Module | GenerationMixin):
            _replace(kind, "generate", _generate_in_step)
    _replace(PreTrainedModel, "get_compiled_call", _get_announced_call)
    _replace(ContinuousMixin, "init_continuous_batching", _init_continuous_batching)
    _replace(candidate_generator.EarlyExitCandidateGenerator, "__init__", _init_early_exit)


def announce_forwards(model: nn.Module) -> None:
    """Announce the forwards that generate() calls before anything else of them begins."""
    for callee in _callees(model):
        hooks = cast("OrderedDict[int, object]", callee._forward_pre_hooks)
        number = next((number for number, hook in hooks.items() if hook is _before_forward), None)
        if number is None:
            handle = callee.register_forward_pre_hook(_before_forward, prepend=True, with_kwargs=True)
            number = handle.id
        hooks.move_to_end(number, last=False)  # FSDP2 puts its own, which gather weights, before all others


def _callees(model: nn.Module) -> "list[PreTrainedModel]":
    """Return the modules of `model` whose forwards generate() calls: models that generate, and their encoders."""
    found: list[PreTrainedModel] = []
    for module in model.modules():
        if hasattr(type(module), "generate") and hasattr(type(module), "set_experts_implementation"):
            generating = cast("PreTrainedModel", module)
            found.append(generating)
            if generating.config.is_encoder_decoder and (encoder := generating.get_encoder()) is not module:
                found.append(encoder)
    return list(dict.fromkeys(found))


def _before_forward(callee: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
    if not under_way.is_open:
        return
    if under_way.is_announced:
        under_way.is_announced = False
        return
    run_outside_graphs(announce, callee, arguments, keywords)


def _replace(kind: type, name: str, function: Original) -> None:
    original = vars(kind).get(name)
    if original is not None and not hasattr(original, MARK):
        wrap_method(kind, name, function)
        setattr(vars(kind)[name], MARK, True)


def _generate_in_step(original: Original, model: object, *arguments: object, **settings: object) -> object:
    """Generate, and announce each forward to the ranks that run the same ones."""
    transports = _ranks_together(model)
    if not transports:
        return original(model, *arguments, **settings)
    signature = inspect.signature(original)
    given = signature.bind(model, *arguments, **settings)
    if "synced_gpus" in signature.parameters:
        given.arguments["synced_gpus"] = False
    if under_way.is_open:  # this is an inner model's, or an assistant's
        return original(*given.args, **given.kwargs)
    models = [model, given.arguments.get("assistant_model", settings.get("assistant_model"))]
    with _keep_step(models, transports):
        return original(*given.args, **given.kwargs)


@contextmanager
def _keep_step(models: list[object], transports: list[Transport]) -> Iterator[None]:
    """Announce this rank's forwards of these models, and wait for the other ranks at the end, whatever it is."""
    callees: list[PreTrainedModel] = []
    for model in models:
        if isinstance(model, nn.Module) and _ranks_together(model):
            announce_forwards(model)
            callees += _callees(model)
    step = JointGenerate(callees, transports)
    under_way.is_open, under_way.is_announced, under_way.generate = True, False, step
    try:
        yield
        step.help_others()
    except Exception as error:  # whatever ends this rank's, the others wait for its word
        if not isinstance(error, TransportError):  # which the others have too
            log.error("generate() failed on this rank, which tells the others: %s: %s", type(error).__name__, error)
            with suppress(TransportError):
                step.ask(FAILED)
        raise
    finally:
        under_way.is_open, under_way.is_announced, under_way.generate = False, False, None


def _get_announced_call(original: Original, model: nn.Module, compile_config: object) -> Original:
    """Return a compiled forward that is announced before it begins: a graph holds no exchange by which ranks agree."""
    compiled = original(model, compile_config)
    if not under_way.is_open:
        return compiled

    @functools.wraps(compiled)
    def announced(*arguments: object, **keywords: object) -> object:
        announce(model, arguments, keywords)
        under_way.is_announced = True
        try:
            return compiled(*arguments, **keywords)
        finally:
            under_way.is_announced = False

    return announced


def _init_continuous_batching(original: Original, model: object, *arguments: object, **settings: object) -> object:
    """Refuse continuous batching of spread experts."""
    if _ranks_together(model):
        raise ValueError(
            f"the experts of this {type(model).__name__} are spread over ranks, and continuous batching "
            '(generate_batch, cache_implementation="paged") makes up batches in a thread of each rank, so that '
            "ranks run different numbers of forwards: call generate(), each rank with its own prompts, padded"
        )
    return original(model, *arguments, **settings)


def _init_early_exit(original: Original, generator: object, *arguments: object, **settings: object) -> None:
    """Refuse an assistant that is the first layers of a model with spread experts."""
    model = inspect.signature(original).bind(generator, *arguments, **settings).arguments.get("assistant_model")
    if _ranks_together(model):
        raise ValueError(
            f"the experts of this {type(model).__name__} are spread over ranks, and assistant_early_exit runs some "
            "of its layers, as often as this rank's drafts are accepted, while other ranks run all: give another "
            "assistant_model, or prompt_lookup_num_tokens"
        )
    original(generator, *arguments, **settings)


def _ranks_together(model: object) -> list[Transport]:
    """Return over what the ranks that must run the same forwards of `model` reach each other; none for one rank alone.

    They are those of its experts, those with copies of these, and those over which FSDP2 spreads what else there is.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(model, nn.Module):  # anything may have transformers' mixin
        return []
    shardings = [shards.sharding for module in model.modules() if (shards := shards_of(module)) is not None]
    found = dict.fromkeys(sharding.transport for sharding in shardings if sharding.transport.size > 1)
    if not found:
        return []
    replicas = dict.fromkeys(sharding.replicas for sharding in shardings if sharding.replicas is not None)
    found |= dict.fromkeys(map(as_transport, replicas))
    meshes = dict.fromkeys(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    for group in dict.fromkeys(group for mesh in meshes for group in mesh.get_all_groups()):
        transport = as_transport(group)
        if not any(_members(transport) <= _members(other) for other in found):
            found[transport] = None
    return list(found)


def _members(transport: Transport) -> set[int]:
    return set(range(torch.distributed.get_world_size()) if transport.job_ranks is None else transport.job_ranks)
