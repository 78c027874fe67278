"""register() and patch(): transformers' models run experts through tritonmoe, by its name or switched in place."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from tritonmoe.config.overlap import OverlapConfig, check_overlap
from tritonmoe.config.precision import ExpertPrecision, check_precision
from tritonmoe.integrations.torch_distributed.parallelize import routed_experts
from tritonmoe.integrations.transformers.accumulated_loss import watch_auxiliary_losses
from tritonmoe.integrations.transformers.discovery import UNSUPPORTED_NAMES, experts_modules
from tritonmoe.integrations.transformers.experts import PRECISION, experts_forward
from tritonmoe.integrations.transformers.packed.packed_experts import is_packed_experts
from tritonmoe.integrations.transformers.peft_adapters import hand_over_factors
from tritonmoe.integrations.transformers.requirements import (
    EXPERTS_IMPLEMENTATION,
    check_forward,
    check_model,
    check_transformers,
    quantisation_method,
    quantised_kind,
)
from tritonmoe.layer import GroupedExperts, MoELayer
from tritonmoe.placement.offloaded import offloaded_of

__all__ = ["PatchReport", "check_patchable", "patch", "register", "set_expert_precision"]

logger = logging.getLogger(__name__)

EP_REGISTRY_SINCE = (5, 23)
"""The release of transformers whose models take an expert-parallel implementation by its name."""
FEED_FORWARD = re.compile(r"(MLP|Mlp|FeedForward|FFN|LayerFF|Intermediate)$")
MAX_NAMED = 3
REGISTRATION = "_tritonmoe_registration"


def register(overlap: OverlapConfig | None = None, *, packed: bool = False) -> None:
    """Add the experts implementation "tritonmoe" to transformers' MoE models; calling it again changes nothing.

    Where PEFT is installed, its adapters of experts (LoraConfig(target_parameters=...)) are not multiplied out any
    more in models that run through it, whether made before or after this call.

    From transformers 5.23 on it also gives `DistributedConfig` the expert-parallel implementation "tritonmoe", whose
    exchanges overlap with the experts; earlier releases have parallelize().

    Args:
        overlap: the chunks of ep_implementation="tritonmoe" from now on; the same on every rank. None leaves them.
        packed: whether from_pretrained() keeps experts of MXFP4 and FP8 checkpoints packed from now on, frozen, and
            makes them run through tritonmoe; all other weights of such checkpoints become bf16. It needs transformers
            5.24.
    Raises:
        ImportError: transformers is missing or older than 5.7. TypeError: overlap is something else.
    Example:
        register()
        model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="tritonmoe")
        register(packed=True)                          # gpt-oss, Qwen3-FP8: from_pretrained(name) stays small
        model.set_experts_implementation("eager")      # and back: model.set_experts_implementation("tritonmoe")
        expert_parallel = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="tritonmoe")
        model = AutoModelForCausalLM.from_pretrained(name, distributed_config=expert_parallel)
    """
    version = check_transformers()
    if overlap is not None:
        check_overlap(overlap)
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)
    _register_fp8_experts()
    if packed:
        _load_packed()
    hand_over_factors()
    if version >= EP_REGISTRY_SINCE and torch.distributed.is_available():
        from transformers.distributed.expert_parallel import EPImplementationInterface

        from tritonmoe.integrations.transformers.ep_implementation import OverlappedEP

        if overlap is not None:
            OverlappedEP.overlap = overlap
        EPImplementationInterface.register(EXPERTS_IMPLEMENTATION, OverlappedEP)
    elif overlap is not None:
        raise ImportError(
            f"register(overlap=...) is for an expert-parallel implementation, which transformers "
            f"{'.'.join(map(str, version))} doesn't know (5.23 and later do): use parallelize(model, group, overlap)"
        )


def _register_fp8_experts() -> None:
    """Add the experts implementation "tritonmoe" to transformers' own modules of FP8 experts."""
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:  # a release before that registry
        return
    ALL_FP8_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def _load_packed() -> None:
    """Make from_pretrained() keep experts of MXFP4 and FP8 checkpoints packed; calling it again changes nothing.

    Raises:
        ImportError: this transformers loads such checkpoints otherwise than is known here.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    try:
        from tritonmoe.integrations.transformers.packed.packed_quantizers import PACKED_QUANTIZERS
    except ImportError as error:
        raise ImportError(
            f"register(packed=True) needs transformers 5.24, whose loading of quantised checkpoints it continues: "
            f"{error}. Older ones load such checkpoints with Mxfp4Config(dequantize=True)"
        ) from error
    AUTO_QUANTIZER_MAPPING.update(PACKED_QUANTIZERS)


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


def set_expert_precision(model: nn.Module, precision: ExpertPrecision | None) -> tuple[str, ...]:
    """Make the routed experts of a model multiply in an ExpertPrecision from now on, or in their own dtype with None.

    `model` is a MoE model of transformers, which then runs through tritonmoe, or has MoELayers or GroupedExperts, as
    upcycle() makes them. Parameters, state dicts and checkpoints stay; a saved model doesn't know its precision, so set
    it again after loading.

    Returns:
        The names of the modules of experts.
    Raises:
        TypeError: `precision` is none. ValueError: the model has no such experts, or they are packed, or patch() would
            refuse the model. Nothing is changed.
    Example:
        set_expert_precision(model, tritonmoe.ExpertPrecision("fp8_block"))
    """
    check_precision(precision)
    of_transformers, own = experts_modules(model), routed_experts(model)
    if not (of_transformers or own):
        patch(model)  # it says what is missing
    packed = {name: experts for name, experts in of_transformers.items() if is_packed_experts(experts)}
    if packed and precision is not None:
        raise ValueError(f"{precision} is for experts that train, and those of {_list(packed)} are packed and frozen")
    offloaded = {name: one for name, one in {**of_transformers, **own}.items() if offloaded_of(one) is not None}
    if offloaded and precision is not None:
        raise ValueError(
            f"{precision} is for experts that train, and those of {_list(offloaded)} stay elsewhere since "
            "offload_experts(), and are frozen"
        )
    layers: list[MoELayer | GroupedExperts] = [one for one in model.modules() if isinstance(one, MoELayer)]
    layers += own.values()
    configs = [replace(layer.config, expert_precision=precision) for layer in layers]
    if of_transformers:
        patch(model)
    for experts in of_transformers.values():
        setattr(experts, PRECISION, precision)
    for layer, config in zip(layers, configs, strict=True):
        layer.config = config
    for grouped in own.values():
        grouped.spec = replace(grouped.spec, precision=precision)
    return (*of_transformers, *own)


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


def _list(modules: Mapping[str, nn.Module]) -> str:
    named = [f"{name or 'the model itself'} ({type(module).__name__})" for name, module in modules.items()]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more
