"""Two-level dispatch gives what one level gives, and sends every token once to every other node."""

import itertools
import re
import time

import pytest
import torch
from batches import NAMES, WEIGHTS, Batch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.dispatch.count_exchange import MAX_SEGMENTS
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.transports import EmulatedTransport, EmulatedWorld, TwoLevelTransport

COUNTS = {4: (7, 0, 5, 3), 6: (4, 0, 5, 3, 6, 1)}


class WideBatch(Batch):
    """Also for six ranks."""

    def __post_init__(self) -> None:
        import batches

        batches.NUM_TOKENS |= COUNTS
        super().__post_init__()


def run(batch: Batch, node_size: int | None, overlap, backend: str = "reference", **options) -> list[dict[str, Tensor]]:
    def rank_call(world):
        transport = world if node_size is None else TwoLevelTransport(world, node_size)
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(world.rank).items()}
        out = batch.call(transport, leaves, overlap, backend=backend, **options)
        grads = torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][world.rank])
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    return tm.run_on_emulated_ranks(rank_call, num_ranks=batch.num_ranks)


def compare(batch: Batch, results: list[dict[str, Tensor]]) -> None:
    expected = batch.on_one_device()
    local = batch.num_experts // batch.num_ranks
    for name in ("out", "x", "topk_weights"):
        got = torch.cat([result[name] for result in results])
        torch.testing.assert_close(got, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    for rank, result in enumerate(results):
        for name in WEIGHTS:
            part = expected[name][rank * local : (rank + 1) * local]
            torch.testing.assert_close(result[name], part, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("num_ranks", "node_size"), [(4, 2), (6, 2), (6, 3)])
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("local_first", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_two_levels_equal_one_device(num_ranks, node_size, num_chunks, local_first, top_k):
    batch = WideBatch(num_ranks, 12, top_k)
    compare(batch, run(batch, node_size, tm.OverlapConfig(num_chunks=num_chunks, local_first=local_first)))


def test_the_overlapped_schedule_gives_the_bits_of_the_serial_one():
    batch = WideBatch(4, 12, 3, torch.float32)
    results = [
        run(batch, 2, tm.OverlapPlan(chunk_sizes=(1, 2, 1), local_start=5, serial=serial), "torch")
        for serial in (False, True)
    ]
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("out", *NAMES))


def test_weight_gradients_do_not_depend_on_the_chunks():
    """The sums are by source rank and token, as in one level."""
    batch = WideBatch(4, 12, 3)
    whole, cut = (run(batch, 2, tm.OverlapConfig(num_chunks=c)) for c in (1, 3))
    for one, other in zip(whole, cut, strict=True):
        for name in WEIGHTS:
            torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)


def test_options_of_one_level_hold_in_two():
    batch = WideBatch(4, 12, 2)
    placement = tm.ExpertPlacement(((3, 0, 11), (6, 1, 4), (2, 7, 9), (8, 10, 5)))
    batch.of_rank = lambda rank: {  # type: ignore[method-assign]
        **{name: batch.tokens[name][rank].clone() for name in ("x", "topk_weights")},
        **{name: w[list(placement.experts_of_rank[rank])].clone() for name, w in batch.weights.items()},
    }
    results = run(batch, 2, tm.OverlapConfig(num_chunks=2), placement=placement, save="input")
    expected = batch.on_one_device()
    torch.testing.assert_close(torch.cat([r["out"] for r in results]), expected["out"], rtol=1e-9, atol=1e-9)
    for rank, result in enumerate(results):
        held = list(placement.experts_of_rank[rank])
        torch.testing.assert_close(result["down_proj"], expected["down_proj"][held], rtol=1e-9, atol=1e-9)


def test_a_callable_activation_gets_its_gradient():
    scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = scale

        def forward(self, h):
            gate, up = h.chunk(2, dim=1)
            return torch.tanh(gate * self.scale) * up

    batch = WideBatch(4, 12, 2)
    expected_out = tm.moe_mlp(
        torch.cat(batch.tokens["x"]),
        torch.cat(batch.ids),
        torch.cat(batch.tokens["topk_weights"]),
        **batch.weights,
        activation=Scaled(),
    )
    (expected,) = torch.autograd.grad(expected_out, [scale], torch.cat(batch.tokens["dout"]))

    def rank_call(world):
        leaves = batch.of_rank(world.rank)
        out = batch.call(
            TwoLevelTransport(world, 2), leaves, tm.OverlapConfig(num_chunks=2), activation=Scaled(), backend="torch"
        )
        return torch.autograd.grad(out, [scale], batch.tokens["dout"][world.rank])[0]

    total = sum(tm.run_on_emulated_ranks(rank_call, num_ranks=4))
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)


def test_a_token_crosses_once_to_every_node_that_needs_it(monkeypatch):
    """Counted where rows are handed over, and reported."""
    batch, width = WideBatch(4, 12, 8), 6
    crossing = [0] * 4
    exchange = EmulatedTransport.exchange

    def counting(self, rows, input_splits, output_splits, out=None):
        if rows.dtype == torch.float64 and rows.shape[1:] == (width,):
            crossing[self.rank] += sum(n for rank, n in enumerate(input_splits) if rank // 2 != self.rank // 2)
        return exchange(self, rows, input_splits, output_splits, out)

    monkeypatch.setattr(EmulatedTransport, "exchange", counting)

    def rank_call(world):
        with torch.no_grad():
            leaves = batch.of_rank(world.rank)
            batch.call(TwoLevelTransport(world, 2), leaves, tm.OverlapConfig(num_chunks=2), backend="torch")

    tm.run_on_emulated_ranks(rank_call, num_ranks=4)
    owner = [
        torch.div(ids, 3, rounding_mode="floor").masked_fill((ids < 0) | (ids >= 12), -2) // 2 for ids in batch.ids
    ]
    needed = [[int((owner[rank] == node).any(1).sum()) for node in range(2)] for rank in range(4)]
    for rank in range(4):
        other = 1 - rank // 2
        # Out in dispatch, and in combine what this relay sends home: one row per row that came.
        came = sum(needed[source][rank // 2] for source in range(4) if source // 2 == other and source % 2 == rank % 2)
        assert crossing[rank] == needed[rank][other] + came
    one_level = sum(
        int((torch.div(batch.ids[rank], 3, rounding_mode="floor") == k).any(1).sum())
        for rank, k in itertools.product(range(4), range(4))
        if rank // 2 != k // 2
    )
    assert sum(needed[rank][1 - rank // 2] for rank in range(4)) < one_level


def test_a_layer_reports_the_rows_that_cross():
    config = tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=12, top_k=6)

    def rank_call(world):
        layers = [
            tm.MoELayer(config, transport, tm.OverlapConfig(num_chunks=2), generator=torch.Generator().manual_seed(0))
            for transport in (world, TwoLevelTransport(world, 2))
        ]
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(world.rank))
        outs = [layer(x) for layer in layers]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
        return [layer.last_report for layer in layers], layers[0].last_routing.topk_ids

    for rank, ((one, two), ids) in enumerate(tm.run_on_emulated_ranks(rank_call, num_ranks=4)):
        other = 1 - rank // 2
        nodes = torch.div(ids, 6, rounding_mode="floor")
        assert one.rows_between_nodes is None
        assert two.rows_between_nodes == int((nodes == other).any(1).sum())
        assert torch.equal(one.traffic_rows, two.traffic_rows)
        assert two.rows_between_nodes < int(one.traffic_rows[rank, 2 * other : 2 * other + 2].sum())


@pytest.mark.thorough
def test_auto_settles_on_two_levels():
    config = tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=12, top_k=3)

    def rank_call(world):
        layer = tm.MoELayer(config, TwoLevelTransport(world, 2), generator=torch.Generator().manual_seed(0))
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(world.rank))
        for _ in range(SETTLING_CALLS + 2):
            layer(x).sum().backward()
        return layer.last_report.overlap, layer.last_report.choice

    plans = tm.run_on_emulated_ranks(rank_call, num_ranks=4)
    assert len({plan for plan, _ in plans}) == 1
    assert "measur" not in plans[0][1]


def test_what_two_levels_can_not_do_is_refused():
    batch = WideBatch(4, 12, 2)

    def rank_call(world):
        for size in (1, 3, 4):
            with pytest.raises(ValueError, match="can't be two or more nodes"):
                TwoLevelTransport(world, size)
        with pytest.raises(ValueError, match="inside_node must be rank"):
            TwoLevelTransport(world, 2, inside_node=world)
        transport = TwoLevelTransport(world, 2)
        for overlap in (tm.OverlapConfig(num_chunks=31), tm.OverlapConfig(shape=(1,) * 31)):
            with pytest.raises(ValueError, match="at most 30, got 31"):
                batch.call(transport, batch.of_rank(world.rank), overlap)
        with pytest.raises(ValueError, match="memory_budget_bytes needs a transport of one level"):
            batch.call(transport, batch.of_rank(world.rank), tm.OverlapConfig(memory_budget_bytes=1 << 30))
        # The ranks still agree on what comes next.
        with torch.no_grad():
            batch.call(transport, batch.of_rank(world.rank), tm.OverlapConfig(num_chunks=30))

    tm.run_on_emulated_ranks(rank_call, num_ranks=4)


@pytest.mark.parametrize("kind", range(5), ids=["rows", "pairs", "relayed", "to rank 0 of the node", "to rank 1"])
def test_every_damaged_count_of_a_relay_is_noticed(kind):
    """Rank 3 hears of rank 1, the rank with its place in the other node, a count with one bit changed."""

    class Damaged:
        def __init__(self, pending):
            self.pending = pending

        def wait(self):
            received = self.pending.wait()
            counted = received[1, -5 * MAX_SEGMENTS :].view(5, MAX_SEGMENTS)[kind]
            counted[int(counted.argmax())] ^= 1 << 10
            return received

    class Damaging(TwoLevelTransport):
        def post_counts(self, counts):
            return Damaged(super().post_counts(counts))

    batch = WideBatch(4, 12, 2)

    def rank_call(world):
        transport = (Damaging if world.rank == 3 else TwoLevelTransport)(world, 2)
        batch.call(transport, batch.of_rank(world.rank), tm.OverlapConfig(2), backend="reference")

    with pytest.raises(tm.CountMismatch, match="rank 3 got counts of rank 1 that contradict each other"):
        tm.run_on_emulated_ranks(rank_call, num_ranks=4, timeout_s=10)


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
def test_a_rank_that_never_comes_is_named_among_all(is_backward):
    """Rank 3 stays where its experts compute; all others wait for it, or for one that does, each in a group of two."""
    between, inside = ([EmulatedWorld(2, timeout_s=1.0) for _ in range(2)] for _ in range(2))
    heard = [""] * 4
    batch = WideBatch(4, 12, 8)
    batch.on_one_device()  # what PyTorch imports late is no rank's delay

    def stay(_=None):
        deadline = time.monotonic() + 20
        while not all(heard[:3]) and time.monotonic() < deadline:
            time.sleep(0.01)

    def rank_call(world):
        node, place = divmod(world.rank, 2)
        transport = TwoLevelTransport(
            world, 2, between_nodes=between[place].transports[node], inside_node=inside[node].transports[place]
        )

        def activation(h):
            a = torch.tanh(h[:, ::2]) * h[:, 1::2]
            if world.rank == 3 and h.shape[0]:
                if not is_backward:
                    stay()
                elif a.requires_grad:
                    a.register_hook(stay)
            return a

        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(world.rank).items()}
        try:
            out = batch.call(transport, leaves, tm.OverlapConfig(num_chunks=2), activation=activation, backend="torch")
            torch.autograd.grad(out, list(leaves.values()), batch.tokens["dout"][world.rank])
        except tm.TransportError as error:
            heard[world.rank] = str(error)

    tm.run_on_emulated_ranks(rank_call, num_ranks=4, timeout_s=10)
    for group in (*between, *inside):
        group.close()
    for rank, words in enumerate(heard):
        kinds = "(experts_backward|dispatch_backward)" if is_backward else "(experts|combine)"
        where = f"^rank {rank} of 4 on two levels: step {kinds}, (chunk [01]|local rows): .*rank [01] of 2"
        assert re.search(where, words), heard
    experts = "experts_backward" if is_backward else "experts"
    assert re.search(f"step {experts}, .*: step node_[a-z_]+, (chunk [01]|local rows): exchange", heard[2]), heard
