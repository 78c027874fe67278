"""PackedMatrices: experts' matrices that the torch backend decodes where it multiplies by them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.config.formats import format_of, weight_shape
from tritonmoe.ops.backends.decoding import DECODERS, ExpertMemory, thread_expert

__all__ = ["PackedMatrices"]

SMALLEST_GROUP_ELEMENTS = 2**15
"""A batched product of less is computed by another library than that of all experts, which rounds otherwise."""


class PackedMatrices:
    """What stands for the matrices (E, in, out) of a packed weight in a product."""

    def __init__(self, values: Tensor, scales: Tensor, is_swapped: bool) -> None:
        """is_swapped: whether the weight is (E, out, in)."""
        self._format = format_of(values, scales).name
        self._experts = DECODERS[self._format].bytes_of(values, scales)
        self._is_swapped = is_swapped
        num_experts, rows, columns = weight_shape(values, scales)
        self._stored = rows, columns
        self.shape = (num_experts, columns, rows) if is_swapped else (num_experts, rows, columns)

    def __getitem__(self, expert: int) -> Tensor:
        """Return one expert's matrix, in memory that the thread's next one takes again."""
        decoded = self._decoded(expert)
        return decoded.mT if self._is_swapped else decoded

    def _decoded(self, expert: int) -> Tensor:
        values, scales = self._experts
        rows, columns = self._stored
        return thread_expert(self._format, rows, columns, values.device).decode(values[expert], scales[expert])

    def group(self, experts: slice, used: Sequence[int]) -> Tensor:
        """Return the matrices of some experts; those that are not in `used` are zero."""
        values, scales = self._experts
        count = experts.stop - experts.start
        if count == 1:
            together = self._decoded(experts.start).unsqueeze(0)
        else:
            together = torch.zeros(count, *self._stored, dtype=torch.bfloat16, device=values.device)
            for place, expert in enumerate(range(experts.start, experts.stop)):
                if expert in used:
                    ExpertMemory(self._format, together[place]).decode(values[expert], scales[expert])
        return together.mT if self._is_swapped else together

    def groups(self, used: Sequence[int]) -> list[slice]:
        """Cut the experts for batched products: one to a group, more where they are tiny; none without `used` ones."""
        num_experts = self.shape[0]
        size = min(num_experts, -(-SMALLEST_GROUP_ELEMENTS // (self._stored[0] * self._stored[1])))
        found = [slice(first, min(first + size, num_experts)) for first in range(0, num_experts, size)]
        return [group for group in found if any(group.start <= expert < group.stop for expert in used)]
