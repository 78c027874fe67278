"""One rank alone: what replayed peers answer, and when. Times are compared with the clock read around a call."""

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.link_replay import Port, ReplayExchange, ReplayTransport

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]
ROW_BYTES = 256


def recorded(port: Port | None, rows: list[list[int]], *, num_exchanges: int = 1, device: str = "cpu") -> "Replayed":
    """Return rank 0 of an exchange of rows[i][k] rows from rank i to rank k that was made so many times."""

    def on_rank(transport: Transport) -> Replayed:
        replayed = Replayed(ReplayTransport(transport, port), rows, device)
        replayed.received = [replayed.exchange().wait().clone() for _ in range(num_exchanges)]
        return replayed

    replayed = tm.run_on_emulated_ranks(on_rank, len(rows), device=device, timeout_s=60)[0]
    replayed.transport.rewind()
    return replayed


class Replayed:
    """A rank that sends its number, row by row."""

    def __init__(self, transport: ReplayTransport, rows: list[list[int]], device: str) -> None:
        self.transport = transport
        self.splits = rows[transport.rank], [of_rank[transport.rank] for of_rank in rows]
        self.rows = torch.full((sum(self.splits[0]), ROW_BYTES // 4), float(transport.rank), device=device)
        self.received: list[Tensor] = []

    def exchange(self) -> ReplayExchange:
        return self.transport.exchange(self.rows, *self.splits)


@pytest.mark.parametrize("has_link", [False, True])
@pytest.mark.parametrize("chunk_by", ["tokens", "experts"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_replayed_call_has_the_same_bits_and_needs_no_peer(has_link: bool, chunk_by: str, device: str) -> None:
    config = tm.MoEConfig(8, 4, 8, 2)
    overlap = tm.OverlapConfig(2, chunk_by=chunk_by)

    def fn(transport: Transport) -> None:
        layer = tm.MoELayer(config, transport, overlap, generator=torch.Generator().manual_seed(0), device=device)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(transport.rank)).to(device)

        def step() -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            grads = torch.autograd.grad(out, [leaf, *layer.parameters()], torch.ones_like(out))
            return [out.detach(), *grads]

        expected = step()
        replay = ReplayTransport(transport, Port(LinkModel(0.01, latency_us=50)) if has_link else None)
        shards = layer.grouped_experts.expert_shards
        assert shards is not None
        shards.sharding = replace(shards.sharding, transport=replay)
        for number in range(3):
            if number and transport.rank:
                break  # rank 0 goes on alone
            replay.rewind()
            for actual, wanted in zip(step(), expected, strict=True):
                assert torch.equal(actual, wanted)

    tm.run_on_emulated_ranks(fn, 2, device=device, timeout_s=120)


@pytest.mark.parametrize("rows", [[[9, 4], [1, 9]], [[9, 1], [4, 9]]], ids=["out", "in"])
def test_an_exchange_takes_the_time_of_the_busier_direction(rows: list[list[int]]) -> None:
    # 4 rows of 256 bytes at 1e5 bytes/s; own rows don't travel.
    wanted_s = 4 * ROW_BYTES / 1e5 + 3000e-6
    one = recorded(Port(LinkModel(1e-4, latency_us=3000)), rows)
    before = time.perf_counter()
    pending = one.exchange()
    after = time.perf_counter()
    received = pending.wait()
    assert time.perf_counter() >= before + wanted_s
    assert torch.equal(received, one.received[0])
    assert pending.wait() is received
    finished = pending.finished_at()
    assert finished is not None
    assert before + wanted_s <= finished <= after + wanted_s + 1e-9


def test_exchanges_take_their_turn_whatever_is_waited_for_first() -> None:
    transfer_s, latency_s = 4 * ROW_BYTES / 1e5, 2e-3
    one = recorded(Port(LinkModel(1e-4, latency_us=2000)), [[0, 4], [4, 0]], num_exchanges=3)
    clock = [time.perf_counter()]
    pending = []
    for _ in range(3):
        pending.append(one.exchange())
        clock.append(time.perf_counter())
    pending[2].wait()
    ends = [exchange.finished_at() for exchange in pending]
    is_free_at = 0.0
    for before, after, end in zip(clock, clock[1:], ends, strict=False):
        assert end is not None
        earliest, latest = (max(posted, is_free_at) + transfer_s + latency_s for posted in (before, after))
        assert earliest - 1e-9 <= end <= latest + 1e-9
        is_free_at = end - latency_s
    assert ends[2] >= clock[0] + 3 * transfer_s + latency_s


def test_the_time_begins_when_the_rows_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    one = recorded(Port(LinkModel(1e-4)), [[0, 4], [4, 0]], num_exchanges=2)
    first, second = one.exchange(), one.exchange()
    ready_at = time.perf_counter() + 0.05
    monkeypatch.setattr(first, "ready_at", lambda: ready_at)
    second.wait()
    assert first.arrives_at == pytest.approx(ready_at + 4 * ROW_BYTES / 1e5, rel=0, abs=1e-9)
    assert second.arrives_at == pytest.approx(ready_at + 8 * ROW_BYTES / 1e5, rel=0, abs=1e-9)


@pytest.mark.gpu
@NEEDS_CUDA
def test_on_a_gpu_the_time_begins_when_the_device_has_computed_the_rows() -> None:
    one = recorded(Port(LinkModel(1e-4)), [[0, 4], [4, 0]], device="cuda")
    torch.cuda.synchronize()
    before, started, computed = time.perf_counter(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    computed.record()
    pending = one.exchange()
    received = pending.wait()
    torch.cuda.synchronize()
    computing_s = started.elapsed_time(computed) * 1e-3
    assert pending.arrives_at is not None
    assert pending.arrives_at >= before + computing_s + 4 * ROW_BYTES / 1e5
    assert torch.equal(received, one.received[0])


def test_what_a_rank_says_anew_all_ranks_say() -> None:
    def on_rank(transport: Transport) -> ReplayTransport:
        replay = ReplayTransport(transport)
        rank = transport.rank
        replay.exchange_counts(torch.tensor([[7, 0, 10 * rank + k] for k in range(3)]))
        return replay

    replay = tm.run_on_emulated_ranks(on_rank, 3, timeout_s=60)[0]
    for vote in (5, 6):
        replay.rewind()
        told = replay.exchange_counts(torch.tensor([[7, vote, k] for k in range(3)]))
        assert told.tolist() == [[7, vote, 0], [7, vote, 10], [7, vote, 20]]


def test_a_call_that_was_not_recorded_is_refused() -> None:
    one = recorded(None, [[0, 4], [4, 0]])
    with pytest.raises(tm.TransportError, match=r"receives \(3, 64\) .*, recorded was \(4, 64\)"):
        one.transport.exchange(one.rows[:3], [0, 3], [0, 3])
    one.transport.rewind()
    one.exchange()
    with pytest.raises(tm.TransportError, match=r"exchange 1 of a replayed call .* recorded was none"):
        one.exchange()
