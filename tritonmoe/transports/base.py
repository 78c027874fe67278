"""Transport: moves rows between ranks and knows nothing of experts; PendingExchange: rows under way."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.config.overlap import MAX_CHUNKS
from tritonmoe.errors import TransportError
from tritonmoe.runtime.handles import Handled
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports.collectives import all_reduce, barrier, broadcast, run_outside_graphs, share_number

__all__ = ["PendingExchange", "Transport"]

MAX_HEADER = 40
"""The most integers with which one rank describes a layer call or a collective to the others."""
MAX_SEGMENTS = MAX_CHUNKS + 2
"""The most segments that a layer call has: its chunks, and the two local slices before them."""


class PendingExchange(ABC):
    """Rows under way; the sender must leave `rows` alone until wait() has returned."""

    @abstractmethod
    def wait(self) -> Tensor:
        """Return the received rows, in the order of the ranks that sent them.

        On a CPU wait() blocks until the rows are there. On CUDA it makes the current stream wait for them, and blocks
        the host only if the transport needs that. A second call returns the same tensor.

        Raises:
            TransportError: the exchange failed or took longer than the transport's timeout.
        """

    def finished_at(self) -> float | None:
        """Return the time.perf_counter() at which the rows had arrived, None if it is not known."""
        return None

    def arrivals(self) -> "tuple[float | None, ...] | None":
        """Return for each rank the time.perf_counter() at which its rows had arrived; call it after wait().

        A rank's time is None if it is not known, if the rank sent no rows, and for this rank itself. The result is None
        if the transport doesn't know the time of any rank, like NCCL.
        """
        return None


class Transport(Handled, ABC):
    """Two calls that communicate, and collectives made of them; every rank makes the same calls in the same order.

    If an exchange fails, or an exception leaves a layer call in the middle, the transport is broken: every later call
    raises TransportError with the first failure, until all ranks have called rebuild().

    A subclass sets rank and size, and defines exchange() and post_counts(). If one of its ranks can fail alone, it also
    defines rebuild(), and give_up(), by which the other ranks hear of a failure at once instead of at their timeout. If
    it holds resources, it defines close(). All other methods have defaults. transports/mpi.py is an example of
    messages, a thread and timeouts; process_group.py, gloo.py and notices.py are one of give_up() and rebuild().
    """

    rank: int
    size: int
    node_size: int | None = None
    """On two levels (TwoLevelTransport): the ranks of a node, between which rows take the second level."""
    generation: int = 0
    """How often the transport was rebuilt, equal on all ranks. Messages of two generations never meet."""
    tells_arrivals: bool = False
    """Set it to True to get PendingExchange.arrivals() also from transports for which it is not free: gloo between more
    than two ranks then has a thread for each rank."""

    @property
    def job_ranks(self) -> tuple[int, ...] | None:
        """The numbers of this transport's ranks, in their order, in the whole job; None if the job has no other ranks.

        Example: the expert ranks of a mesh (2, 4), ("replica", "expert"), are (0, 1, 2, 3) here and (4, 5, 6, 7) there.
        """
        return None

    @abstractmethod
    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        """Start sending rows to every rank and receiving rows from every rank; returns at once.

        Args:
            rows: (sum of input_splits, ...), contiguous, any dtype; the rows for rank 0 first.
            input_splits: W row counts; input_splits[k] rows go to rank k (this rank included).
            output_splits: W row counts; output_splits[k] rows come from rank k.
            out: (sum of output_splits, ...), contiguous, same dtype; allocated if None.
        Raises:
            ValueError, TypeError: splits and tensors disagree; raised before any row is sent.
        """

    @abstractmethod
    def post_counts(self, counts: Tensor) -> PendingExchange:
        """Start sending row k of counts (W, L) int64 on the CPU to rank k; wait() returns the received rows, (W, L).

        L must be the same on every rank. Returns at once.

        Raises:
            ValueError: counts is not (W, L) int64 on the CPU.
        """

    def exchange_counts(self, counts: Tensor) -> Tensor:
        """Post the counts, wait, and return the received rows.

        Raises:
            ValueError: counts is not (W, L) int64 on the CPU.
            TransportError: the exchange failed or took longer than the transport's timeout.
        """
        return self.post_counts(counts).wait()

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce `tensor` over all ranks, in place, and return it: the same bits on every rank and in every run.

        The sum is made in rank order, in fp32 or wider (integers as int64), and rounded once. With one rank the tensor
        stays as it is, and so it does if the call raises. The host blocks until all ranks have sent their tensors.
        torch.compile breaks its graph at this call.

        Args:
            tensor: any shape (none, empty and strided ones too), on the CPU or CUDA; the same shape and dtype on every
                rank. A tensor that is part of an autograd graph is refused, since no gradient passes.
            op: "sum", "mean" (floating point and complex), "max" or "min" (not complex; a NaN anywhere gives NaN).
                bool takes "max" (whether any rank has True) and "min".
        Raises:
            ValueError, TypeError: on the rank whose arguments don't fit; the others raise TransportError.
            CountMismatch: the ranks' shapes, dtypes, ops or calls differ. TransportError: an exchange failed.
        Example:
            Two ranks with [1, 2] and [10, 20] both have [11, 22] after transport.all_reduce(tensor).
        """
        return run_outside_graphs(all_reduce, self, tensor, op)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy the tensor of rank `source` into that of every rank, in place, and return it; else as in all_reduce."""
        return run_outside_graphs(broadcast, self, tensor, source)

    def barrier(self) -> None:
        """Return once every rank has called barrier(). Only the hosts wait, not their devices.

        Raises:
            CountMismatch: a rank makes another call. TransportError: a rank didn't come within the timeout.
        """
        run_outside_graphs(barrier, self)

    def share_number(self, number: int) -> list[int]:
        """Return the integers of all ranks, in rank order: a barrier in which each rank sends one integer.

        Raises:
            CountMismatch: a rank makes another call. TransportError: a rank didn't come within the timeout.
        """
        return run_outside_graphs(share_number, self, number)

    @property
    def message_length(self) -> int:
        """How many integers a rank sends to each other rank before a layer call or a collective (exchange_counts).

        All calls send the same number, so ranks that begin different calls raise; with two lengths gloo would abort.
        """
        return MAX_HEADER + 2 * self.size + 3 * MAX_SEGMENTS

    def wait_for_copy(self, copy: HostCopy) -> list[Tensor]:
        """Wait for a copy from this rank's device, in a call that all ranks make, and return the copied tensors.

        Raises:
            TransportError: only the device waits for rows (NCCL), another rank has failed, or timeout_s has passed.
        """
        return copy.wait()

    def uses_rendezvous(self, device: torch.device) -> bool:
        """Say whether rows are sent to a rank only after that rank's message that it is ready to receive them (gloo).

        The message travels behind the rows that the rank has sent before, so a slow way back delays the rows.
        """
        return False

    def shares_link(self, device: torch.device) -> bool:
        """Say whether exchanges of rows on this device that are under way together share the link (MPI over TCP).

        Otherwise they take turns, like on one stream of NCCL or one connection of gloo: the first posted arrives first.
        """
        return False

    def give_up(self, what: str) -> None:
        """Mark the transport as broken, unless it is already, and tell the other ranks what this rank did.

        Their exchanges that need this rank raise a TransportError with "rank k" and `what`, such as "failed with an
        OSError".
        """

    def rebuild(self) -> None:
        """Connect the same ranks again: rows that are under way are dropped, and are never received.

        All ranks must call it, also ranks that have seen no failure: their exchanges under way end. Afterwards calls
        are counted from the same number on all ranks, and `num_chunks="auto"` measures again. Layers, parameters and
        placements stay. Outputs stay valid too: all ranks may still run the backward of one.

        Raises:
            TransportError: a rank has ended or doesn't come within the timeout (it may be called again), or the
                transport has no way back.
        """
        raise TransportError(f"a {type(self).__name__} can't be rebuilt after a failure: make a new one")

    def __deepcopy__(self, memo: dict) -> "Transport":
        # A connection, not a value: the copy of a layer talks over the same one.
        return self

    def close(self) -> None:
        """Release what the transport holds; using it afterwards raises TransportError."""
