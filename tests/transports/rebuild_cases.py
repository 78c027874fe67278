"""Faults of gloo processes with a way back, one by one, as functions that each of two ranks runs.

Run as rebuild_cases.py FOLDER RANK SIZE it runs all of them; as rebuild_cases.py FOLDER CASE RANK SIZE one of those
that stand alone.
"""

import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import fault_cases
import pytest
import torch
from contract_cases import results_in, run_case
from random_faults import step

import tritonmoe as tm
from tritonmoe.errors import TransportError
from tritonmoe.transports import ProcessGroupTransport, TwoLevelTransport, as_transport

CASES: dict[str, Callable[[], None]] = {}
TIMEOUT_S = 2.5
SLACK_S = 6.0


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def tell(transport: ProcessGroupTransport, value: int = 0, length: int = 1) -> list[int]:
    """Return what the ranks tell: their number and the value."""
    counts = torch.full((transport.size, length), 10 * value + transport.rank)
    return transport.exchange_counts(counts)[:, 0].tolist()


def connected(**options: float) -> ProcessGroupTransport:
    torch.distributed.barrier()  # ranks that have just started may be further apart than the timeout
    transport = ProcessGroupTransport(**{"timeout_s": TIMEOUT_S, **options})
    assert tell(transport) == [0, 1]
    return transport


def heard(call: Callable[[], object], within_s: float = TIMEOUT_S + SLACK_S) -> str:
    before = time.perf_counter()
    with pytest.raises(TransportError) as raised:
        call()
    assert time.perf_counter() - before < within_s, raised.value
    return str(raised.value)


def goes_on(transport: ProcessGroupTransport) -> None:
    """Rebuild, and find everything right."""
    generation = transport.generation
    transport.rebuild()
    assert transport.generation == generation + 1
    assert tell(transport, 5) == [50, 51]
    expected = tm.run_on_emulated_ranks(lambda emulated: step(emulated, backend="reference"), transport.size)
    assert step(transport) == pytest.approx(expected[transport.rank], rel=1e-4)


@case
def crossed_calls_of_two_transports() -> None:
    one, other = connected(), connected()
    rank = one.rank
    words = heard(lambda: tell((one, other)[rank]))
    torch.distributed.barrier()  # otherwise a rank may hear that its peer rebuilds already
    found = re.search(rf"rank {1 - rank} .*in transport (\d+) of this group, and here it is (\d+)", words)
    assert found, words
    numbers = [int(number) for number in found.groups()]
    assert numbers[1 - rank] + 1 == numbers[rank], words
    for transport in (one, other):
        goes_on(transport)


@case
def two_transports_in_one_order_do_not_meet() -> None:
    one, other = connected(), connected()
    posted = one.post_counts(torch.full((2, 1), 10 + one.rank)), other.post_counts(torch.full((2, 1), 20 + one.rank))
    order = (1, 0) if one.rank else (0, 1)
    received = {place: posted[place].wait()[:, 0].tolist() for place in order}
    assert received == {0: [10, 11], 1: [20, 21]}


@case
def sizes_that_differ() -> None:
    """gloo itself aborts the process that gets more than it expects."""
    transport = connected()
    rank = transport.rank
    sent, expected = [0, 4 if rank == 0 else 1], [0, 1 if rank == 0 else 2]
    splits = [sent, expected] if rank == 0 else [sent[::-1], expected[::-1]]
    assert f"rank {1 - rank}" in heard(lambda: transport.exchange(torch.ones(sum(splits[0]), 3), *splits).wait())
    goes_on(transport)
    assert f"rank {1 - rank}" in heard(lambda: tell(transport, length=2 + rank))
    goes_on(transport)


@case
def rebuild_without_a_failure() -> None:
    transport = connected()
    for _ in range(3):
        goes_on(transport)


@case
def a_rank_that_waits_hears_of_rebuild() -> None:
    """Long before its timeout: one rank fails in its own code, of which its peer hears only there."""
    transport = connected(timeout_s=60.0)
    if transport.rank == 1:
        assert "rank 0 called rebuild()" in heard(lambda: tell(transport), within_s=SLACK_S)
    else:
        time.sleep(0.3)
    goes_on(transport)


@case
def a_rank_that_comes_too_late_to_rebuild() -> None:
    transport = connected()
    if transport.rank == 0:
        words = heard(transport.rebuild)
        assert re.search(r"rank 0 of 2: ranks \[1\] did not come within timeout_s", words), words
        assert "broken on rank 0 of 2 since its first failure: rank 0 called rebuild()" in heard(
            lambda: tell(transport)
        )
    else:
        time.sleep(TIMEOUT_S + 1.0)
    transport.rebuild()
    assert tell(transport) == [0, 1]


@case
def the_backward_of_an_output_from_before() -> None:
    transport = connected()

    def leaves() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(transport.rank)
        shapes = (6, 8), (6, 2), (2, 8, 8), (2, 8, 4)
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def forward(x: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(12).view(6, 2) % 4
        return tm.expert_parallel_mlp(x, ids, weights, up, down, num_experts=4, transport=transport)

    gradients = []
    for rebuilds in (False, True):
        inputs = leaves()
        y = forward(*inputs)
        if rebuilds:
            transport.rebuild()
        y.sum().backward()
        gradients.append([of.grad for of in inputs])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@case
def the_group_of_a_broken_transport() -> None:
    """Abandoned messages are no business of the group's own collectives."""
    transport = connected()
    if transport.rank == 0:
        heard(lambda: tell(transport))
    else:
        time.sleep(TIMEOUT_S + 0.5)
        heard(lambda: tell(transport))
    ones = torch.ones(5)
    torch.distributed.all_reduce(ones)
    assert ones.tolist() == [2.0] * 5
    goes_on(transport)


@case
def a_child_after_fork() -> None:
    transport = connected()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for call in (lambda: tell(transport), transport.rebuild):
                assert f"was made in process {os.getppid()} and can't be used in its child" in heard(call)
            transport.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert tell(transport, 3) == [30, 31]


@case
def layers_on_one_group_share_a_transport() -> None:
    """Whenever their memory is freed, on whichever rank."""
    world = torch.distributed.group.WORLD
    layer = tm.MoELayer(tm.MoEConfig(8, 4, 4, 2), world)
    if layer.experts.transport.rank == 0:
        del layer
        gc.collect()
    assert tell(as_transport(world)) == [0, 1]
    group = torch.distributed.new_group([0, 1])
    tell(as_transport(group))
    torch.distributed.destroy_process_group(group)
    assert tell(as_transport(torch.distributed.new_group([0, 1])), 2) == [20, 21]


def the_host_of_the_store_is_killed() -> None:
    transport = connected()
    if transport.rank == 0:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    words = heard(lambda: tell(transport))
    assert "rank 1 lost its connection to rank 0" in words
    assert "rank 0 has ended: its connection is closed and it left no word" in words
    assert "can't be reached" in heard(transport.rebuild)


def four_ranks_on_two_levels() -> None:
    transport = ProcessGroupTransport(timeout_s=20.0).with_nodes(2)
    expected = tm.run_on_emulated_ranks(lambda world: fault_cases.step(TwoLevelTransport(world, 2)), 4)[transport.rank]

    def fail() -> None:
        raise OSError("in own code")

    for fault in (fault_cases.fails_in_experts(fail), fault_cases.fails_in_backward_experts(fail)):
        with pytest.raises((OSError, TransportError)) as raised:
            fault(transport)
        assert raised.type is OSError or "failed with OSError: in own code" in str(raised.value), raised.value
        transport.rebuild()
        assert fault_cases.step(transport) == pytest.approx(expected, rel=1e-4)


ALONE = {function.__name__: function for function in (the_host_of_the_store_is_killed, four_ranks_on_two_levels)}


def main(folder: Path, name: str, rank: int, size: int) -> None:
    options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=60)}
    if name == "the_host_of_the_store_is_killed":  # rank 0 hosts it
        port = folder / "port"
        store = torch.distributed.TCPStore("127.0.0.1", 0 if rank == 0 else wait_for_port(port), is_master=rank == 0)
        if rank == 0:
            port.with_suffix(".new").write_text(str(store.port))
            port.with_suffix(".new").rename(port)
        torch.distributed.init_process_group("gloo", store=store, **options)
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    with results_in(folder / f"{rank}.json") as results:
        for function in [ALONE[name]] if name in ALONE else CASES.values():
            run_case(results, function)


def wait_for_port(file: Path) -> int:
    while not file.exists():
        time.sleep(0.02)
    return int(file.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[-2]), int(sys.argv[-1]))
