"""Whole layers with options drawn at random, several at once, over ranks: outputs and gradients are one device's."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.transports import Transport

FIRST_TIER, SECOND_TIER = 4, 60
"""How many layers are drawn in each."""
KINDS = ("chunks", "auto", "experts", "capacity", "balance", "budget")
"""What of the overlap is drawn."""
EXACT, ROUNDED = 3e-5, 4e-2
"""The largest relative error in fp64, where the router stays in fp32, and in bf16."""


class Drawn:
    """Some layers one behind the other, the tokens of every rank, and how they are called."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.num_ranks = draw.choice((1, 2, 2, 3, 4))
        is_narrow = draw.random() < 0.35
        self.dtype = torch.bfloat16 if is_narrow else torch.float64
        num_experts = self.num_ranks * draw.choice((2, 3, 4))
        gated, scores = draw.random() < 0.8, draw.choice(("softmax", "sigmoid", "sqrtsoftplus"))
        self.config: dict[str, Any] = {
            "hidden_size": draw.choice((32, 48, 64, 96)),
            "intermediate_size": draw.choice((16, 32, 48)),
            "num_experts": num_experts,
            "top_k": draw.randint(2, min(num_experts, 6)),
            "activation": draw.choice(("silu", "gelu", "gelu_tanh", "relu")),
            "gated": gated,
            "interleaved": gated and draw.random() < 0.3,
            "transposed": draw.random() < 0.3,
            "bias": draw.random() < 0.3,
            "score_function": scores,
            "renormalize": draw.random() < 0.6,
            "routed_scaling_factor": draw.choice((1.0, 2.5)),
            "selection_bias": scores != "softmax" and draw.random() < 0.5,
            "shared_intermediate_size": draw.choice((0, 16)),
            "load_balance_loss_weight": draw.choice((0.0, 0.01)),
            "z_loss_weight": draw.choice((0.0, 0.001)),
        }
        if is_narrow and draw.random() < 0.6:
            self.config["expert_precision"] = tm.ExpertPrecision(draw.choice(("fp8_block", "mxfp8")))
        kinds = KINDS[:-1] if "expert_precision" in self.config else KINDS  # a budget doesn't know a precision
        self.overlap = self._overlap(draw, draw.choice(kinds))
        self.num_tokens = [draw.choice((0, 1, 7, 33, 64)) for _ in range(self.num_ranks - 1)] + [33]
        # Of several layers in bf16 a near-tie of the second may go to other experts.
        self.num_layers = 1 if is_narrow else draw.choice((1, 2, 3))
        self.num_steps = draw.choice((1, 2, 3))
        self.is_hot, self.is_masked, self.is_frozen = (draw.random() < share for share in (0.4, 0.3, 0.15))
        self.recomputes = draw.random() < 0.25

    def _overlap(self, draw: random.Random, kind: str) -> tm.OverlapConfig:
        both = {"local_first": draw.random() < 0.7, "serial": draw.random() < 0.15}
        if kind == "auto":
            return tm.OverlapConfig(**both)
        if kind == "budget":
            return tm.OverlapConfig(**both, memory_budget_bytes=int(10 ** draw.uniform(3.5, 7)))
        chosen: dict[str, Any] = {
            "chunks": {"shape": draw.choice(("equal", "ramp"))},
            "experts": {"chunk_by": "experts"},
            "capacity": {"capacity": draw.choice((0.3, 1.0, 2.0))},
            "balance": {"balance": draw.choice(("auto", "always"))},
        }[kind]
        return tm.OverlapConfig(draw.choice((1, 2, 3, 5)), **both, **chosen)

    def layers(self, transport: Transport | None) -> nn.ModuleList:
        generator = torch.Generator().manual_seed(5)
        config = tm.MoEConfig(**self.config)
        layers = [
            tm.MoELayer(
                config,
                transport,
                None if transport is None else self.overlap,
                expert_gradients="sum",
                backend="reference" if transport is None else "torch",
                generator=generator,
                dtype=self.dtype,
            )
            for _ in range(self.num_layers)
        ]
        for layer in layers:
            layer.experts.requires_grad_(not self.is_frozen)
            if self.is_hot:
                layer.router.weight.data[0] *= 4
        return nn.ModuleList(layers)

    def step(self, layers: nn.ModuleList, rank: int, number: int) -> list[Tensor]:
        """Return the output and the gradient of x of one rank's tokens; gradients of parameters are added up."""
        generator = torch.Generator().manual_seed(100 * number + rank)
        count, width = self.num_tokens[rank], self.config["hidden_size"]
        x, dout = (torch.randn(count, width, generator=generator).to(self.dtype) for _ in range(2))
        mask = torch.rand(count, generator=generator) < 0.7 if self.is_masked else None
        x.requires_grad_()
        y, aux_loss = x, torch.zeros(())
        for layer in layers:
            if self.recomputes:
                y = y + checkpoint(layer, y, token_mask=mask, use_reentrant=False)
            else:
                y = y + layer(y, token_mask=mask)
            aux_loss = aux_loss + layer.aux_loss
        ((y.double() * dout.double()).sum() + aux_loss).backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    def on_rank(self, transport: Transport) -> tuple[list[list[Tensor]], dict[str, Tensor | None]]:
        layers = self.layers(transport)
        steps = [self.step(layers, transport.rank, number) for number in range(self.num_steps)]
        return steps, {name: parameter.grad for name, parameter in layers.named_parameters()}

    def on_one_device(self) -> tuple[list[list[list[Tensor]]], dict[str, Tensor | None]]:
        layers = self.layers(None)
        steps = [[self.step(layers, rank, of) for rank in range(self.num_ranks)] for of in range(self.num_steps)]
        return steps, {name: parameter.grad for name, parameter in layers.named_parameters()}


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize(
    "seed", [*range(FIRST_TIER), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(FIRST_TIER, SECOND_TIER))]
)
def test_several_options_at_once(seed: int) -> None:
    drawn = Drawn(seed)
    found = tm.run_on_emulated_ranks(drawn.on_rank, drawn.num_ranks, timeout_s=60)
    steps, grads = drawn.on_one_device()
    errors = {
        f"{name}, step {number}, rank {rank}": error(one, other)
        for number, by_rank in enumerate(steps)
        for rank, expected in enumerate(by_rank)
        for name, one, other in zip(("out", "dx"), found[rank][0][number], expected, strict=True)
    }
    for name, grad in grads.items():
        own = [of_rank[1][name] for of_rank in found]
        if grad is None:
            assert not any(one is not None and bool(one.any()) for one in own), name
            continue
        parts = [one.to_local() if hasattr(one, "to_local") else one for one in own if one is not None]
        errors[name] = error(torch.cat(parts) if ".experts." in name else torch.stack(parts).double().sum(0), grad)
    largest = ROUNDED if drawn.dtype == torch.bfloat16 else EXACT
    assert {name: value for name, value in errors.items() if not value < largest} == {}, (drawn.config, drawn.overlap)
