"""Three gloo processes per case, of which the last one fails in the middle of a layer call; what the others get.

Run as fault_cases.py FOLDER [SECONDS] it writes FOLDER/results.json: by case, what every rank raised or gave, with
SECONDS only of the cases in which a rank comes late, by so many. The processes of a case are forks of one that has
imported torch already. Run as fault_cases.py FOLDER gloo CASE RANK SIZE, or by mpiexec as fault_cases.py FOLDER mpi
CASE, it is one rank of one case, whose end is a user's.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.count_exchange import MAX_SEGMENTS
from tritonmoe.transports import MPITransport, PendingExchange, ProcessGroupTransport, Transport

SIZE = 3
VICTIM = SIZE - 1
TIMEOUT_S = 1.5
LATE_S = 0.5
HANGS_AFTER_S = 20.0
CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=6, top_k=2)
TWO_CHUNKS = tm.OverlapConfig(2)
EXCHANGES = (
    "counts",
    "metadata",
    "dispatch 0",
    "dispatch 1",
    "combine 0",
    "combine 1",
    "combine_backward 0",
    "combine_backward 1",
    "dispatch_backward 0",
    "dispatch_backward 1",
    "routing_backward",
)
"""What a forward and backward in two chunks exchange, in this order."""


class FaultyTransport(Transport):
    """Passes everything on, and does something of its own before one exchange."""

    def __init__(self, transport: Transport, exchange: str, fault: Callable[[], None]) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport
        self._countdown = EXCHANGES.index(exchange)
        self._fault = fault

    def _count(self) -> None:
        if self._countdown == 0:
            self._fault()
        self._countdown -= 1

    def exchange(
        self, rows: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> PendingExchange:
        self._count()
        return self._transport.exchange(rows, input_splits, output_splits, out)

    def exchange_counts(self, counts: Tensor) -> Tensor:
        self._count()
        return self._transport.exchange_counts(counts)


ROWS_OF_CHUNK_1 = 3 - 3 * MAX_SEGMENTS
"""A place in the message that a rank gets: it ends in rows of every segment, two local ones first, pairs, rows back."""


class DamagingTransport(FaultyTransport):
    """Gives counts of rank 0 of which one has a bit too many, or too few."""

    def __init__(self, transport: Transport, place: int = ROWS_OF_CHUNK_1, bit: int = 4) -> None:
        super().__init__(transport, "counts", lambda: None)
        self._place, self._bit = place, bit

    def exchange_counts(self, counts: Tensor) -> Tensor:
        received = super().exchange_counts(counts)
        received[0, self._place] ^= self._bit
        return received


def die() -> None:
    time.sleep(0.5)  # what was posted before has left
    os.kill(os.getpid(), signal.SIGKILL)


def step(transport: Transport, overlap: tm.OverlapConfig = TWO_CHUNKS, **options: Any) -> float:
    """Run forward and backward of a layer and give a number that all of it goes into."""
    experts = tm.GroupedExperts(CONFIG, transport, overlap, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(transport.rank)
    x = torch.randn(16, 8, generator=generator, requires_grad=True)
    weights, ids = torch.randn(16, 6, generator=generator).softmax(1).topk(2)
    weights.requires_grad_()
    if options:
        # One rank alone, with an activation of its own.
        up, down = experts.gate_up_proj, experts.down_proj
        y = tm.expert_parallel_mlp(
            x, ids, weights, up, down, num_experts=6, transport=transport, overlap=overlap, **options
        )
    else:
        y = experts(x, ids, weights)
    y.square().sum().backward()
    assert x.grad is not None
    assert experts.gate_up_proj.grad is not None
    return float(y.detach().sum() + x.grad.sum() + experts.gate_up_proj.grad.sum())


def killed_in(exchange: str) -> Callable[[Transport], object]:
    return lambda transport: step(FaultyTransport(transport, exchange, die) if transport.rank == VICTIM else transport)


def late(seconds: float) -> Callable[[Transport], object]:
    return lambda transport: step(
        FaultyTransport(transport, "dispatch 1", lambda: time.sleep(seconds)) if transport.rank == VICTIM else transport
    )


def fails_in_experts(fail: Callable[[], object]) -> Callable[[Transport], object]:
    """Let the last rank fail where its experts compute the first rows that came to it."""

    def run(transport: Transport) -> object:
        def activation(h: Tensor) -> Tensor:
            if h.shape[0] and transport.rank == VICTIM:
                fail()
            return h[:, :4].sigmoid() * h[:, 4:]

        return step(transport, activation=activation)

    return run


def fails_in_backward_experts(fail: Callable[[], object]) -> Callable[[Transport], object]:
    def run(transport: Transport) -> object:
        def activation(h: Tensor) -> Tensor:
            a = h[:, :4].sigmoid() * h[:, 4:]
            if a.requires_grad and transport.rank == VICTIM:
                a.register_hook(lambda _: fail())  # type: ignore[arg-type, return-value]
            return a

        return step(transport, activation=activation)

    return run


def corrupted_counts(transport: Transport) -> object:
    return step(DamagingTransport(transport) if transport.rank == VICTIM else transport)


def different_chunks(transport: Transport) -> object:
    return step(transport, tm.OverlapConfig(3) if transport.rank == VICTIM else TWO_CHUNKS)


def different_layer_order(transport: Transport) -> object:
    layers = [
        tm.MoELayer(CONFIG, transport, TWO_CHUNKS, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    x = torch.ones(3, 8)
    for layer in layers[::-1] if transport.rank == VICTIM else layers:
        x = layer(x)
    return float(x.detach().sum())


def interrupted(transport: Transport) -> object:
    return late(60.0)(transport)


CASES: dict[str, Callable[[Transport], object]] = {
    "killed_in_dispatch": killed_in("dispatch 1"),
    "killed_in_experts": fails_in_experts(die),
    "killed_in_combine": killed_in("combine 1"),
    "killed_in_backward": killed_in("combine_backward 1"),
    "killed_in_backward_experts": fails_in_backward_experts(die),
    "late": late(LATE_S),
    "too_late": late(2 * TIMEOUT_S),
    "corrupted_counts": corrupted_counts,
    "different_chunks": different_chunks,
    "different_layer_order": different_layer_order,
    "interrupted": interrupted,
    "healthy": step,
}


def run_rank(name: str, rank: int, folder: Path, timeout_s: float) -> None:
    """Run one rank of one case, and write what became of it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=300)
    )
    transport = ProcessGroupTransport(timeout_s=HANGS_AFTER_S if name == "interrupted" else timeout_s)
    transport.exchange_counts(torch.zeros(SIZE, 1, dtype=torch.int64))
    (folder / f"{name}.{rank}.started").touch()
    started = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        result["value"] = CASES[name](transport)
    except BaseException as error:
        result["error"], result["words"] = type(error).__name__, str(error)
    result["seconds"] = time.perf_counter() - started
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


def run_as_a_user(folder: Path, backend: str, name: str, rank: int = 0) -> None:
    """Run one rank of one case in a process of its own; what it raises ends it as it would end a user's."""
    if backend == "mpi":
        from mpi4py import MPI

        transport: Transport = MPITransport(MPI.COMM_WORLD, timeout_s=TIMEOUT_S)
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=SIZE)
        transport = ProcessGroupTransport(timeout_s=TIMEOUT_S)
    (folder / f"{name}.{transport.rank}.pid").write_text(str(os.getpid()))
    transport.exchange_counts(torch.zeros(SIZE, 1, dtype=torch.int64))
    CASES[name](transport)


def run_case(name: str, folder: Path, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    pids = []
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            try:
                run_rank(name, rank, folder, timeout_s)
            finally:
                os._exit(0)  # with exchanges under way, gloo's own threads abort an ordinary exit
        pids.append(pid)
    deadline = time.monotonic() + HANGS_AFTER_S + 3 * timeout_s
    running = set(pids)
    while running and time.monotonic() < deadline:
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
        if name == "interrupted" and len(list(folder.glob(f"{name}.*.started"))) == SIZE:
            time.sleep(LATE_S)  # now all but the late one wait for it
            for pid in running:
                os.kill(pid, signal.SIGINT)
            name = "interrupted once"
        time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    name = name.removesuffix(" once")
    files = [folder / f"{name}.{rank}.json" for rank in range(SIZE)]
    return {
        "ranks": [json.loads(file.read_text()) if file.exists() else None for file in files],
        "hung": [rank for rank, pid in enumerate(pids) if pid in running],
    }


def run_late_cases(late_s: float, folder: Path) -> dict[str, Any]:
    """Let a rank come so many seconds late, with a timeout that allows it, and with half of that time."""
    CASES.update(late=late(late_s), too_late=late(late_s))
    timeouts = {"late": late_s + HANGS_AFTER_S, "too_late": late_s / 2, "healthy": TIMEOUT_S}
    return {name: run_case(name, folder, timeout_s) for name, timeout_s in timeouts.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    if arguments and arguments[0] in ("gloo", "mpi"):
        run_as_a_user(folder, *arguments[:2], *map(int, arguments[2:3]))
    else:
        late_s = [float(seconds) for seconds in arguments]
        results = run_late_cases(*late_s, folder) if late_s else {name: run_case(name, folder) for name in CASES}
        (folder / "results.json").write_text(json.dumps(results))
