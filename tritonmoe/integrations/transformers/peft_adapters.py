"""PEFT's adapters of experts (LoRA with target_parameters): their factors instead of the product that PEFT makes.

For every adapted parameter PEFT wraps the experts module in a ParamWrapper, which replaces the parameter by
weight + scale * B A while the experts run. Here it notes the two factors on the experts module instead. Of experts that
are spread over ranks, each rank holds the factors of its own (peft_sharding.py).
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from tritonmoe.expert_parallel.state import abort_call
from tritonmoe.experts.adapters import FACTORS, HANDS_OVER, NOTES, SHARDS, Note
from tritonmoe.integrations.transformers.discovery import is_experts
from tritonmoe.integrations.transformers.packed.packed_experts import (
    is_packed_experts,
    is_packed_weight,
    is_transposed,
    logical_shape_of,
    up_name,
)
from tritonmoe.integrations.transformers.peft_sharding import (
    check_merged_is_finite,
    local_factors,
    shard_factors,
    with_parts,
)
from tritonmoe.integrations.transformers.requirements import EXPERTS_IMPLEMENTATION, wrap_method
from tritonmoe.integrations.transformers.sharded_model import save_adapters
from tritonmoe.layer import GroupedExperts
from tritonmoe.placement.expert_shards import sharded_modules, shards_of
from tritonmoe.placement.offloaded import offloaded_of
from tritonmoe.runtime.stand_in import StandIn

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner

__all__ = ["hand_over_factors", "set_lora_B_order"]

logger = logging.getLogger(__name__)

WAS_LOGGED = "_tritonmoe_was_logged"
"""The attribute of a wrapper of which it was logged that it multiplies out."""
LAYOUT = "lora_B_layout"
"""What unsloth, from 2026-09-17 on, calls the order of lora_B's columns in adapter_config.json: one of LAYOUTS."""
LAYOUTS = {"rank_major": "expert_fastest", "grouped_by_expert": "expert_slowest"}
WAS_REORDERED = "_tritonmoe_was_reordered"
"""The attribute of a lora_B whose columns were brought to PEFT's order."""
_said: set[tuple[str, str, str, int]] = set()
"""The kinds of adapters of which it was logged what they train."""


def hand_over_factors() -> None:
    """Make PEFT's ParamWrapper hand over factors, where PEFT is installed; calling it again changes nothing.

    Not when the first adapter runs: under activation checkpointing its recompute would differ from its forward.
    """
    if importlib.util.find_spec("peft") is None:
        return
    try:
        wrapper = getattr(importlib.import_module("peft.tuners.lora.layer"), "ParamWrapper", None)
    except Exception as error:  # PEFT's own trouble, of which its own users hear
        logger.warning("PEFT can't be imported (%s): its adapters of experts would run in its own way", error)
        return
    if wrapper is None or HANDS_OVER in vars(wrapper):  # a release before target_parameters has none
        return
    if not all(hasattr(wrapper, name) for name in ("_activate_lora", "_move_adapter_to_device_of_base_layer")):
        logger.warning("it is not known here how this release of PEFT runs adapters of experts: it keeps its own way")
        return
    setattr(wrapper, HANDS_OVER, wrapper._activate_lora)
    setattr(wrapper, SHARDS, shard_factors)
    setattr(wrapper, FACTORS, _factors_of)
    wrapper._activate_lora = _activate
    wrap_method(wrapper, "get_param", _parameter_or_stand_in)
    wrap_method(wrapper, "get_delta_weight", _delta_weight)
    wrap_method(wrapper, "merge", _merge_checked)
    wrap_method(wrapper, "_move_adapter_to_device_of_base_layer", _move_and_shard)
    tuner = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    if hasattr(tuner, "_inject_parameters"):
        wrap_method(tuner, "_inject_parameters", _inject_named)
    for name in ("merge_and_unload", "merge_adapter"):
        wrap_method(tuner, name, _merge_all_or_none)
    wrap_method(importlib.import_module("peft").PeftModel, "save_pretrained", save_adapters)
    wrap_method(importlib.import_module("peft.utils.hotswap"), "hotswap_adapter_from_state_dict", _hotswap_parts)
    _watch_orders()


def _factors_of(wrapper: "ParamWrapper") -> tuple[nn.Module, list[nn.Module]]:
    """Return the experts of a wrapper, and the modules that have the factors of all its adapters."""
    return wrapper.get_base_layer(), [*wrapper.lora_A.values(), *wrapper.lora_B.values()]


def _move_and_shard(move: Callable[..., None], wrapper: "ParamWrapper", *arguments: object, **keywords: object) -> None:
    """Keep this rank's part of an adapter once that has its values, and PEFT moves it to the experts' device."""
    move(wrapper, *arguments, **keywords)
    shard_factors(wrapper)


def _merge_all_or_none(
    merge: Callable[..., object], tuner: "BaseTuner", *arguments: object, **keywords: object
) -> object:
    """Merge a model where all its wrappers can: PEFT would go layer by layer, and stop in the middle."""
    given = inspect.signature(merge).bind(tuner, *arguments, **keywords).arguments
    for module in tuner.model.modules():
        if hasattr(type(module), HANDS_OVER):
            _check_merge(cast("ParamWrapper", module), given.get("safe_merge", False), given.get("adapter_names"))
    return merge(tuner, *arguments, **keywords)


def _merge_checked(
    merge: Callable[..., None],
    wrapper: "ParamWrapper",
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    _check_merge(wrapper, safe_merge, adapter_names)
    merge(wrapper, safe_merge=safe_merge and not _is_spread(wrapper), adapter_names=adapter_names)


def _is_spread(wrapper: "ParamWrapper") -> bool:
    return hasattr(wrapper.get_param(), "to_local") and shards_of(wrapper.get_base_layer()) is not None


def _check_merge(wrapper: "ParamWrapper", safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Raise ValueError where adapters can't be merged into the experts of a wrapper; of spread ones every rank calls.

    Args:
        safe_merge: look also whether the experts of every rank would stay finite, where PEFT would look at this rank's.
    """
    from torch.distributed.tensor import Shard

    names = wrapper.active_adapters if adapter_names is None else adapter_names
    names = [name for name in names if name in wrapper.lora_A and name not in wrapper.merged_adapters]
    experts = wrapper.get_base_layer()
    if names and _is_packed_parameter(experts, wrapper.parameter_name):
        raise ValueError(
            f"{wrapper.parameter_name} of {type(experts).__name__} is packed in 4 or 8 bits, and merging would round "
            f"the adapters {names} to them, so nothing was merged. tm.export_weights(model, dequantize=True) gives the "
            "merged weights in bf16 of this model, as the adapter was trained on. Or save the adapter "
            "(save_pretrained), load the model in bf16 (without quantize_experts and register(packed=True), or with "
            "dequantize=True in its quantization_config) and merge it there: weights that were never packed give other "
            "results"
        )
    if names and (offloaded := offloaded_of(experts)) is not None:
        raise ValueError(
            f"{wrapper.parameter_name} of {type(experts).__name__} stays in {offloaded.place}, and nothing was merged: "
            "save the adapter (save_pretrained), load the model without offload_experts(), and merge there"
        )
    if not names or not _is_spread(wrapper):
        return
    for name in names:
        if tuple(wrapper.get_param().placements) != (Shard(0),) and any(sharded_modules(wrapper.lora_A[name])):
            raise ValueError(
                f"the adapter of {wrapper.parameter_name} can't be merged into experts with the placements "
                f"{wrapper.get_param().placements}, so nothing was merged: merge before fully_shard()"
            )
    if safe_merge:
        check_merged_is_finite(wrapper, names)


def _hotswap_parts(
    swap: Callable[..., None],
    model: nn.Module,
    state_dict: dict[str, Tensor],
    *arguments: object,
    **keywords: object,
) -> None:
    """Swap in this rank's part of a whole adapter, where the one there is spread."""
    swap(model, with_parts(model, state_dict), *arguments, **keywords)


def _activate(self: "ParamWrapper", active_adapters: list[str]) -> AbstractContextManager:
    """Return the context in which the experts run with the adapter; replaces ParamWrapper._activate_lora."""
    reason = _why_not(self, active_adapters)
    if reason is None:
        adapter = next(name for name in active_adapters if name in self.lora_A)
        _say_what_trains(self, adapter)
        return _Noted(self, adapter)
    experts = self.get_base_layer()
    shards, is_packed = shards_of(experts), _is_packed_parameter(experts, self.parameter_name)
    is_offloaded = offloaded_of(experts) is not None
    if reason and (is_packed or is_offloaded or shards is not None):
        if shards is not None:
            abort_call(shards.transport)
        what = "weight is packed" if is_packed else "experts are spread over ranks"
        what = "weight stays elsewhere" if is_offloaded else what
        raise ValueError(
            f"PEFT can't run its adapter of {self.parameter_name} of {type(experts).__name__}, whose {what}, since "
            f"{reason}"
        )
    _log_once(self, reason)
    return getattr(type(self), HANDS_OVER)(self, active_adapters)


class _Noted:
    """Inside of it an experts module has the note of one adapted parameter."""

    def __init__(self, wrapper: "ParamWrapper", adapter: str) -> None:
        self.wrapper, self.adapter = wrapper, adapter
        scaled = f"{adapter} * {wrapper.scaling[adapter]}"
        self.note = Note(wrapper.get_base_layer(), wrapper.parameter_name, scaled, self.factors)

    def __enter__(self) -> None:
        self.note.experts.__dict__.setdefault(NOTES, []).append(self.note)

    def __exit__(self, *_: object) -> None:
        # this one, whatever another thread, or the other half of two_batches, has noted meanwhile
        notes = self.note.experts.__dict__[NOTES]
        notes[:] = [note for note in notes if note is not self.note]

    def factors(self, dtype: torch.dtype, expert_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return A (E, R, in) and B (E, out, R) with its scale, of these experts."""
        wrapper, adapter, num_experts = self.wrapper, self.adapter, self.wrapper.num_experts
        local = local_factors(wrapper, adapter)
        if local is None:
            # PEFT's rows of A are (expert, rank), its columns of B (rank, expert)
            lora_a, lora_b = (_weight(factors[adapter]) for factors in (wrapper.lora_A, wrapper.lora_B))
            factor_a = lora_a.unflatten(0, (num_experts, -1))
            factor_b = lora_b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
        else:
            factor_a, factor_b = local
        if not getattr(wrapper, "_did_swap_in_out_features", False) and not is_transposed(wrapper.get_base_layer()):
            # releases before 0.19 take the rows of every weight for what comes in: their A is our B
            factor_a, factor_b = factor_b.mT, factor_a.mT
        if local is None and list(expert_ids) != list(range(num_experts)):
            first, last = expert_ids[0], expert_ids[-1]
            is_range = list(expert_ids) == list(range(first, last + 1))  # a slice is a view
            own = slice(first, last + 1) if is_range else list(expert_ids)
            factor_a, factor_b = factor_a[own], factor_b[own]
        return factor_a.to(dtype).contiguous(), (factor_b * wrapper.scaling[adapter]).to(dtype).contiguous()


def _weight(linear: nn.Module) -> Tensor:
    """Return the weight, whatever torch.func or FSDP have put in the parameter's place."""
    return cast(Tensor, linear.weight)


def _why_not(wrapper: "ParamWrapper", active_adapters: list[str]) -> str | None:
    """Return why PEFT runs an adapter in its own way: "" without a warning, None where factors are handed over."""
    experts = wrapper.get_base_layer()
    active = [name for name in active_adapters if name in wrapper.lora_A]
    if not active:
        return ""
    shards = shards_of(experts)
    if shards is not None and shards.transport.size > 1 and wrapper.num_experts != shards.num_experts:
        return (
            "every rank would have adapters of its own experts alone, under the same names: spread the experts with "
            "parallelize(), over ranks of torch.distributed, instead of ep_implementation"
        )
    if not isinstance(experts, GroupedExperts):
        if getattr(getattr(experts, "config", None), "_experts_implementation", None) != EXPERTS_IMPLEMENTATION:
            return ""
        if not is_experts(experts):
            return ""
    if len(active) > 1:
        return f"{len(active)} adapters are active at once, which only PEFT's own way runs: activate one"
    shape = wrapper.get_param().shape
    if wrapper.parameter_name not in (up_name(experts), "down_proj") or len(shape) != 3 or wrapper.num_experts < 2:
        return f"{wrapper.parameter_name} {tuple(shape)} is no projection of several experts"
    is_packed = _is_packed_parameter(experts, wrapper.parameter_name)
    if wrapper.parameter_name in getattr(experts, "parametrizations", {}) and not is_packed:
        return f"{wrapper.parameter_name} has another parametrization: remove it"
    if wrapper.lora_variant.get(active[0]) is not None or wrapper.lora_bias.get(active[0]):
        return "the adapter is more than two factors: leave out DoRA, or the bias"
    return None


def _say_what_trains(wrapper: "ParamWrapper", adapter: str) -> None:
    """Log, once for every kind of adapter, that it is recognised, and how much of the experts it trains."""
    kind = type(wrapper.get_base_layer()).__name__, wrapper.parameter_name, adapter, wrapper.r[adapter]
    if kind in _said or torch.compiler.is_compiling():
        return
    _said.add(kind)
    factors = [*wrapper.lora_A[adapter].parameters(), *wrapper.lora_B[adapter].parameters()]
    logger.info(
        "the adapter %r of rank %d on %s.%s is never multiplied out: it has %d parameters for %d experts of a layer, "
        "%s, and the %d of the weight itself are %s",
        adapter,
        wrapper.r[adapter],
        *kind[:2],
        sum(factor.numel() for factor in factors),
        wrapper.num_experts,
        "which are trained" if all(factor.requires_grad for factor in factors) else "which are frozen",
        wrapper.get_param().numel(),
        "trained" if wrapper.get_param().requires_grad else "frozen",
    )


def _log_once(wrapper: "ParamWrapper", reason: str) -> None:
    if reason and not wrapper.__dict__.get(WAS_LOGGED):
        wrapper.__dict__[WAS_LOGGED] = True
        logger.warning(
            "PEFT multiplies out the adapter of %s of %s at every step, since %s",
            wrapper.parameter_name,
            type(wrapper.get_base_layer()).__name__,
            reason,
        )


def _delta_weight(
    get_delta_weight: Callable[..., Tensor],
    wrapper: "ParamWrapper",
    adapter_name: str,
    *arguments: object,
    **keywords: object,
) -> Tensor:
    """Return what PEFT's get_delta_weight does; of spread experts a DTensor, which merge() adds."""
    local = local_factors(wrapper, adapter_name)
    if local is not None:
        return _spread_delta(wrapper, local, wrapper.scaling[adapter_name])
    delta = get_delta_weight(wrapper, adapter_name, *arguments, **keywords)
    parameter, shards = wrapper.get_param(), shards_of(wrapper.get_base_layer())
    if shards is None or not hasattr(parameter, "device_mesh"):
        return delta
    from torch.distributed.tensor import distribute_tensor

    if shards.placement is not None:  # the parameter is by slots
        delta = delta[[expert for held in shards.experts_of_rank for expert in held]]
    return distribute_tensor(delta.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _spread_delta(wrapper: "ParamWrapper", factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Return the product of this rank's factors as its part of the whole, like the parameter's."""
    from torch.distributed.tensor import DTensor, Shard

    parameter = wrapper.get_param()
    factor_a, factor_b = (factor.detach() for factor in factors)
    delta = factor_b @ factor_a * scale
    delta = delta if getattr(wrapper, "_did_swap_in_out_features", False) else delta.mT.contiguous()
    return DTensor.from_local(delta.to(parameter.dtype), parameter.device_mesh, [Shard(0)], run_check=False)


def _watch_orders() -> None:
    """Make PEFT's reading of an adapter's configuration warn where the lora_B may be in unsloth's order."""
    mixin = importlib.import_module("peft.config").PeftConfigMixin
    read = mixin.from_json_file.__func__

    @functools.wraps(read)
    def from_json_file(cls: type, path_json_file: str, **keywords: object) -> dict[str, Any]:
        found = read(cls, path_json_file, **keywords)
        if found.get("target_parameters"):
            _say_order(found, Path(path_json_file))
        return found

    mixin.from_json_file = classmethod(from_json_file)


def _say_order(config: dict[str, Any], path: Path) -> None:
    order = LAYOUTS.get(config.get(LAYOUT, ""))
    if order == "expert_fastest":
        return
    readme = path.with_name("README.md")
    texts = (str(config), readme.read_text(errors="replace") if readme.is_file() else "")
    if order is None and not any("unsloth" in text.lower() for text in texts):
        return
    says = (
        f"says {LAYOUT}={config[LAYOUT]!r}"
        if order
        else "names unsloth, and an unsloth from before 2026-09-17 has trained experts' adapters"
    )
    _warn_once(
        f"the adapter in {path.parent} {says}, with the expert as the slowest index of lora_B's columns, where PEFT "
        'reads the fastest: its experts get each other\'s factors unless tmt.set_lora_B_order(model, "expert_slowest") '
        "is called after the adapter is loaded. An adapter of PEFT, of a later unsloth, or saved again after that call "
        "needs nothing"
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def set_lora_B_order(
    model: nn.Module,
    lora_B_order: Literal["expert_fastest", "expert_slowest"] = "expert_fastest",
    adapter_name: str = "default",
) -> None:
    """Bring the columns of lora_B of a loaded adapter of experts, in place, from the order in its file to PEFT's.

    PEFT stores lora_B as (out, R * E) with the expert as the fastest index of its columns, and runs, merges and saves
    it so. unsloth before 2026-09-17 trained adapters with the expert as the slowest index, under the same names and
    shapes. Call this once after loading, before anything is computed, merged, exported or saved, and before
    `parallelize`. Source: unslothai/unsloth-zoo pull requests 1232 and 1269.

    Args:
        lora_B_order: the order in the file; "expert_fastest" is PEFT's, with which nothing changes.
    Raises:
        ValueError: another order; no such adapter of experts; it is merged, spread over ranks, or reordered already.
            Nothing is changed.
    Example:
        E = 2 and R = 2: columns e0r0, e0r1, e1r0, e1r1 ("expert_slowest") become e0r0, e1r0, e0r1, e1r1.
    """
    if lora_B_order not in LAYOUTS.values():
        raise ValueError(f'lora_B_order must be "expert_fastest" or "expert_slowest", got {lora_B_order!r}')
    wrappers = [
        cast("ParamWrapper", module)
        for module in model.modules()
        if type(module).__name__ == "ParamWrapper" and adapter_name in getattr(module, "lora_B", {})
    ]
    wrappers = [wrapper for wrapper in wrappers if wrapper.num_experts > 1]
    if not wrappers:
        raise ValueError(f"{type(model).__name__} has no adapter {adapter_name!r} of experts: load it first")
    if lora_B_order == "expert_fastest":
        return
    for wrapper in wrappers:
        linear = wrapper.lora_B[adapter_name]
        if any(sharded_modules(linear)) or hasattr(linear.weight, "to_local"):
            raise ValueError(
                f"the adapter {adapter_name!r} is spread over ranks, and a rank has only the columns that PEFT's "
                "order gives it: load it on a whole model, call set_lora_B_order and save_pretrained, and load "
                "that file"
            )
        if adapter_name in wrapper.merged_adapters or WAS_REORDERED in linear.__dict__:
            is_merged = adapter_name in wrapper.merged_adapters
            done = "merged: call unmerge_adapter() first" if is_merged else "in PEFT's order already"
            raise ValueError(f"lora_B of the adapter {adapter_name!r} is {done}")
    with torch.no_grad():
        for wrapper in wrappers:
            linear = wrapper.lora_B[adapter_name]
            weight = _weight(linear)
            columns = weight.unflatten(1, (wrapper.num_experts, -1))  # (out, E, R)
            weight.copy_(columns.transpose(1, 2).flatten(1))
            linear.__dict__[WAS_REORDERED] = True


def _is_packed_parameter(experts: nn.Module, name: str) -> bool:
    """Return whether a module of experts has this weight packed."""
    if isinstance(experts, GroupedExperts):
        return experts.config.weight_format is not None and name in ("gate_up_proj", "down_proj")
    return name in (up_name(experts), "down_proj") and is_packed_weight(experts, name)


def _has_no_values(experts: nn.Module, name: str) -> bool:
    """Return whether a module of experts has this weight packed, or in a file."""
    return _is_packed_parameter(experts, name) or isinstance(experts.__dict__.get(name), StandIn)


def _stand_in(experts: nn.Module, name: str) -> Tensor:
    """Return a tensor of the weight's shape, in the dtype of products and without memory, on the experts' device."""
    if isinstance(experts, GroupedExperts):
        shape: tuple[int, ...] = experts.config.num_experts, *experts.config.weight_shapes[name == "down_proj"]
    else:
        shape = logical_shape_of(experts, name)
    device = next((parameter.device for parameter in experts.parameters()), torch.device("cpu"))
    dtype = torch.bfloat16 if _is_packed_parameter(experts, name) else experts.__dict__[name].dtype
    return torch.empty(1, dtype=dtype, device=device).expand(shape)


def _parameter_or_stand_in(get_param: Callable[..., Tensor], wrapper: "ParamWrapper") -> Tensor:
    experts = wrapper.get_base_layer()
    if _has_no_values(experts, wrapper.parameter_name):
        return _stand_in(experts, wrapper.parameter_name)
    return get_param(wrapper)


def _inject_named(
    inject: Callable[..., list[str]],
    tuner: object,
    peft_config: object,
    model: nn.Module,
    *arguments: object,
    **keywords: object,
) -> list[str]:
    """Run PEFT's _inject_parameters, which looks for parameters by name, where packed weights have those names."""
    with _named(model):
        return inject(tuner, peft_config, model, *arguments, **keywords)


@contextlib.contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """Put parameters without memory on packed experts, and take parametrizations away, while the context lasts."""
    packed = [
        module
        for module in model.modules()
        if offloaded_of(module) is not None
        or (not isinstance(module, GroupedExperts) and hasattr(module, "num_experts") and is_packed_experts(module))
    ]
    kept: list[tuple[nn.Module, dict[str, object], nn.Module | None]] = []
    for experts in packed:
        own: dict[str, object] = {}
        for name in (up_name(experts), "down_proj"):
            if name in experts._parameters:  # plain, or fp8, whose shape is the weight's
                continue
            shaped = nn.Parameter(_stand_in(experts, name), requires_grad=False)
            own[name] = experts.__dict__.pop(name, None)
            experts._parameters[name] = shaped
        kept.append((experts, own, experts._modules.pop("parametrizations", None)))
    try:
        yield
    finally:
        for experts, own, parametrizations in kept:
            if parametrizations is not None:
                experts._modules["parametrizations"] = parametrizations
            for name, value in own.items():
                experts._parameters.pop(name, None)
                if value is not None:
                    experts.__dict__[name] = value
