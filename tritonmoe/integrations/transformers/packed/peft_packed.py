"""PEFT's adapters of packed experts: found by the name of the weight, and shaped as the weight."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonmoe.integrations.transformers.packed.packed_experts import (
    is_packed_experts,
    is_packed_weight,
    logical_shape_of,
    up_name,
)
from tritonmoe.layer import GroupedExperts

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper

__all__ = ["adapt_packed", "is_packed_parameter"]


def adapt_packed(wrapper: type) -> None:
    """Teach PEFT's ParamWrapper, and what makes its wrappers, what packed weights of experts are."""
    from peft.tuners import tuners_utils

    _wrap(wrapper, "get_param", _packed_parameter)
    if hasattr(tuners_utils.BaseTuner, "_inject_parameters"):
        _wrap(tuners_utils.BaseTuner, "_inject_parameters", _found_by_name)


def _wrap(kind: type, name: str, wrap: Callable[[Callable], Callable]) -> None:
    setattr(kind, name, wrap(getattr(kind, name)))


def is_packed_parameter(experts: nn.Module, name: str) -> bool:
    """Say whether a module of experts has this weight packed."""
    if isinstance(experts, GroupedExperts):
        return experts.config.weight_format is not None and name in ("gate_up_proj", "down_proj")
    return name in (up_name(experts), "down_proj") and is_packed_weight(experts, name)


def stand_in(experts: nn.Module, name: str) -> Tensor:
    """Return a tensor of the weight's shape, in bf16 and without memory, on the experts' device."""
    if isinstance(experts, GroupedExperts):
        shape: tuple[int, ...] = experts.config.num_experts, *experts.config.weight_shapes[name == "down_proj"]
    else:
        shape = logical_shape_of(experts, name)
    device = next(experts.parameters()).device
    return torch.empty(1, dtype=torch.bfloat16, device=device).expand(shape)


def _packed_parameter(get_param: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(get_param)
    def method(self: "ParamWrapper") -> Tensor:
        experts = self.get_base_layer()
        if is_packed_parameter(experts, self.parameter_name):
            return stand_in(experts, self.parameter_name)
        return get_param(self)

    return method


def _found_by_name(inject: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Let PEFT, which looks for parameters by their names, find packed weights under those of the weights."""

    @functools.wraps(inject)
    def method(
        self: object, peft_config: object, model: nn.Module, *arguments: object, **keywords: object
    ) -> list[str]:
        with _named(model):
            return inject(self, peft_config, model, *arguments, **keywords)

    return method


@contextlib.contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """Return a context in which PEFT finds parameters without memory, and no parametrizations, on packed experts."""
    packed = [
        module
        for module in model.modules()
        if not isinstance(module, GroupedExperts) and hasattr(module, "num_experts") and is_packed_experts(module)
    ]
    kept: list[tuple[nn.Module, dict[str, object], nn.Module | None]] = []
    for experts in packed:
        own: dict[str, object] = {}
        for name in (up_name(experts), "down_proj"):
            if name in experts._parameters:  # plain, or fp8, whose shape is the weight's
                continue
            shaped = nn.Parameter(stand_in(experts, name), requires_grad=False)
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
