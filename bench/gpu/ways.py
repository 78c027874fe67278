"""A layer as jobs run it: other options, adapters, a main_grad, few tokens, multiprocessors that others hold."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn

from bench.gpu.checks import entries_for_all
from bench.gpu.layers import OURS, UNCAPTURED, experts, others_of, step_of
from bench.gpu.multiprocessors import Holder
from bench.gpu.peers import Function
from bench.gpu.workbench import Call, Workbench, times_of, with_entries
from tritonmoe.experts import spec
from tritonmoe.experts.adapters import ExpertAdapters
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.device_time import TimedCalls, graph_pool
from tritonmoe.tools.benchmarks.shapes import LayerInputs, draw_routing

__all__ = ["measure_beside", "measure_few", "measure_ways"]

WAYS: dict[str, dict[str, object]] = {
    "hidden recomputed": {"save": "input"},
    "batch invariant": {"batch_invariant": True},
}
"""Options of moe_mlp with which its steps are timed too."""
RANK = 16
"""Of the adapters with which frozen experts are timed."""
ONE_TILE: dict[str, int | str] = {"persistent": False}
BESIDE_OTHER_RANKS = "runs of a few tiles, as beside other ranks"
NUM_SETS = 4
"""So many layers take turns where tokens are few: what one has left in the L2 cache the others have replaced."""


def measure_ways(bench: Workbench, shape: str, num_tokens: int, routing: str) -> Json:
    """Time a forward and backward as it is, with runs of a few tiles, with one tile a program, and with WAYS.

    Weights with a main_grad come next, adapters on frozen experts last.
    """
    inputs = bench.inputs(shape, num_tokens, routing)
    backend = bench.setting.layer_backend
    variants = {OURS: step_of(inputs, experts(bench, inputs, {}), True)}
    variants[BESIDE_OTHER_RANKS] = step_of(inputs, _beside_other_ranks(experts(bench, inputs, {})), True)
    one_tile = entries_for_all(bench, inputs, ONE_TILE)
    variants["one tile a program"] = step_of(inputs, experts(bench, inputs, one_tile), True)
    for name, options in WAYS.items():
        if name != "batch invariant" or backend == "triton":
            variants[name] = step_of(inputs, experts(bench, inputs, {}, **options), True)
    variants["into a main_grad"] = with_entries(_adding_step(inputs, backend), {})
    variants[f"adapters of rank {RANK}"] = with_entries(_adapted_step(inputs, backend), {})
    return bench.time(variants, OURS)


def _beside_other_ranks(function: Function) -> Function:
    """Return a function that runs as if torch.distributed had other ranks."""

    def run() -> Tensor:
        with mock.patch.object(spec, "has_other_ranks", return_value=True):
            return function()

    return run


def _adding_step(inputs: LayerInputs, backend: str) -> Call:
    """Return a step whose weight gradients are added in fp32 to what is there, as Megatron's and DeepSpeed's are."""
    weights = {name: nn.Parameter(weight.detach()) for name, weight in inputs.weights.items()}
    for weight in weights.values():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    leaves = (inputs.x, inputs.topk_weights, *weights.values())

    def run() -> None:
        x, ids, gates = inputs.x, inputs.topk_ids, inputs.topk_weights
        y = moe_mlp(x, ids, gates, **{**inputs.arguments, **weights}, backend=backend)
        torch.autograd.grad(y, leaves, inputs.dout, allow_unused=True)  # a weight's own gradient is None

    return run


def _adapted_step(inputs: LayerInputs, backend: str) -> Call:
    """Return a step of frozen experts with adapters, whose gradients and x's are all that is computed."""
    generator = torch.Generator(inputs.x.device).manual_seed(0)
    layout, weights = inputs.arguments, inputs.weights
    transposed = bool(layout.get("transposed"))

    def factor(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=inputs.x.device) * 0.02
        return drawn.to(inputs.x.dtype).requires_grad_()

    def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
        out_axis, in_axis = (2, 1) if transposed else (1, 2)
        num_experts = weight.shape[0]
        return factor(num_experts, RANK, weight.shape[in_axis]), factor(num_experts, weight.shape[out_axis], RANK)

    (up_a, up_b), (down_a, down_b) = factors(weights["gate_up_proj"]), factors(weights["down_proj"])
    adapters = ExpertAdapters(up_a, up_b, down_a, down_b)
    frozen = {name: weight.detach() for name, weight in weights.items()}

    def run() -> None:
        ids, gates = inputs.topk_ids, inputs.topk_weights
        y = moe_mlp(inputs.x, ids, gates, **{**layout, **frozen}, adapters=adapters, backend=backend)
        torch.autograd.grad(y, (inputs.x, up_a, up_b, down_a, down_b), inputs.dout)

    return run


def measure_few(bench: Workbench, shape: str, num_tokens: int) -> Json:
    """Time a forward of few tokens in NUM_SETS layers in turn, each with weights and a routing of its own, and peers.

    Every layer's weights come from the device's memory, as they do in a model; "the same weights" are ours of one layer
    again and again, whose weights may stay in the cache.
    """
    inputs = bench.inputs(shape, num_tokens, "uniform")
    layers = [inputs, *(_other_layer(inputs, number) for number in range(1, NUM_SETS))]
    ours = [experts(bench, layer, {}) for layer in layers]
    variants = {OURS: _in_turn(layers, ours)}
    variants["the same weights"] = step_of(inputs, ours[0], False)
    found, reasons = zip(*(others_of(bench, layer) for layer in layers), strict=True)
    for name in found[0]:
        variants[name] = _in_turn(layers, [functions[name] for functions in found])
    times = bench.time(variants, OURS, UNCAPTURED)
    times["left_out"] |= reasons[0]
    return times


def _other_layer(inputs: LayerInputs, number: int) -> LayerInputs:
    """Return a layer of the same sizes with weights at other addresses, and another routing."""
    shape, generator = inputs.shape, torch.Generator(inputs.x.device).manual_seed(number)
    ids, gates = draw_routing(len(inputs.x), shape.num_experts, shape.top_k, "uniform", generator)
    weights = {name: nn.Parameter(weight.detach().roll(number, 0)) for name, weight in inputs.weights.items()}
    return replace(inputs, topk_ids=ids, topk_weights=gates.requires_grad_(), weights=weights)


def _in_turn(layers: Sequence[LayerInputs], functions: Sequence[Function]) -> Call:
    """Return a call that runs the next layer's forward, and behind the last one the first."""
    calls = itertools.cycle([step_of(layer, run, False) for layer, run in zip(layers, functions, strict=True)])
    return lambda: next(calls)()


def measure_beside(bench: Workbench, shape: str, num_tokens: int, routing: str, held: Sequence[int]) -> Json:
    """Time a forward and backward beside a kernel that holds so many multiprocessors, as an exchange's kernel does.

    Timed are persistent kernels for all multiprocessors, the same for those that are free (num_sms), runs of a few
    tiles, and one tile a program, each beside every number of `held`, in the same rounds.

    Returns:
        "times" by "WAY, N held".
    """
    inputs, setting = bench.inputs(shape, num_tokens, routing), bench.setting
    if setting.device.type == "cuda" and torch.version.hip is not None:
        return {"left_out": "the kernel that holds multiprocessors is written for NVIDIA's GPUs"}
    holder, pool = Holder(setting.device), graph_pool(setting.device)
    one_tile = entries_for_all(bench, inputs, ONE_TILE)
    ways = {
        "all multiprocessors": experts(bench, inputs, {}),
        BESIDE_OTHER_RANKS: _beside_other_ranks(experts(bench, inputs, {})),
        "one tile a program": experts(bench, inputs, one_tile),
    }
    calls: dict[str, tuple[TimedCalls, int]] = {}
    left_out: dict[str, str] = {}
    for num_held in held:
        functions = dict(ways)
        if setting.layer_backend == "triton" and num_held > 0:
            free = holder.num_multiprocessors - num_held
            functions["the free multiprocessors"] = experts(bench, inputs, {}, num_sms=free)
        for way, function in functions.items():
            name = f"{way}, {num_held} held"
            try:
                timed = TimedCalls(step_of(inputs, function, True), setting.device, 0.0, pool)
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            calls[name] = timed, num_held
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(setting.rounds):
        for name, (timed, num_held) in calls.items():
            samples[name].append(holder.seconds_beside(timed.seconds, num_held))
    times = {name: times_of(seconds, calls[name][0].way) for name, seconds in samples.items()}
    return {"times": times, "left_out": left_out, "shared_bytes": holder.shared_bytes}
