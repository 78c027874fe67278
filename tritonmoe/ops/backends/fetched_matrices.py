"""Experts' matrices that the torch backend fetches where it multiplies by them: decoded, read ahead, or both.

Each is a context: behind it the memory is used again, on a GPU once what was called inside has run there.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from tritonmoe.config.formats import format_of, weight_shape
from tritonmoe.ops.backends.decoding import DECODERS, ExpertMemory, thread_expert
from tritonmoe.runtime.streamed import StreamedWeight, find_streamed

__all__ = ["FetchedMatrices", "fetched_matrices"]

SMALLEST_GROUP_ELEMENTS = 2**15
"""A batched product of less is computed by another library than that of all experts, which rounds otherwise."""


def fetched_matrices(weight: Tensor, scales: Tensor | None, is_swapped: bool) -> "FetchedMatrices | None":
    """Return what stands for a weight's matrices (E, in, out); None where the weight itself has them in memory.

    scales: of a packed weight. is_swapped: whether the weight is (E, out, in).
    """
    if scales is not None:
        return _PackedMatrices(weight, scales, is_swapped)
    streamed = find_streamed(weight)
    return None if streamed is None else _StreamedMatrices(*streamed, weight, is_swapped)


class FetchedMatrices(ABC):
    """What stands for the matrices (E, in, out) of a weight in a product."""

    _dtype: torch.dtype
    _device: torch.device

    def __init__(self, shape: tuple[int, ...], is_swapped: bool) -> None:
        """shape: of the weight. is_swapped: whether that is (E, out, in)."""
        self._is_swapped = is_swapped
        num_experts, rows, columns = shape
        self._stored = rows, columns
        self.shape = (num_experts, columns, rows) if is_swapped else (num_experts, rows, columns)

    @abstractmethod
    def _fetch(self, expert: int) -> AbstractContextManager[Tensor]:
        """Return one expert as it is stored, perhaps in memory that the thread's next one takes again."""

    @abstractmethod
    def _fetch_into(self, expert: int, out: Tensor) -> None:
        """Write one expert as it is stored into `out`."""

    @contextmanager
    def one(self, expert: int) -> Iterator[Tensor]:
        """Return one expert's matrix, in memory that the thread's next one may take again."""
        with self._fetch(expert) as fetched:
            yield fetched.mT if self._is_swapped else fetched

    @contextmanager
    def group(self, experts: slice, used: Sequence[int]) -> Iterator[Tensor]:
        """Return the matrices of some experts; those that are not in `used` are zero."""
        count = experts.stop - experts.start
        if count == 1:
            with self.one(experts.start) as matrix:
                yield matrix.unsqueeze(0)
            return
        together = torch.zeros(count, *self._stored, dtype=self._dtype, device=self._device)
        for place, expert in enumerate(range(experts.start, experts.stop)):
            if expert in used:
                self._fetch_into(expert, together[place])
        yield together.mT if self._is_swapped else together

    def groups(self, used: Sequence[int]) -> list[slice]:
        """Cut the experts for batched products: one to a group, more where they are tiny; none without `used` ones."""
        num_experts = self.shape[0]
        size = min(num_experts, -(-SMALLEST_GROUP_ELEMENTS // (self._stored[0] * self._stored[1])))
        found = [slice(first, min(first + size, num_experts)) for first in range(0, num_experts, size)]
        return [group for group in found if any(group.start <= expert < group.stop for expert in used)]


class _PackedMatrices(FetchedMatrices):
    """Of a packed weight, whose bytes may be elsewhere."""

    def __init__(self, values: Tensor, scales: Tensor, is_swapped: bool) -> None:
        super().__init__(weight_shape(values, scales), is_swapped)
        self._format, self._device = format_of(values, scales).name, values.device
        self._streamed = find_streamed(values), find_streamed(scales)
        self._dtype = torch.bfloat16
        if self._streamed == (None, None):
            self._experts = DECODERS[self._format].bytes_of(values, scales)

    @contextmanager
    def _bytes(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        values, scales = self._streamed
        if values is None or scales is None:
            yield self._experts[0][expert], self._experts[1][expert]
            return
        with values[0].expert(values[1] + expert) as of_values, scales[0].expert(scales[1] + expert) as of_scales:
            together = DECODERS[self._format].bytes_of(of_values.unsqueeze(0), of_scales.unsqueeze(0))
            yield together[0][0], together[1][0]

    def _fetch(self, expert: int) -> AbstractContextManager[Tensor]:
        with self._bytes(expert) as stored:  # which are not used any more once they are decoded
            return nullcontext(thread_expert(self._format, *self._stored, self._device).decode(*stored))

    def _fetch_into(self, expert: int, out: Tensor) -> None:
        with self._bytes(expert) as stored:
            ExpertMemory(self._format, out).decode(*stored)


class _StreamedMatrices(FetchedMatrices):
    """Of a weight that is elsewhere as it is."""

    def __init__(self, weight: StreamedWeight, first_expert: int, handle: Tensor, is_swapped: bool) -> None:
        super().__init__((handle.shape[0], *weight.shape[1:]), is_swapped)
        self._weight, self._first_expert = weight, first_expert
        self._dtype, self._device = weight.dtype, handle.device

    def _fetch(self, expert: int) -> AbstractContextManager[Tensor]:
        return self._weight.expert(self._first_expert + expert)

    def _fetch_into(self, expert: int, out: Tensor) -> None:
        with self._fetch(expert) as fetched:
            out.copy_(fetched)
