"""Batches for every rank, the same on one device, and how results are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tolerance import error_floor
from torch import Tensor

import tritonmoe as tm
from tritonmoe.dispatch.capacity import segment_room
from tritonmoe.transports import Transport

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, INTERMEDIATE = 6, 5
WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
Overlap = tm.OverlapConfig | tm.OverlapPlan
NAMES = ("x", "topk_weights", *WEIGHTS)
OPTIONS = {
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True, "activation": "gelu_tanh"},
    "ungated": {"gated": False, "activation": "relu2"},
    "gpt_oss": {"interleaved": True, "transposed": True, "activation": tm.ClampedSwiGLU(1.0, 1.702, 1.0)},
    "save-input": {"save": "input"},
}
NUM_TOKENS = {1: (9,), 2: (7, 0), 3: (7, 0, 5), 4: (7, 0, 5, 3), 8: (7, 0, 5, 3, 9, 1, 4, 6)}
"""Uneven, and rank 1 has none."""


@dataclass
class Batch:
    """Every rank's tokens and the weights of all experts; half of rank 0's pairs go to one hot expert."""

    num_ranks: int
    num_experts: int
    top_k: int
    dtype: torch.dtype = torch.float64
    options: dict = field(default_factory=dict)
    device: str = "cpu"
    ranks: tuple[int, int] = (0, 0)
    """Of adapters on the two projections; 0 for none."""
    dropout: float = 0.0
    """Of those adapters."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        gated, transposed = self.options.get("gated", True), self.options.get("transposed", False)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

        counts, num_experts, top_k = NUM_TOKENS[self.num_ranks], self.num_experts, self.top_k
        self.ids = [torch.randint(-1, num_experts + 1, (t, top_k), generator=generator) for t in counts]
        hot = torch.rand(self.ids[0].shape, generator=generator) < 0.5
        self.ids[0] = torch.where(hot, 1, self.ids[0])
        self.ids = [ids.to(self.device) for ids in self.ids]
        width = 2 * INTERMEDIATE if gated else INTERMEDIATE
        up, down = (width, HIDDEN), (HIDDEN, INTERMEDIATE)
        if transposed:
            up, down = up[::-1], down[::-1]
        self.tokens = {
            "x": [random(t, HIDDEN) for t in counts],
            "topk_weights": [torch.rand(t, top_k, generator=generator).to(self.device) for t in counts],
            "dout": [random(t, HIDDEN) for t in counts],
        }
        self.weights = {
            "gate_up_proj": random(num_experts, *up),
            "down_proj": random(num_experts, *down),
            "gate_up_bias": random(num_experts, width),
            "down_bias": random(num_experts, HIDDEN),
        }
        for name, rank, (rows, columns) in zip(
            ("gate_up", "down"), self.ranks, ((width, HIDDEN), (HIDDEN, INTERMEDIATE)), strict=True
        ):
            if rank:
                self.weights[f"{name}_a"] = random(num_experts, rank, columns)
                self.weights[f"{name}_b"] = random(num_experts, rows, rank)

    def on_one_device(self, backend: str = "reference", **options) -> dict[str, Tensor]:
        leaves = {name: torch.cat(self.tokens[name]).requires_grad_() for name in ("x", "topk_weights")}
        leaves |= {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        arguments = with_adapters(leaves, self.dropout)
        out = tm.moe_mlp(topk_ids=torch.cat(self.ids), **arguments, **{**self.options, **options}, backend=backend)
        grads = torch.autograd.grad(out, list(leaves.values()), torch.cat(self.tokens["dout"]))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    def of_rank(self, rank: int) -> dict[str, Tensor]:
        """Fresh arguments of one rank, without gradients."""
        local = self.num_experts // self.num_ranks
        mine = {name: self.tokens[name][rank].clone() for name in ("x", "topk_weights")}
        return mine | {name: w[rank * local : (rank + 1) * local].clone() for name, w in self.weights.items()}

    def call(self, transport: Transport, leaves: dict[str, Tensor], overlap: Overlap, **options) -> Tensor:
        return tm.expert_parallel_mlp(
            topk_ids=self.ids[transport.rank],
            num_experts=self.num_experts,
            transport=transport,
            overlap=overlap,
            **with_adapters(leaves, self.dropout),
            **{**self.options, **options},
        )

    def in_parallel(
        self,
        overlap: tm.OverlapConfig | tm.OverlapPlan,
        *,
        faults: tuple = (),
        link=None,
        num_calls: int = 1,
        **options,
    ) -> dict[str, Tensor]:
        """Run forward and backward on every rank; token results one rank after the other, weights' by expert."""

        def on_rank(transport: Transport) -> list[Tensor]:
            for _ in range(num_calls):
                leaves = {name: value.requires_grad_() for name, value in self.of_rank(transport.rank).items()}
                out = self.call(transport, leaves, overlap, **options)
                grads = torch.autograd.grad(out, list(leaves.values()), self.tokens["dout"][transport.rank])
            return [out.detach(), *grads]

        # On a GPU every rank compiles the kernels of the first call, all in one process.
        timeout_s = 20 if self.device == "cpu" else 120
        results = tm.run_on_emulated_ranks(
            on_rank, self.num_ranks, device=self.device, timeout_s=timeout_s, faults=faults, link=link
        )
        names = "out", "x", "topk_weights", *self.weights
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*results, strict=True), strict=True)}


def with_adapters(leaves: dict[str, Tensor], dropout: float = 0.0) -> dict:
    """Return arguments of moe_mlp: the factors of adapters among leaves as ExpertAdapters."""
    factors = {name: leaf for name, leaf in leaves.items() if name[-2:] in ("_a", "_b")}
    others = {name: leaf for name, leaf in leaves.items() if name not in factors}
    return {**others, "adapters": tm.ExpertAdapters(**factors, down_scale=0.5, dropout=dropout)} if factors else others


def assert_equals_one_device(actual: dict[str, Tensor], expected: dict[str, Tensor], where: object = "") -> None:
    for name, value in actual.items():
        assert value.shape == expected[name].shape, (where, name)
        assert value.dtype == expected[name].dtype, (where, name)
        error = (value - expected[name]).abs().max().item() if value.numel() else 0.0
        assert error <= error_floor(value.dtype, expected[name]), (where, name, error)


CALLABLES = {
    "chunk": lambda h: F.silu(h.chunk(2, 1)[0]) * h.chunk(2, 1)[1],
    "slices": lambda h: torch.sin(h[:, :INTERMEDIATE]) + h[:, INTERMEDIATE:].square(),
    "ignores-the-rows": lambda h: h[:, :INTERMEDIATE] * 0 + 1,
}


def capped_traffic(
    num_tokens: Sequence[int], num_experts: int, top_k: int, overlap: tm.OverlapPlan
) -> tuple[Tensor, Tensor]:
    """Return the room from every rank i for every rank k, of rows and of pairs, both (W, W) int64 on the CPU.

    num_tokens: of every rank.
    """
    size = len(num_tokens)
    rooms = [segment_room(num, num_experts, top_k, i, size, overlap) for i, num in enumerate(num_tokens)]
    rows, pairs = (torch.tensor(room, device="cpu").sum(1) for room in zip(*rooms, strict=True))
    return rows, pairs
