"""Whether the kernels are right in the very tiles that are measured: fp64 on samples, and bit-equal reruns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.workbench import Workbench
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.ops.backends import choose
from tritonmoe.ops.backends.kernel_check import CASES, SMALL_CASES, check_layer, distances
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.routing.router_check import ROUTERS, SMALL_ROUTERS, check_router
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.shapes import LayerInputs

__all__ = ["check_samples", "check_small_layers", "rerun"]

MOST_FP64_BYTES = 16e9
"""So much may the weights of the sampled experts take in fp64."""
MOST_TOKENS = 64
Values = dict[str, Tensor]


def entries_for_all(bench: Workbench, inputs: LayerInputs, fields: dict[str, int | str]) -> measured_tiles.Entries:
    """Return measured tiles that replace these fields of the table's for every product of a layer."""
    with measured_tiles.using({}), measured_tiles.asked() as asked:
        _step(inputs, "triton")
    return dict.fromkeys(asked, fields)


def _step(inputs: LayerInputs, backend: str) -> Values:
    """Return y and every gradient of a layer's forward and backward."""
    leaves = inputs.leaves
    y = moe_mlp(inputs.x, inputs.topk_ids, inputs.topk_weights, **inputs.arguments, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dout)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check_samples(bench: Workbench, shape: str, num_tokens: int, routing: str, tiles: dict[str, int | str]) -> Json:
    """Compare y, dx and dtopk_weights of sampled tokens, and the weights' gradients of sampled experts, with fp64.

    Allowed is twice the error of plain PyTorch in the same dtype on the same samples, and a small floor.
    """
    inputs = bench.inputs(shape, num_tokens, routing)
    with measured_tiles.using(entries_for_all(bench, inputs, tiles)), measured_tiles.asked() as used:
        ours = _step(inputs, "triton")
    errors: dict[str, Json] = {}
    tokens = _sampled_tokens(inputs)
    _compare(errors, _rows(ours, tokens), _TokenSample(inputs, tokens), "")
    for name, expert in _sampled_experts(inputs).items():
        found = {key: value[expert : expert + 1] for key, value in ours.items() if key[1:] in inputs.weights}
        _compare(errors, found, _ExpertSample(inputs, expert), f" of the {name} expert")
    return {
        "tiles": {key: str(config) for key, config in used.items()},
        "sampled_tokens": len(tokens),
        "errors": errors,
        "passed": all(error["passed"] for error in errors.values()),
    }


def _compare(errors: dict[str, Json], found: Values, sample: "_TokenSample | _ExpertSample", suffix: str) -> None:
    dtype = next(iter(found.values())).dtype
    exact, plain = sample.values(torch.float64), sample.values(dtype)
    for name, right in exact.items():
        measured = distances(found[name], plain[name], right, dtype)
        errors[f"{name}{suffix}"] = {
            **{measure: distance._asdict() for measure, distance in measured.items()},
            "passed": all(distance.is_small for distance in measured.values()),
        }


def _sampled_tokens(inputs: LayerInputs) -> Tensor:
    """Return ids of tokens from the first to the last, as many as the weights of their experts in fp64 allow."""
    shape, num_tokens = inputs.shape, len(inputs.x)
    bytes_per_token = shape.top_k * 8 * shape.num_parameters / shape.num_experts
    count = max(1, min(num_tokens, MOST_TOKENS, int(MOST_FP64_BYTES / bytes_per_token)))
    return torch.linspace(0, num_tokens - 1, count, device=inputs.x.device).long()


def _sampled_experts(inputs: LayerInputs) -> dict[str, int]:
    load = torch.bincount(inputs.topk_ids.flatten(), minlength=inputs.shape.num_experts)
    order = load.argsort(descending=True, stable=True).tolist()
    return {"busiest": order[0], "middle": order[len(order) // 2], "idlest": order[-1]}


def _rows(values: Values, tokens: Tensor) -> Values:
    return {name: values[name][tokens] for name in ("y", "dx", "dtopk_weights")}


@dataclass
class _TokenSample:
    """Some tokens of a layer with the experts they need: y and the tokens' gradients are those of the whole batch."""

    inputs: LayerInputs
    tokens: Tensor

    def values(self, dtype: torch.dtype) -> Values:
        inputs, tokens = self.inputs, self.tokens
        experts, ids = inputs.topk_ids[tokens].unique(return_inverse=True)
        weights = {name: weight.detach()[experts].to(dtype) for name, weight in inputs.weights.items()}
        x = inputs.x.detach()[tokens].to(dtype).requires_grad_()
        gates = inputs.topk_weights.detach()[tokens]
        gates = gates.to(torch.promote_types(gates.dtype, dtype)).requires_grad_()
        y = moe_mlp(x, ids, gates, **{**inputs.arguments, **weights}, backend="reference")
        dx, dgates = torch.autograd.grad(y, (x, gates), inputs.dout[tokens].to(dtype))
        return {"y": y.detach(), "dx": dx, "dtopk_weights": dgates}


@dataclass
class _ExpertSample:
    """All pairs of one expert: its weights' gradients are those of the whole batch."""

    inputs: LayerInputs
    expert: int

    def values(self, dtype: torch.dtype) -> Values:
        inputs = self.inputs
        is_here = inputs.topk_ids == self.expert
        tokens = is_here.any(1).nonzero()[:, 0]
        ids = torch.where(is_here[tokens], 0, -1)
        weights = {
            name: weight.detach()[self.expert : self.expert + 1].to(dtype).requires_grad_()
            for name, weight in inputs.weights.items()
        }
        x, gates = inputs.x.detach()[tokens].to(dtype), inputs.topk_weights.detach()[tokens]
        gates = gates.to(torch.promote_types(gates.dtype, dtype))
        y = moe_mlp(x, ids, gates, **{**inputs.arguments, **weights}, backend="reference")
        grads = torch.autograd.grad(y, list(weights.values()), inputs.dout[tokens].to(dtype))
        return {f"d{name}": grad for name, grad in zip(weights, grads, strict=True)}


def rerun(bench: Workbench, shape: str, num_tokens: int, routing: str, tiles: dict[str, int | str]) -> Json:
    """Compute a step again and again, and compare the bits of every result with the first run's in the table's tiles.

    A copy that is not there yet when it is multiplied shows here, if anywhere.
    """
    inputs = bench.inputs(shape, num_tokens, routing)
    entries = entries_for_all(bench, inputs, tiles)
    with measured_tiles.using({}):
        first = _step(inputs, "triton")
    different: dict[str, int] = {}
    with measured_tiles.using(entries):
        for _ in range(bench.setting.reruns):
            for name, value in _step(inputs, "triton").items():
                if not torch.equal(_bits(value), _bits(first[name])):
                    different[name] = different.get(name, 0) + 1
    return {"reruns": bench.setting.reruns, "different": different, "passed": not different}


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)


def check_small_layers(bench: Workbench) -> Json:
    """Compare every operation of small layers, in all layouts and dtypes, and routers, as `tritonmoe check` does."""
    device = bench.setting.device
    layers = SMALL_CASES[:1] if bench.setting.is_rehearsal else CASES
    found = [one for layer in layers for one in check_layer(layer, choose("triton", device, layer.dtype), device)]
    routers = SMALL_ROUTERS[:1] if bench.setting.is_rehearsal else ROUTERS
    found += [one for router in routers for one in check_router(router, device)]
    wrong = [f"{one.layer}, {one}" for one in found if not one.is_right]
    return {"results": len(found), "errors": wrong, "passed": not wrong}
