"""`python -m bench.expert_precision`: the noise of experts in an ExpertPrecision, what they cost, what a model learns.

Signal to noise of single products and of a layer, in decibels against fp64; what emulation takes beside bf16, by steps
that take turns; and the losses of a small model of bytes on bundled text, for several seeds, beside a control whose
numbers are rounded to e4m3 without scales. A loss shows mistakes, not formats that are too coarse: decibels are the
measure.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tritonmoe as tm
from tritonmoe.config import precision as grid
from tritonmoe.ops.backends import rounded as operations
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import output_file, positive
from tritonmoe.tools.benchmarks.timing import interleave, ratio, summarize, write_json
from tritonmoe.tools.demo import load_shakespeare

PRECISIONS = {
    f"{form}, gradients of weights in {weights}": tm.ExpertPrecision(form, weights)
    for form in ("fp8_block", "mxfp8")
    for weights in ("bf16", "fp8")
}
CONTROL = "control: e4m3 without scales"
COST_SHAPES = ((4096, 256, 512, 8, 2), (1024, 512, 1024, 8, 2), (2048, 1024, 512, 16, 4))
WIDTH, INNER, BYTES, BATCH, LAST = 64, 64, 8, 1024, 50


def decibels(value: Tensor, exact: Tensor) -> float:
    """Return the signal to noise of a value."""
    noise = (value.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def inputs(kind: str, num_rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Return rows (num_rows, width) bf16: normal, or with a few wide columns and rows of very different sizes."""
    rows = torch.randn(num_rows, width, generator=generator)
    if kind == "outliers":
        rows[:, torch.randperm(width, generator=generator)[: width // 128]] *= 30
        rows *= torch.exp(0.5 * torch.randn(num_rows, 1, generator=generator))
    return rows.bfloat16()


def product_noise(precision: tm.ExpertPrecision, kind: str) -> dict[str, float]:
    """Return the decibels of the three products of one expert and its weight."""
    generator = torch.Generator().manual_seed(0)
    x, dout = inputs(kind, 517, 1024, generator), inputs(kind, 517, 768, generator) * 1e-4
    weight = (torch.randn(768, 1024, generator=generator) / 32).bfloat16()
    of_rows, of_gradients = (operations.rounded_weight(weight[None], precision, depth)[0].double() for depth in (2, 1))
    x_rounded, dout_rounded = (grid.rounded_rows(rows, precision) for rows in (x, dout))
    along_tokens = (precision.block, 1)

    def tokens(rows: Tensor) -> Tensor:
        return grid.rounded(rows, along_tokens) if precision.weight_gradients == "fp8" else rows

    weight_gradient = tokens(dout_rounded).double().T @ tokens(x_rounded).double()
    return {
        "out": decibels(x_rounded.double() @ of_rows.T, x.double() @ weight.double().T),
        "dx": decibels(dout_rounded.double() @ of_gradients, dout.double() @ weight.double()),
        "dweight": decibels(weight_gradient, dout.double().T @ x.double()),
    }


def layer_noise(precision: tm.ExpertPrecision | None, kind: str) -> dict[str, float]:
    """Return the decibels of a gated layer's output and gradients; None: of the layer in bf16."""
    num_tokens, width, inner, num_experts, top_k = 512, 512, 384, 8, 2
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": inputs(kind, num_tokens, width, generator),
        "gate_up_proj": (torch.randn(num_experts, 2 * inner, width, generator=generator) / width**0.5).bfloat16(),
        "down_proj": (torch.randn(num_experts, width, inner, generator=generator) / inner**0.5).bfloat16(),
    }
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    weights, dout = torch.rand(num_tokens, top_k, generator=generator), inputs(kind, num_tokens, width, generator)

    def step(dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        out = tm.moe_mlp(
            topk_ids=ids, topk_weights=weights.to(torch.promote_types(dtype, torch.float32)), **leaves, **options
        )
        out.backward(dout.to(dtype))
        return {
            "out": out.detach(),
            **{f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None},
        }

    exact = step(torch.float64, backend="reference")
    return {name: decibels(value, exact[name]) for name, value in step(torch.bfloat16, precision=precision).items()}


class Model(nn.Module):
    """Predicts a byte from the BYTES before it; two layers of experts follow one convolution."""

    def __init__(self, precision: tm.ExpertPrecision | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, BYTES)
        config = tm.MoEConfig(WIDTH, INNER, 8, 2, load_balance_loss_weight=0.01, expert_precision=precision)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.layers = nn.ModuleList(tm.MoELayer(config) for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Return the loss of bytes (N, BYTES + 1) in nats a byte, and the auxiliary losses."""
        x = self.mix(self.embedding(text[:, :BYTES]).mT)[..., 0]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return F.cross_entropy(self.head(x).float(), text[:, BYTES])


def without_scales(matrix: Tensor, block: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Return a matrix rounded to e4m3 as it is."""
    codes = matrix.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.to(matrix.dtype) if out is None else out.copy_(codes)


def cost(shape: tuple[int, ...], rounds: int) -> Json:
    """Return what a layer's forward and backward take in bf16 and in each precision, by steps that take turns."""
    num_tokens, width, inner, num_experts, top_k = shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, generator=generator)
    x, *parameters = (
        (torch.randn(*size, generator=generator) / 32).bfloat16().requires_grad_()
        for size in ((num_tokens, width), (num_experts, 2 * inner, width), (num_experts, width, inner))
    )

    def step(precision: tm.ExpertPrecision | None) -> None:
        y = tm.moe_mlp(x, ids, weights, *parameters, precision=precision)
        torch.autograd.grad(y, (x, *parameters), y.detach())

    runs = {name: partial(step, precision) for name, precision in {"bf16": None, **PRECISIONS}.items()}
    return {name: summarize(seconds) for name, seconds in interleave(runs, rounds).items()}


def train(name: str, seed: int, num_steps: int) -> dict[str, float]:
    """Return the mean loss of the last steps of a training, and the loss held out."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if name == CONTROL:
        grid.rounded = operations.rounded = without_scales  # in this process, which has trained the others before
    text, model = (
        load_shakespeare(),
        Model(tm.ExpertPrecision("mxfp8", "fp8") if name == CONTROL else PRECISIONS.get(name)),
    )
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(seed)
    window, losses = torch.arange(BYTES + 1), []
    for _ in range(num_steps):
        first = torch.randint(text.training.numel() - BYTES, (BATCH, 1), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(text.training[first + window].long())
        layers = (one for one in model.modules() if isinstance(one, tm.MoELayer))
        torch.stack([loss, *(one for layer in layers if (one := layer.aux_loss) is not None)]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        held_out = text.held_out[: 2**15 + BYTES].unfold(0, BYTES + 1, 1).long()
        held_out_loss = fmean(float(model(part)) for part in held_out.split(2**13))
    return {"training": fmean(losses[-LAST:]), "held_out": held_out_loss}


def measure(num_seeds: int, num_steps: int) -> Json:
    """Return everything that this command prints."""
    kinds = ("normal", "outliers")
    noise: Callable[..., Json] = lambda of: {  # noqa: E731
        name: {kind: of(one, kind) for kind in kinds} for name, one in PRECISIONS.items()
    }
    names = ["bf16", *PRECISIONS, CONTROL]
    cases = [(name, seed, num_steps) for name in names for seed in range(num_seeds)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        losses = list(pool.map(train, *zip(*cases, strict=True)))
    return {
        "products": noise(product_noise),
        "layer": {"bf16": {kind: layer_noise(None, kind) for kind in kinds}, **noise(layer_noise)},
        "losses": {name: [one for (of, *_), one in zip(cases, losses, strict=True) if of == name] for name in names},
        "steps": num_steps,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.expert_precision", description=__doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="trainings of each kind (default 3)")
    parser.add_argument("--steps", type=positive, default=300, help="of each training (default 300)")
    parser.add_argument("--rounds", type=positive, default=15, help="of steps that take turns (default 15)")
    parser.add_argument("--json", type=output_file, help="also write all figures to this file")
    arguments = parser.parse_args()
    costs = {"T={}, D={}, F={}, E={}, K={}".format(*shape): cost(shape, arguments.rounds) for shape in COST_SHAPES}
    found = {"cost": costs, **measure(arguments.seeds, arguments.steps)}
    for shape, times in costs.items():
        for name, one in times.items():
            print(f"cost, {shape}: {name} {one['median_ms']:.0f} ms, {ratio(one, times['bf16'], 2)} times bf16's")
    for part in ("products", "layer"):
        for name, of in found[part].items():
            for kind, values in of.items():
                print(f"{part}, {name}, {kind}: " + ", ".join(f"{key} {value:.1f} dB" for key, value in values.items()))
    for name, losses in found["losses"].items():
        gaps = [
            [one[key] - plain[key] for one, plain in zip(losses, found["losses"]["bf16"], strict=True)]
            for key in ("training", "held_out")
        ]
        print(
            f"{name}: loss held out {fmean(one['held_out'] for one in losses):.4f}; less that of bf16 by seed: "
            f"{', '.join(f'{gap:+.4f}' for gap in gaps[1])}; in training {', '.join(f'{gap:+.4f}' for gap in gaps[0])}"
        )
    write_json(arguments.json, "expert_precision", found)


if __name__ == "__main__":
    main()
