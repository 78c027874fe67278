"""Emulated ranks, views of them and one rank alone go on after rebuild(), as processes do."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import random_faults
import torch
from fault_cases import SIZE, TWO_LEVEL_SIZE, VICTIM, fails_in_backward_experts, fails_in_experts, step
from random_faults import Fault, OwnError

import tritonmoe as tm
from tritonmoe.expert_parallel.state import CALLS_OF_GENERATION, state_of
from tritonmoe.transports import (
    Death,
    EmulatedWorld,
    LocalTransport,
    Transport,
    TwoLevelTransport,
    fail_peers_on_error,
)


def fail() -> None:
    raise OwnError("in own code")


def between_passes(transport: Transport) -> None:
    """Skip the backward on one rank."""
    random_faults.step(transport, fault=Fault("own code", "backward", VICTIM))


FAULTS: dict[str, Callable[[Transport], object]] = {
    "experts": fails_in_experts(fail),
    "backward experts": fails_in_backward_experts(fail),
    "between passes": between_passes,
}


def rebuilt(fn: Callable[[Transport], object], transport: Transport) -> tuple[str, float]:
    """Let a fault happen, and give what was heard and what a step gives after rebuild()."""
    with pytest.raises((OwnError, tm.TransportError)) as raised:
        fn(transport)
    transport.rebuild()
    return f"{raised.typename}: {raised.value}", step(transport)


def test_a_call_that_was_left_and_is_collected_later_breaks_nothing() -> None:
    """As the halves of a batch are, whose other half has failed: the transport may work again by then."""

    def on_rank(transport: Transport) -> None:
        def call():
            with fail_peers_on_error(transport):
                yield

        left = call()
        next(left)
        left.close()
        transport.barrier()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=5)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault(fault: str) -> None:
    results = tm.run_on_emulated_ranks(lambda transport: rebuilt(FAULTS[fault], transport), SIZE)
    assert [value for _, value in results] == tm.run_on_emulated_ranks(step, SIZE)
    assert results[VICTIM][0].startswith("OwnError: ")
    for words, _ in results[:VICTIM]:
        assert re.search(rf"rank {VICTIM} (failed with OwnError: in own code|called rebuild)", words), words


@pytest.mark.parametrize("fault", ["experts", "backward experts"])
def test_on_two_levels(fault: str) -> None:
    def fn(world: Transport) -> tuple[str, float]:
        return rebuilt(FAULTS[fault], TwoLevelTransport(world, 2))

    results = tm.run_on_emulated_ranks(fn, TWO_LEVEL_SIZE)
    expected = tm.run_on_emulated_ranks(lambda world: step(TwoLevelTransport(world, 2)), TWO_LEVEL_SIZE)
    assert [value for _, value in results] == expected


def test_a_broken_transport_says_why() -> None:
    def fn(transport: Transport) -> None:
        counts = torch.zeros(2, 1, dtype=torch.int64)
        if transport.rank == 1:
            transport.give_up("failed with a flourish")
        for words in ("rank 1 failed with a flourish", "broken since its first failure: .*flourish.*rebuild"):
            with pytest.raises(tm.TransportError, match=words if transport.rank == 0 else "broken since.*flourish"):
                transport.exchange_counts(counts)

    tm.run_on_emulated_ranks(fn, 2)


def test_a_rank_that_has_not_failed_hears_of_rebuild() -> None:
    def fn(transport: Transport) -> None:
        if transport.rank == 0:
            with pytest.raises(tm.TransportError, match=r"rank 1 called rebuild\(\)"):
                transport.exchange_counts(torch.zeros(2, 1, dtype=torch.int64))
        transport.rebuild()
        assert transport.generation == 1
        assert transport.exchange_counts(torch.full((2, 1), transport.rank)).tolist() == [[0], [1]]

    tm.run_on_emulated_ranks(fn, 2)


def test_a_rank_that_waits_on_another_level_hears_of_rebuild() -> None:
    between, inside = ([EmulatedWorld(2, timeout_s=2.0) for _ in range(2)] for _ in range(2))

    def fn(world: Transport) -> None:
        node, place = divmod(world.rank, 2)
        transport = TwoLevelTransport(
            world, 2, between_nodes=between[place].transports[node], inside_node=inside[node].transports[place]
        )
        if world.rank == 1:
            with pytest.raises(tm.TransportError, match=r"rank 0 called rebuild\(\)"):
                transport.inside_node.exchange_counts(torch.zeros(2, 1, dtype=torch.int64))
        transport.rebuild()
        for level in (world, transport.between_nodes, transport.inside_node):
            told = level.exchange_counts(torch.full((level.size, 1), level.rank))
            assert told[:, 0].tolist() == [*range(level.size)]

    tm.run_on_emulated_ranks(fn, 4, timeout_s=10)


def test_rows_of_an_abandoned_exchange_are_not_delivered() -> None:
    def fn(transport: Transport) -> None:
        link_takes_s = 0.3
        out = torch.zeros(2, 100)
        pending = transport.exchange(torch.ones(2, 100), [1, 1], [1, 1], out)
        transport.rebuild()
        with pytest.raises(tm.TransportError, match=r"rebuild\(\)"):
            pending.wait()
        time.sleep(2 * link_takes_s)
        assert out[1 - transport.rank].sum() == 0

    tm.run_on_emulated_ranks(fn, 2, link=tm.LinkModel(bandwidth_gb_per_s=1, latency_us=300_000))


def test_ranks_that_do_not_come() -> None:
    has_raised = threading.Event()

    def fn(transport: Transport) -> None:
        if transport.rank == 1:
            assert has_raised.wait(20)
        else:
            with pytest.raises(tm.TransportError, match=r"rank 0 of 2: ranks \[1\] did not come within timeout_s"):
                transport.rebuild()
            world = transport.world  # type: ignore[attr-defined]
            world.timeout_s = 20.0
            has_raised.set()
        transport.rebuild()
        assert transport.exchange_counts(torch.full((2, 1), transport.rank)).tolist() == [[0], [1]]

    tm.run_on_emulated_ranks(fn, 2, timeout_s=0.5)


def test_ranks_that_have_ended() -> None:
    heard = []

    def fn(transport: Transport) -> None:
        with pytest.raises(tm.TransportError):
            transport.exchange_counts(torch.zeros(3, 1, dtype=torch.int64))
        before = time.perf_counter()
        with pytest.raises(tm.TransportError, match="rank 2 failed with RankStopped") as raised:
            transport.rebuild()
        assert time.perf_counter() - before < 5
        heard.append(str(raised.value))
        raise raised.value

    with pytest.raises(tm.TransportError, match="was stopped by its fault"):
        tm.run_on_emulated_ranks(fn, 3, faults=[Death(2, 0)])
    assert len(heard) == 2


def test_ranks_count_alike_afterwards() -> None:
    """One of them has learnt more than the others, and refused arguments."""

    def fn(transport: Transport) -> None:
        layer = tm.MoELayer(tm.MoEConfig(8, 4, 4, 2), transport)
        layer(torch.ones(3, 8))
        if transport.rank == 0:
            with pytest.raises(tm.TransportError):
                layer(torch.ones(3, 8))
        transport.rebuild()
        for _ in range(12):
            layer(torch.ones(3, 8)).sum().backward()
        state = state_of(transport)
        assert (state.num_layers, state.num_calls) == (1, CALLS_OF_GENERATION + 12)

    tm.run_on_emulated_ranks(fn, 2)


def test_one_rank_alone() -> None:
    transport = LocalTransport()
    expected = step(transport)
    with pytest.raises(OwnError):
        fails_in_experts(fail)(transport)
    assert step(transport) == expected
    transport.rebuild()
    assert transport.generation == 1
    assert step(transport) == expected


FORKING = """
import os, torch, tritonmoe as tm

def on_rank(transport):
    pid = os.fork()
    if pid == 0:
        try:
            transport.exchange_counts(torch.zeros(1, 1, dtype=torch.int64))
        except tm.TransportError as error:
            os._exit(0 if "can't be used in its child" in str(error) else 1)
        os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert tm.run_on_emulated_ranks(on_rank, 1) == [0]
"""


@pytest.mark.thorough
def test_a_child_after_fork() -> None:
    """In a process of its own: a child of this one would have to do without the threads of all earlier tests."""
    ended = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
