"""Packed weights of experts for tests: random bytes in every format, and calls that compare them with decoded ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.formats import FORMATS, WeightFormat

__all__ = ["FORMATS", "PackedCase", "random_weight"]


def random_weight(weight_format: WeightFormat, shape: tuple[int, int, int], seed: int = 0) -> tm.QuantizedWeight:
    """Return a packed weight (E, A, B) of random bytes, whose values are about as large as those of trained weights."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, rows, columns = shape
    stored = shape if weight_format == "fp8" else (num_experts, rows, columns // 2)
    values = torch.randint(0, 256, stored, generator=generator, dtype=torch.uint8)
    size = FORMATS[weight_format].scales_shape(shape)
    if weight_format == "mxfp4":
        scales = torch.randint(117, 121, size, generator=generator, dtype=torch.uint8)
        return tm.QuantizedWeight("mxfp4", values, scales)
    if weight_format == "nf4":
        return tm.QuantizedWeight("nf4", values, torch.rand(size, generator=generator) * 0.05)
    values.masked_fill_((values & 0x7F) == 0x7F, 1)
    return tm.QuantizedWeight("fp8", values.view(torch.float8_e4m3fn), torch.rand(size, generator=generator) * 1e-3)


@dataclass
class PackedCase:
    """A call with packed weights, and the same with decoded ones."""

    weight_format: WeightFormat
    num_tokens: int = 40
    num_experts: int = 8
    top_k: int = 3
    hidden: int = 64
    intermediate: int = 32
    transposed: bool = False
    interleaved: bool = False
    gated: bool = True
    bias: bool = False
    rank: int = 0
    dropout: float = 0.0
    hot: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight_format == "fp8":
            self.intermediate = 128

    def weights(self) -> tuple[tm.QuantizedWeight, tm.QuantizedWeight]:
        width, sizes = (2 if self.gated else 1) * self.intermediate, []
        for pair in (width, self.hidden), (self.hidden, self.intermediate):
            sizes.append((self.num_experts, *(pair[::-1] if self.transposed else pair)))
        up, down = (random_weight(self.weight_format, size, self.seed + n) for n, size in enumerate(sizes))
        return up, down

    def options(self) -> dict[str, object]:
        return {"transposed": self.transposed, "interleaved": self.interleaved, "gated": self.gated}

    def leaves(self) -> dict[str, Tensor]:
        """Return x, topk_weights, biases and factors, which get gradients, by name."""
        generator = torch.Generator().manual_seed(self.seed + 7)
        width = (2 if self.gated else 1) * self.intermediate

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16).requires_grad_()

        experts = self.num_experts
        leaves = {"x": draw(self.num_tokens, self.hidden)}
        leaves["topk_weights"] = torch.rand(self.num_tokens, self.top_k, generator=generator).requires_grad_()
        if self.bias:
            leaves |= {"gate_up_bias": draw(experts, width), "down_bias": draw(experts, self.hidden)}
        if self.rank:
            leaves["gate_up_a"] = draw(experts, self.rank, self.hidden, scale=0.1)
            leaves["gate_up_b"] = draw(experts, width, self.rank, scale=0.1)
            leaves["down_a"] = draw(experts, self.rank, self.intermediate, scale=0.1)
            leaves["down_b"] = draw(experts, self.hidden, self.rank, scale=0.1)
        return leaves

    def topk_ids(self) -> Tensor:
        """Return ids of which some are skipped and one expert has no pair."""
        generator = torch.Generator().manual_seed(self.seed + 8)
        ids = torch.randint(-1, max(1, self.num_experts - 1), (self.num_tokens, self.top_k), generator=generator)
        return torch.where(torch.rand(ids.shape, generator=generator) < 0.8, 0, ids) if self.hot else ids

    def dout(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 9)
        return torch.randn(self.num_tokens, self.hidden, generator=generator).to(torch.bfloat16)

    def keywords(self, leaves: dict[str, Tensor]) -> dict[str, object]:
        """Return the keyword arguments of a call with these leaves."""
        others = {name: leaf for name, leaf in leaves.items() if name.endswith("bias")}
        factors = {name: leaf for name, leaf in leaves.items() if name.endswith(("_a", "_b"))}
        if factors:
            factors |= {"gate_up_scale": 0.5, "dropout": self.dropout}  # type: ignore[dict-item]
            others["adapters"] = tm.ExpertAdapters(**factors)  # type: ignore[assignment, arg-type]
        return {**self.options(), **others}

    def run(self, *, decoded: bool, **options: object) -> dict[str, Tensor]:
        """Return the result of moe_mlp and every gradient."""
        up, down = (weight.decode() if decoded else weight for weight in self.weights())
        leaves = self.leaves()
        torch.manual_seed(3)
        given = {**self.keywords(leaves), **options}
        y = tm.moe_mlp(leaves["x"], self.topk_ids(), leaves["topk_weights"], up, down, **given)  # type: ignore[arg-type]
        y.backward(self.dout())
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}
