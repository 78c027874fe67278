"""Experts as a plain PyTorch loop with autograd, and what a case of them takes: what moe_mlp is compared with."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from tolerance import assert_close_to_exact
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.config.activations import ACTIVATION_NAMES
from tritonmoe.config.layer import PerWeight
from tritonmoe.experts.adapter_dropout import AdapterDropout, DroppedRows, with_row_seeds
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends import reference

__all__ = [
    "ACTIVATIONS",
    "GPT_OSS",
    "LAYOUTS",
    "SCALES",
    "Case",
    "adapters_in",
    "check",
    "differentiable",
    "exact_and_plain",
    "gradients",
    "kept_columns",
    "plain_moe",
    "row_seeds",
    "run_moe_mlp",
]

LAYOUTS = {
    "concatenated": {},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True},
    "interleaved-transposed": {"interleaved": True, "transposed": True},
    "ungated": {"gated": False},
    "ungated-transposed": {"gated": False, "transposed": True},
}
GPT_OSS = tm.ClampedSwiGLU(1.0, alpha=1.702, up_offset=1.0)
ACTIVATIONS = {name: name for name in ACTIVATION_NAMES} | {
    "gpt_oss": GPT_OSS,
    "deepseek_v4": tm.ClampedSwiGLU(0.7),
    "inkling2": tm.SoftcappedSwiGLU(0.7, 1.5),
}
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")
SCALES = {"gate_up_scale": 0.75, "down_scale": 2.0}
"""Of adapters, where a case has some."""
SEED = 4
"""Of torch's generator, where a case has dropout."""


@dataclass(frozen=True)
class Case:
    """A layer and a batch; ids are drawn from -1..E, so that about 2 in E + 2 pairs are skipped."""

    num_tokens: int = 11
    top_k: int = 3
    num_experts: int = 5
    hidden: int = 7
    intermediate: int = 6
    activation: tm.config.layer.Activation = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = True
    up_rank: int = 0
    """Of an adapter on the up-projection, and so for the down-projection; 0 for none."""
    down_rank: int = 0
    dropout: float = 0.0
    """Of what the adapters multiply."""

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Draw everything that moe_mlp takes, and dout; the same numbers, rounded, in every dtype."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        width = 2 * self.intermediate if self.gated else self.intermediate
        up, down = (width, self.hidden), (self.hidden, self.intermediate)
        if self.transposed:
            up, down = up[::-1], down[::-1]
        ids = torch.randint(-1, self.num_experts + 1, (self.num_tokens, self.top_k), generator=generator)
        weights = torch.rand(self.num_tokens, self.top_k, generator=generator, dtype=torch.float64)
        drawn = {
            "x": random(self.num_tokens, self.hidden),
            "topk_ids": ids,
            "topk_weights": weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
            "gate_up_proj": random(self.num_experts, *up, scale=self.hidden**-0.5),
            "down_proj": random(self.num_experts, *down, scale=self.intermediate**-0.5),
            "dout": random(self.num_tokens, self.hidden),
        }
        if self.bias:
            drawn["gate_up_bias"] = random(self.num_experts, width, scale=0.5)
            drawn["down_bias"] = random(self.num_experts, self.hidden, scale=0.5)
        for name, rank, (rows, columns) in (
            ("gate_up", self.up_rank, (width, self.hidden)),
            ("down", self.down_rank, (self.hidden, self.intermediate)),
        ):
            if rank:
                drawn[f"{name}_a"] = random(self.num_experts, rank, columns, scale=columns**-0.5)
                drawn[f"{name}_b"] = random(self.num_experts, rows, rank, scale=rank**-0.5)
        return drawn

    def options(self) -> dict:
        return {
            "activation": self.activation,
            "gated": self.gated,
            "interleaved": self.interleaved,
            "transposed": self.transposed,
        }


def plain_activation(h: Tensor, case: Case) -> Tensor:
    if callable(case.activation):
        return case.activation(h)
    up_half = None
    if case.gated:
        gate, up_half = (
            (h[:, ::2], h[:, 1::2]) if case.interleaved else (h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :])
        )
    else:
        gate = h
    if isinstance(case.activation, tm.ClampedSwiGLU):
        limit = case.activation.limit
        gate, up_half = torch.clamp(gate, max=limit), torch.clamp(up_half, -limit, limit)
        return gate * torch.sigmoid(case.activation.alpha * gate) * (up_half + case.activation.up_offset)
    if isinstance(case.activation, tm.SoftcappedSwiGLU):
        gate_cap, up_cap = case.activation.gate_softcap, case.activation.up_softcap
        return torch.tanh(gate / gate_cap) * gate_cap * torch.sigmoid(gate) * torch.tanh(up_half / up_cap) * up_cap
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda g: F.relu(g) ** 2,
    }[case.activation](gate)
    return act if up_half is None else act * up_half


def plain_moe(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """One expert after the other, in the dtype of x."""
    x, ids = inputs["x"], inputs["topk_ids"]
    kept_of_rows, kept_of_pairs = kept_columns(case, row_seeds(case, x))
    out = x * 0
    for e in range(case.num_experts):
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        w1, w2 = inputs["gate_up_proj"][e], inputs["down_proj"][e]
        h = x[tokens] @ (w1 if case.transposed else w1.T)
        if case.bias:
            h = h + inputs["gate_up_bias"][e]
        if case.up_rank:
            kept = x[tokens] * kept_of_rows[tokens].to(x.dtype) / (1 - case.dropout)
            h = h + kept @ inputs["gate_up_a"][e].T @ (SCALES["gate_up_scale"] * inputs["gate_up_b"][e]).T
        a = plain_activation(h, case)
        y = a @ (w2 if case.transposed else w2.T)
        if case.bias:
            y = y + inputs["down_bias"][e]
        if case.down_rank:
            kept = a * kept_of_pairs[tokens, slots].to(a.dtype) / (1 - case.dropout)
            y = y + kept @ inputs["down_a"][e].T @ (SCALES["down_scale"] * inputs["down_b"][e]).T
        out = out.index_add(0, tokens, (y * inputs["topk_weights"][tokens, slots, None]).to(x.dtype))
    return out


def row_seeds(case: Case, x: Tensor) -> Tensor:
    """Return the seeds (T,) of the tokens that the call of run_moe_mlp() draws."""
    torch.manual_seed(SEED)
    drawn = with_row_seeds(CallTensors(x, x, x, PerWeight(x, None, x, None)), case.dropout).row_seeds
    return torch.zeros(len(x), dtype=torch.int32, device=x.device) if drawn is None else drawn


def kept_columns(case: Case, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Return what adapters keep: of every token (T, D) bool, and of the activation of every pair (T, K, F) bool."""
    dropout, num_tokens = AdapterDropout(case.dropout, seeds), len(seeds)
    rows = DroppedRows.like(torch.ones(num_tokens, case.hidden, device=seeds.device))
    dropout.drop_rows(torch.ones_like(rows.values), slice(None), rows)
    all_pairs = reference.group(torch.zeros(num_tokens, case.top_k, dtype=torch.int64, device=seeds.device), 1)
    of_pairs = dropout.dropped_of_pairs(all_pairs, case.intermediate)
    return rows.values != 0, ~of_pairs.view(num_tokens, case.top_k, case.intermediate)


def differentiable(inputs: dict[str, Tensor], only: set[str] | None = None) -> dict[str, Tensor]:
    """Return fresh leaves; all that can, or `only` these, need a gradient."""
    leaves = {}
    for name, value in inputs.items():
        needs = value.is_floating_point() and name != "dout" and (only is None or name in only)
        leaves[name] = value.detach().clone().requires_grad_(needs)
    return leaves


def run_moe_mlp(case: Case, leaves: dict[str, Tensor], **options) -> Tensor:
    arguments = {name: value for name, value in leaves.items() if name != "dout" and name not in FACTORS}
    if case.dropout:
        torch.manual_seed(SEED)
    return tm.moe_mlp(**arguments, **{"adapters": adapters_in(leaves, case.dropout), **case.options(), **options})


def adapters_in(leaves: dict[str, Tensor], dropout: float = 0.0) -> tm.ExpertAdapters | None:
    """Return the adapters whose factors are among `leaves`; None where there are none."""
    factors = {name: leaves[name] for name in FACTORS if name in leaves}
    return tm.ExpertAdapters(**factors, **SCALES, dropout=dropout) if factors else None


def gradients(
    out: Tensor, leaves: dict[str, Tensor], extra: tuple[nn.Parameter, ...] = (), **options
) -> dict[str, Tensor]:
    """Return the output and the gradient of every leaf that needs one, by name."""
    named = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    named |= {f"parameter {i}": p for i, p in enumerate(extra)}
    grads = torch.autograd.grad(out, list(named.values()), leaves["dout"], **options)
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


def exact_and_plain(
    case: Case, inputs: dict[str, Tensor], activation64: nn.Module | None = None, only: set[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the plain loop in fp64 and in the dtype of the inputs."""
    doubled = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    results = []
    for given_inputs, activation in ((doubled, activation64 or case.activation), (inputs, case.activation)):
        leaves = differentiable(given_inputs, only)
        extra = tuple(activation.parameters()) if isinstance(activation, nn.Module) else ()
        results.append(gradients(plain_moe(replace(case, activation=activation), leaves), leaves, extra))
    exact, plain = results
    if isinstance(case.activation, tm.ClampedSwiGLU):
        # A value within a rounding of the limit may fall on either side of it, where its gradient is another.
        for factor in (1 - torch.finfo(inputs["x"].dtype).eps, 1 + torch.finfo(inputs["x"].dtype).eps):
            moved = replace(case.activation, limit=case.activation.limit * factor)
            leaves = differentiable(inputs, only)
            other = gradients(plain_moe(replace(case, activation=moved), leaves), leaves)
            plain = {
                name: max(value, other[name], key=partial(_distance, exact[name])) for name, value in plain.items()
            }
    return exact, plain


def _distance(exact: Tensor, value: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def check(
    case: Case, inputs: dict[str, Tensor], backend: str, only: set[str] | None = None, **options
) -> dict[str, Tensor]:
    """Compare one run with the plain loop; give the run's results."""
    exact, plain = exact_and_plain(case, inputs, only=only)
    leaves = differentiable(inputs, only)
    actual = gradients(run_moe_mlp(case, leaves, backend=backend, **options), leaves)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_close_to_exact(name, value, plain[name], exact[name])
    is_skipped = (inputs["topk_ids"] < 0) | (inputs["topk_ids"] >= case.num_experts)
    if "topk_weights" in actual:
        assert (actual["topk_weights"][is_skipped] == 0).all()
    return actual
