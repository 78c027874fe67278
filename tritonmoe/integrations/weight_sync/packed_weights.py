"""Packed weights of experts in an export: which may go as they are, and what decodes a few experts at a time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.config.formats import format_of, weight_shape
from tritonmoe.experts.quantized_weight import QuantizedWeight
from tritonmoe.integrations.weight_sync.merged_rows import active_adapters, local_part
from tritonmoe.placement.watched_collectives import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PackedWeight", "check_as_it_is", "packed_weights"]

DECODED = "tm.export_weights(model, dequantize=True) gives it in bf16, adapters merged"


class PackedWeight(NamedTuple):
    """A weight of an experts module that is packed."""

    experts: nn.Module
    name: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the module's own parameters that hold it; none where a parametrization does."""
        names = (self.name, *(f"{self.name}{suffix}" for suffix in ("_blocks", "_scales", "_scale_inv")))
        return tuple(name for name in names if name in self.experts._parameters)

    @property
    def values(self) -> Tensor:
        """The parameter that has its values: of the experts of all ranks, where they are spread."""
        if self.parts:
            return self.experts.get_parameter(self.parts[0])
        return self.experts.get_submodule(f"parametrizations.{self.name}").get_parameter("original")

    @property
    def like(self) -> Tensor:
        """On the meta device, what it is once it is decoded."""
        values, scales, is_swapped = self._read(local_part)
        num_experts = len(self.values) if self.parts else len(values)
        _, rows, columns = weight_shape(values, scales)
        sizes = (columns, rows) if is_swapped else (rows, columns)
        return torch.empty(1, dtype=torch.bfloat16, device="meta").expand(num_experts, *sizes)

    def decoder(self, what: str, *, is_local: bool) -> Callable[[int, int], Tensor]:
        """Return what decodes so many experts, from one on, to the form of the module's class.

        Args:
            what: says in which call, to whoever waits long.
            is_local: of this rank's experts; else of all, and every rank calls.
        """
        values, scales, is_swapped = self._read(local_part if is_local else lambda tensor: full_tensor(tensor, what))

        def decode(first: int, number: int) -> Tensor:
            own = slice(first, first + number)
            rows = QuantizedWeight(format_of(values, scales).name, values[own], scales[own]).decode()
            return rows.mT if is_swapped else rows

        return decode

    def _read(self, whole: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, bool]:
        """Return values, scales, and whether the last two axes of the class's own weight are the other way round."""
        from tritonmoe.integrations.transformers.packed.packed_experts import read_packed

        experts = self.experts
        values, scales, is_transposed = read_packed(experts, self.name, lambda key: whole(experts.get_parameter(key)))
        return values.detach(), scales.detach(), is_transposed != bool(getattr(experts, "is_transposed", False))


def packed_weights(module: nn.Module) -> list[PackedWeight]:
    """Return the packed weights of a module of experts; none of another."""
    from tritonmoe.integrations.transformers.packed.packed_experts import is_packed_weight, up_name

    return [PackedWeight(module, name) for name in (up_name(module), "down_proj") if is_packed_weight(module, name)]


def check_as_it_is(model: "PreTrainedModel", name: str, weight: PackedWeight, adapted_by: Sequence[nn.Module]) -> None:
    """Raise ValueError unless a checkpoint of this model has these bytes, and no adapter is to be added to them."""
    from tritonmoe.integrations.transformers.packed.packed_experts import PACKED
    from tritonmoe.integrations.transformers.requirements import quantisation_method

    method, layout = quantisation_method(model), getattr(weight.experts, PACKED, None)
    if not weight.parts:
        raise ValueError(
            f"{name} is packed by bitsandbytes, whose form of experts in one tensor no engine reads: {DECODED}"
        )
    if method is None or (layout is not None and layout.weight_format != method):
        kind = "packed" if layout is None else layout.weight_format
        raise ValueError(
            f"{name} is {kind}, and the checkpoint of this model is {method or 'not quantised'}: quantize_experts() "
            f"has packed it here, and no engine knows. {DECODED}; or send adapters beside the model that the engine has"
        )
    if any(active_adapters(wrapper) for wrapper in adapted_by):
        raise ValueError(
            f"{name} is packed, and an active adapter can't be merged into its bytes: {DECODED}, for an engine whose "
            "model is not quantised; for one whose model is, export inside model.disable_adapter(), once, and send the "
            "adapter beside it"
        )
