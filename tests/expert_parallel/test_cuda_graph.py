"""CUDA graphs of one device: a step replays on other tokens, another routing and gradient, with the bits of eager.

Expert-parallel calls are captured in test_capacity.py.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import tritonmoe as tm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 256, 128, 12, 3


def tensors(num_tokens: int, seed: int) -> dict[str, Tensor]:
    """Return x (T, D), topk_ids (T, K), topk_weights (T, K) and dout (T, D); some pairs are skipped."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    return {
        "x": random(num_tokens, HIDDEN).bfloat16(),
        "topk_ids": torch.randint(-1, NUM_EXPERTS, (num_tokens, TOP_K), generator=generator, device="cuda"),
        "topk_weights": random(num_tokens, TOP_K),
        "dout": random(num_tokens, HIDDEN).bfloat16(),
    }


def expert_weights() -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {
        "gate_up_proj": (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        "down_proj": (NUM_EXPERTS, HIDDEN, INTERMEDIATE),
        "gate_up_bias": (NUM_EXPERTS, 2 * INTERMEDIATE),
        "down_bias": (NUM_EXPERTS, HIDDEN),
    }
    return {
        name: (0.1 * torch.randn(*shape, generator=generator, device="cuda")).bfloat16().requires_grad_()
        for name, shape in shapes.items()
    }


def captured(step: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """Compile what `step` launches, then record it; give the graph and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def check_replays(static: dict[str, Tensor], step: Callable[[], Sequence[Tensor]]) -> None:
    graph, results = captured(step)
    for seed in (1, 2):
        for name, value in tensors(len(static["dout"]), seed).items():
            if name in static:
                static[name].data.copy_(value)
        for result in results:
            result.data.fill_(torch.nan)
        graph.replay()
        replayed = [result.clone() for result in results]
        for number, (one, other) in enumerate(zip(replayed, step(), strict=True)):
            assert torch.equal(one, other), (seed, number)


@pytest.mark.parametrize("num_tokens", [1, 8, 3000])
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_forward_and_backward_of_moe_mlp(num_tokens: int, save: str) -> None:
    """Grouping in one launch and in three; T from decoding to training."""
    static, weights = tensors(num_tokens, 0), expert_weights()
    inputs = [static["x"].requires_grad_(), static["topk_weights"].requires_grad_(), *weights.values()]

    def step() -> list[Tensor]:
        y = tm.moe_mlp(static["x"], static["topk_ids"], static["topk_weights"], **weights, backend="triton", save=save)
        return [y, *torch.autograd.grad(y, inputs, static["dout"])]

    check_replays(static, step)


def test_a_layer_on_one_device() -> None:
    """The router and its flag for non-finite scores as well."""
    config = tm.MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, load_balance_loss_weight=0.01)
    layer = tm.MoELayer(config, device="cuda", dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    static = {name: value for name, value in tensors(500, 0).items() if name in ("x", "dout")}
    inputs = [static["x"].requires_grad_(), *layer.parameters()]

    def step() -> list[Tensor]:
        y = layer(static["x"])
        grads = torch.autograd.grad([y, layer.aux_loss], inputs, [static["dout"], torch.ones_like(layer.aux_loss)])
        return [y, *grads]

    check_replays(static, step)
