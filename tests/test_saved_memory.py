"""What a layer call keeps for backward: x, h, and a few small integers per pair."""

import gc

import pytest
import torch
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.transports import LocalTransport

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 128, 24, 20, 5, 3


def live_tensors() -> list[Tensor]:
    """Give every tensor that has memory (a tracer's fake ones, which other tests may have left, have none)."""
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]


def kept_bytes(call, weights: tuple[Tensor, ...]) -> int:
    """Count the memory that stays because of call(): what autograd saves, and every new tensor however it is held.

    The weights, which are there anyway, and the output are not counted; x is.
    """
    gc.collect()
    before = {tensor.untyped_storage().data_ptr() for tensor in live_tensors()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    gc.collect()
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    for tensor in live_tensors():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()
    for tensor in (out, *weights):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    out.sum().backward()  # it was enough
    return sum(kept.values())


@pytest.mark.parametrize("parallel", [False, True], ids=["one_device", "expert_parallel"])
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_saved_bytes_per_token(backend: str, save: str, parallel: bool) -> None:
    """At most 2D + 4KF + 24K bytes per token in bf16; without the 4KF when h is computed again."""
    if torch.cuda.is_available():
        pytest.skip("counts the CPU's memory: the GPU's backend is the same code")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).requires_grad_()

    x, topk_weights = random(NUM_TOKENS, HIDDEN), torch.rand(NUM_TOKENS, TOP_K, generator=generator).requires_grad_()
    ids = torch.randint(NUM_EXPERTS, (NUM_TOKENS, TOP_K), generator=generator)
    weights = (random(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN), random(NUM_EXPERTS, HIDDEN, INTERMEDIATE))

    def call() -> Tensor:
        if parallel:
            return tm.expert_parallel_mlp(
                x,
                ids,
                topk_weights,
                *weights,
                num_experts=NUM_EXPERTS,
                transport=LocalTransport(),
                overlap=tm.OverlapConfig(num_chunks=1),
                backend=backend,
                save=save,
            )
        return tm.moe_mlp(x, ids, topk_weights, *weights, backend=backend, save=save)

    call().sum().backward()  # what is kept for good is there from the first call on
    num_bytes = kept_bytes(call, weights) / NUM_TOKENS
    must = 2 * HIDDEN + (4 * TOP_K * INTERMEDIATE if save == "hidden" else 0)
    assert must <= num_bytes <= must + 24 * TOP_K, f"{num_bytes} bytes per token"
