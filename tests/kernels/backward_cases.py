"""Operands of down_grad and weight_grad, and results that their bits or their errors are compared with."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tritonmoe.backends import reference
from tritonmoe.config import ExpertLayout
from tritonmoe.grouping import Grouping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "concatenated": ExpertLayout(),
    "interleaved": ExpertLayout(interleaved=True),
    "transposed": ExpertLayout(transposed=True),
    "interleaved-transposed": ExpertLayout(interleaved=True, transposed=True),
    "ungated": ExpertLayout(gated=False),
    "ungated-transposed": ExpertLayout(gated=False, transposed=True),
}


@contextlib.contextmanager
def garbage_memory() -> Iterator[None]:
    """Fill what torch.empty gives with NaN (integers: a number that is no index)."""
    with pytest.MonkeyPatch.context() as patch:

        def spoil(make):
            def spoiled(*args, **kwargs):
                tensor = make(*args, **kwargs)
                return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

            return spoiled

        patch.setattr(torch, "empty", spoil(torch.empty))
        patch.setattr(torch, "empty_like", spoil(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", spoil(torch.Tensor.new_empty))
        yield


class Operands:
    """What a layer's backward needs, in one dtype; values behind the last pair are NaN."""

    def __init__(
        self,
        ids: Tensor,
        num_experts: int,
        layout: ExpertLayout,
        dtype: torch.dtype = torch.float32,
        *,
        hidden: int = 20,
        intermediate: int = 12,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.ids, self.num_experts, self.layout = ids.to(DEVICE), num_experts, layout
        self.width = 2 * intermediate if layout.gated else intermediate
        self.intermediate, self.hidden = intermediate, hidden
        num_pairs = ids.numel()
        self.x, self.dout = random(ids.shape[0], hidden), random(ids.shape[0], hidden)
        self.weights = torch.rand(ids.shape, generator=generator).to(DEVICE)
        self.h, self.a = random(num_pairs, self.width), random(num_pairs, intermediate)
        self.dh, self.scaled_a = random(num_pairs, self.width), random(num_pairs, intermediate)
        shape = (hidden, intermediate)
        self.w2 = random(num_experts, *(shape[::-1] if layout.transposed else shape)) * intermediate**-0.5
        self.b2 = random(num_experts, hidden)
        num_active = int(((self.ids >= 0) & (self.ids < num_experts)).sum())
        for values in (self.h, self.a, self.dh, self.scaled_a):
            values[num_active:] = float("nan")

    def double(self) -> "Operands":
        """Give the same numbers in fp64."""
        twin = object.__new__(Operands)
        for name, value in vars(self).items():
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            setattr(twin, name, value.double() if is_float else value)
        return twin

    def group(self) -> Grouping:
        return reference.group(self.ids, self.num_experts)

    def weight_grad(self, backend: ModuleType, grouping: Grouping, **keywords) -> reference.WeightGrads:
        return backend.weight_grad(
            grouping,
            self.layout,
            x=self.x,
            dh=self.dh[: grouping.num_pairs],
            dout=self.dout,
            scaled_a=self.scaled_a[: grouping.num_pairs],
            topk_weights=self.weights,
            gate_up_bias=True,
            down_bias=True,
            **keywords,
        )


def random_ids(num_rows: int, top_k: int, num_experts: int, *, skip: float = 0.2, seed: int = 0) -> Tensor:
    """Draw ids, some of them skipped (below zero or too large), some twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_experts, (num_rows, top_k), generator=generator)
    skipped = torch.rand(num_rows, top_k, generator=generator) < skip
    outside = torch.where(torch.rand(num_rows, top_k, generator=generator) < 0.5, -1, num_experts + 3)
    return torch.where(skipped, outside, ids)
