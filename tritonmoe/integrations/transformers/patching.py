"""patch(): switch an existing model to tritonmoe's experts, or say why nothing can be switched."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tritonmoe.integrations.transformers.accumulated_loss import watch_auxiliary_losses
from tritonmoe.integrations.transformers.discovery import UNSUPPORTED_NAMES, experts_modules
from tritonmoe.integrations.transformers.names import EXPERTS_IMPLEMENTATION
from tritonmoe.integrations.transformers.packed.packed_experts import is_packed_experts
from tritonmoe.integrations.transformers.registration import register
from tritonmoe.integrations.transformers.requirements import (
    check_forward,
    check_model,
    quantisation_method,
    quantised_kind,
)
from tritonmoe.layer import MoELayer

__all__ = ["PatchReport", "check_patchable", "patch"]

logger = logging.getLogger(__name__)

FEED_FORWARD = re.compile(r"(MLP|Mlp|FeedForward|FFN|LayerFF|Intermediate)$")
MAX_NAMED = 3
REGISTRATION = "_tritonmoe_registration"


@dataclass(frozen=True)
class PatchReport:
    """What patch() did, as names of modules."""

    switched: tuple[str, ...]
    """Experts that now run through tritonmoe."""
    left: tuple[str, ...]
    """Modules that hold experts, to judge by their class names, but ask no registry: they run as before."""

    @property
    def num_switched(self) -> int:
        return len(self.switched)


class _Registration:
    """What a patched experts module carries: unpickled in another process, it registers the implementation there."""

    def __reduce__(self) -> tuple[object, ...]:
        return _registered, ()

    def __deepcopy__(self, _: object) -> "_Registration":
        return self


def _registered() -> _Registration:
    register()
    return _Registration()


def patch(model: nn.Module) -> PatchReport:
    """Make every experts module of `model` run through tritonmoe, in place; parameters and their names stay.

    A pickled patched model registers the implementation by itself where it is loaded.

    `model` is a model of transformers, or any module that contains one (a PEFT model, a wrapper). Patching again
    changes nothing; `model.set_experts_implementation("eager")` goes back.

    Raises:
        ValueError: nothing can be switched (a dense model, or a family whose experts ask no registry: llama4, dbrx,
            jetmoe, switch_transformers, ...), experts are quantised, or a library of kernels has replaced the forward
            of experts or of their block. The modules are named, and nothing is changed.
        TypeError: `model` is none. ImportError: transformers is missing or older than 5.7.
    """
    register()
    check_model(model)
    from transformers import PreTrainedModel

    found = experts_modules(model)
    left = _other_experts(model, found)
    check_patchable(model, found, left)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    for experts in found.values():  # of classes that set_experts_implementation does not know, as custom code has
        experts.config._experts_implementation_internal = EXPERTS_IMPLEMENTATION
        experts.__dict__[REGISTRATION] = _Registration()
    watch_auxiliary_losses(model)
    if left:
        logger.warning("patch switched %d experts modules and left %s as they are", len(found), _list(left))
    return PatchReport(tuple(found), tuple(left))


def _other_experts(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the outermost modules that are called experts, neither holding nor held by any that were found."""
    others: dict[str, nn.Module] = {}
    known = {id(experts) for experts in found.values()}  # blocks may share one, which has one name alone
    inside = {id(child) for experts in found.values() for child in experts.modules()}
    for name, module in model.named_modules():  # a module comes before those inside it
        if UNSUPPORTED_NAMES.search(type(module).__name__) and id(module) not in inside:
            own = {id(child) for child in module.modules()}
            if known.isdisjoint(own):
                others[name] = module
                inside |= own
    return others


def check_patchable(model: nn.Module, found: Mapping[str, nn.Module], left: dict[str, nn.Module] | None = None) -> None:
    """Raise patch()'s ValueError where nothing of the model, of which these are the experts modules, can be switched.

    Args:
        left: what else is called experts; found here where it is None.
    """
    left = _other_experts(model, found) if left is None else left
    quantised = {
        name: module
        for name, module in {**found, **left}.items()
        if _quantised_kinds(module) and not (name in found and is_packed_experts(module))
    }
    kinds = sorted(set().union(*map(_quantised_kinds, quantised.values())))
    if not quantised and not found and (method := quantisation_method(model)) is not None:
        quantised, kinds = left, [method]  # MXFP4 on a GPU is in no parameter
    if quantised:
        raise ValueError(
            f"the weights of {_list(quantised)} are quantised ({', '.join(kinds)}) in a format that patch() can't "
            "read: call register(packed=True) before from_pretrained(), which keeps experts in MXFP4 and FP8 as they "
            "are, load the model without quantization_config, or, where its checkpoint is quantised, with "
            "Mxfp4Config(dequantize=True) or FineGrainedFP8Config(dequantize=True), by its method"
        )
    if found:
        _check_forwards(model, found)
        return
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ValueError(
            f"nothing to switch in {type(model).__name__}: it was upcycled in place, and its experts are tritonmoe's "
            "already"
        )
    if left:
        raise ValueError(
            f"nothing to switch in {type(model).__name__}: {_list(left)} do not ask transformers' experts registry; "
            "`tritonmoe models` lists the families that do"
        )
    dense = {name: module for name, module in model.named_modules() if FEED_FORWARD.search(type(module).__name__)}
    blocks = f", only dense feed-forward blocks: {_list(dense)}" if dense else ""
    raise ValueError(
        f"nothing to switch in {type(model).__name__}: it has no experts{blocks}; `tritonmoe models` lists the "
        "families that have some"
    )


def _check_forwards(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    for name in found:
        parts = name.split(".")
        end = parts.index("base_layer") if "base_layer" in parts else len(parts)  # PEFT's wrappers stand between
        for length in range(end - 1, len(parts) + 1):  # from the block to the experts
            check_forward(name, model.get_submodule(".".join(parts[:length])))


def _quantised_kinds(module: nn.Module) -> set[str]:
    kinds = {quantised_kind(weight) for weight in module.parameters() if weight.dim() >= 2}
    return {kind for kind in kinds if kind is not None}


def _list(modules: dict[str, nn.Module]) -> str:
    named = [f"{name or 'the model itself'} ({type(module).__name__})" for name, module in modules.items()]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more
