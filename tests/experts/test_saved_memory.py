"""What a layer call keeps for backward: x, h, and a few small integers per pair."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.expert_parallel.whole_call import saved_forward
from tritonmoe.transports import LocalTransport, Transport, TwoLevelTransport

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 128, 24, 20, 5, 3


@pytest.fixture(autouse=True)
def only_own_objects_are_looked_through() -> None:
    """What was there before a test is no part of what it counts."""
    gc.collect()
    gc.freeze()


def live_tensors() -> list[Tensor]:
    """Return every tensor that has memory (fake and sparse ones, which other tests may have left, have none)."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


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


@pytest.mark.sweep(2)
@pytest.mark.parametrize("parallel", [False, True], ids=["one_device", "expert_parallel"])
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.thorough)])
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


both_routings = pytest.mark.parametrize("spread", [True, False], ids=["any_experts", "experts_of_one_rank"])


@pytest.mark.sweep(2)
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize(
    "overlap",
    [
        tm.OverlapPlan(),
        tm.OverlapPlan((1, 1, 1), local_first=False),
        tm.OverlapPlan((1, 1, 1), wire_dtype=torch.float8_e4m3fn),
        tm.OverlapPlan((1, 1), chunk_by="experts"),
        tm.OverlapPlan((1, 1, 1, 1), local_first=False, chunk_by="experts"),
        tm.OverlapPlan((1,) * 8, chunk_by="experts"),
        tm.OverlapPlan((1, 1, 1), capacity=1.0),
    ],
    ids=str,
)
@both_routings
@pytest.mark.parametrize("size", [2, 4, 8])
def test_saved_bytes_per_received_row(size: int, spread: bool, overlap: tm.OverlapPlan, top_k: int) -> None:
    """The same where rows travel, both ends' indices counted: at most 24K bytes for every received row."""
    check_received_rows(size, spread, overlap, top_k, 24 * top_k)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("top_k", [1, 2, 8])
@both_routings
@pytest.mark.parametrize("size", [4, 8])
def test_saved_bytes_per_received_row_on_two_levels(size: int, spread: bool, top_k: int) -> None:
    """8 bytes more: where it lies at the relay, and where the relay's row came from."""
    check_received_rows(size, spread, tm.OverlapPlan((1, 1)), top_k, 24 * top_k + 8, node_size=2)


def check_received_rows(
    size: int, spread: bool, overlap: tm.OverlapPlan, top_k: int, most: int, node_size: int | None = None
) -> None:
    """Check that indices take at most so many bytes for every row that experts receive.

    Unless `spread`, all experts of a token are on one rank, in turn: then a received row has most pairs, K, and with
    K = 1 a capacity of 1 has no room left. Beside indices a rank keeps expert offsets, and counts on the CPU: (W, W),
    those of a first run that overflowed too, and with two levels (segments, W).
    """
    if torch.cuda.is_available():
        pytest.skip("counts the CPU's memory: the GPU's backend is the same code")
    generator, num_experts, num_tokens = torch.Generator().manual_seed(0), 16, 1008
    shape = (num_experts // size, 2 * INTERMEDIATE, HIDDEN), (num_experts // size, HIDDEN, INTERMEDIATE)
    weights = [tuple(torch.randn(*s).bfloat16().requires_grad_() for s in shape) for _ in range(size)]
    x = [torch.randn(num_tokens, HIDDEN).bfloat16().requires_grad_() for _ in range(size)]
    scores = torch.rand(size, num_tokens, num_experts, generator=generator)
    if not spread:
        of_rank = torch.arange(num_experts) * size // num_experts
        scores += of_rank == torch.arange(num_tokens)[:, None] % size
    topk_weights, topk_ids = scores.topk(top_k)
    topk_weights.requires_grad_()

    def on_rank(transport: Transport) -> Tensor:
        r, over = transport.rank, transport if node_size is None else TwoLevelTransport(transport, node_size)
        options = {"num_experts": num_experts, "transport": over, "overlap": overlap}
        return tm.expert_parallel_mlp(x[r], topk_ids[r], topk_weights[r], *weights[r], backend="torch", **options)

    def call() -> list[Tensor]:
        return tm.run_on_emulated_ranks(on_rank, size, timeout_s=60)

    call()  # what is kept for good is there from the first call on
    gc.collect()
    before = {tensor.untyped_storage().data_ptr() for tensor in live_tensors()}
    outs = call()
    gc.collect()
    nodes = [out.grad_fn for out in outs]
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*live_tensors(), *(t for node in nodes for t in node.saved_tensors if t is not None)]
    }
    for known in (*before, *(out.untyped_storage().data_ptr() for out in outs)):
        kept.pop(known, None)
    num_rows = 0
    for node in nodes:
        saved = saved_forward(node, node.saved_tensors)
        num_rows += saved.received.x.shape[0]
    must = 2 * HIDDEN * num_rows + 4 * INTERMEDIATE * topk_ids.numel()
    of_call = size * (4 * (num_experts // size + 1) * (overlap.num_segments + 3) + 2 * 8 * size**2 + 64)
    if overlap.capacity is not None:
        of_call += size * 2 * 8 * size**2
    if node_size is not None:
        of_call += size * 8 * overlap.num_segments * size
    assert must < sum(kept.values()) <= must + most * num_rows + of_call


@pytest.mark.parametrize("parallel", [False, True], ids=["one_device", "expert_parallel"])
@pytest.mark.parametrize("callable_activation", [False, True])
def test_frozen_experts_keep_no_rows(callable_activation: bool, parallel: bool) -> None:
    """Only the up-projection's gradient reads x, or the rows that were received."""
    config = tm.MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K)
    if callable_activation:
        config = replace(config, activation=lambda h: h[:, :INTERMEDIATE] * h[:, INTERMEDIATE:])
    experts = tm.GroupedExperts(config, LocalTransport() if parallel else None)
    ids = torch.randint(NUM_EXPERTS, (NUM_TOKENS, TOP_K), generator=torch.Generator().manual_seed(0))

    def kept(is_frozen: bool) -> int:
        experts.gate_up_proj.requires_grad_(not is_frozen)
        x = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
        weights = torch.rand(NUM_TOKENS, TOP_K, requires_grad=True)
        # of what a layer is given nobody else keeps anything
        return kept_bytes(lambda: experts(x * 1, ids, weights), tuple(experts.parameters()))

    assert kept(False) - kept(True) >= 0.9 * 4 * NUM_TOKENS * HIDDEN
