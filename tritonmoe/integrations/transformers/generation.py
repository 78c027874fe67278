"""generate() of models whose experts are spread over ranks: each rank ends with its own text, and helps the others.

Every forward needs all ranks, and texts end at different lengths. So a rank says before each forward which model it
calls, and one whose own generate has ended runs forwards of one token until all have; transformers' synced_gpus would
go on with the text itself, beyond its cache and its last position.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from tritonmoe.errors import TransportError
from tritonmoe.integrations.transformers.joint_generate import FAILED, JointGenerate, announce, under_way
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.transports import Transport, as_transport
from tritonmoe.transports.base import run_outside_graphs

if TYPE_CHECKING:
    from collections import OrderedDict

    from transformers import PreTrainedModel

__all__ = ["announce_forwards", "let_spread_models_generate"]

log = logging.getLogger("tritonmoe")

MARK = "_tritonmoe_keeps_step"
Original: TypeAlias = Callable[..., Any]
"""A method of transformers, or what stands in its place."""


def let_spread_models_generate(model: nn.Module | None = None) -> None:
    """Let generate() of models whose experts are spread keep step with the other ranks, from now on.

    What can't is refused: continuous batching, whose threads run on each rank by themselves, and assistants that are
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
            _replace(kind, "generate", _keeping_step)
    _replace(PreTrainedModel, "get_compiled_call", _announcing)
    _replace(ContinuousMixin, "init_continuous_batching", _refusing_continuous_batching)
    _replace(candidate_generator.EarlyExitCandidateGenerator, "__init__", _refusing_early_exit)


def announce_forwards(model: nn.Module) -> None:
    """Let the forwards that generate() calls be announced before anything else of them begins."""
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


def _replace(kind: type, name: str, wrap: Callable[[Original], Original]) -> None:
    original = vars(kind).get(name)
    if original is not None and not hasattr(original, MARK):
        replaced = functools.wraps(original)(wrap(original))
        setattr(replaced, MARK, True)
        setattr(kind, name, replaced)


def _keeping_step(original: Original) -> Original:
    signature = inspect.signature(original)

    def generate(self: object, *arguments: object, **settings: object) -> object:
        transports = _ranks_together(self)
        if not transports:
            return original(self, *arguments, **settings)
        given = signature.bind(self, *arguments, **settings)
        if "synced_gpus" in signature.parameters:
            given.arguments["synced_gpus"] = False
        if under_way.is_open:  # this is an inner model's, or an assistant's
            return original(*given.args, **given.kwargs)
        models = [self, given.arguments.get("assistant_model", settings.get("assistant_model"))]
        with _keep_step(models, transports):
            return original(*given.args, **given.kwargs)

    return generate


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


def _announcing(original: Original) -> Original:
    """Announce compiled forwards before they begin: a graph holds no exchange by which ranks agree."""

    def get_compiled_call(self: nn.Module, compile_config: object) -> Original:
        compiled = original(self, compile_config)
        if not under_way.is_open:
            return compiled

        @functools.wraps(compiled)
        def announced(*arguments: object, **keywords: object) -> object:
            announce(self, arguments, keywords)
            under_way.is_announced = True
            try:
                return compiled(*arguments, **keywords)
            finally:
                under_way.is_announced = False

        return announced

    return get_compiled_call


def _refusing_continuous_batching(original: Original) -> Original:
    def init_continuous_batching(self: object, *arguments: object, **settings: object) -> object:
        if _ranks_together(self):
            raise ValueError(
                f"the experts of this {type(self).__name__} are spread over ranks, and continuous batching "
                '(generate_batch, cache_implementation="paged") makes up batches in a thread of each rank, so that '
                "ranks run different numbers of forwards: call generate(), each rank with its own prompts, padded"
            )
        return original(self, *arguments, **settings)

    return init_continuous_batching


def _refusing_early_exit(original: Original) -> Original:
    signature = inspect.signature(original)

    def init(self: object, *arguments: object, **settings: object) -> None:
        model = signature.bind(self, *arguments, **settings).arguments.get("assistant_model")
        if _ranks_together(model):
            raise ValueError(
                f"the experts of this {type(model).__name__} are spread over ranks, and assistant_early_exit runs some "
                "of its layers, as often as this rank's drafts are accepted, while other ranks run all: give another "
                "assistant_model, or prompt_lookup_num_tokens"
            )
        original(self, *arguments, **settings)

    return init


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
