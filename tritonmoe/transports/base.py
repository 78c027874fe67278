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

        On a CPU this blocks until they are there. On CUDA it orders the current stream behind them (and blocks the
        host only where the transport needs it). Calling it again gives the same tensor.

        Raises:
            TransportError: the exchange failed or took longer than the transport's timeout.
        """

    def finished_at(self) -> float | None:
        """Return the time.perf_counter() at which the rows had arrived, None where nobody knows."""
        return None

    def arrivals(self) -> "tuple[float | None, ...] | None":
        """Return for each rank when the rows that it sent had arrived, as time.perf_counter(); call it after wait().

        A rank's is None where nobody knows, where it sent none, and for this rank itself; all of it where the transport
        doesn't know of any, as with NCCL.
        """
        return None


class Transport(Handled, ABC):
    """Two calls that communicate, and collectives made of them; every rank makes the same ones in the same order.

    Where an exchange fails, or a rank leaves a layer call in the middle, the transport is broken: every later call
    raises TransportError that names the first failure, until all ranks have called rebuild().

    A subclass sets rank and size, and defines exchange() and post_counts(). One whose ranks can fail apart also defines
    give_up(), by which the others hear of a failure at once instead of at their timeout, and rebuild(); one that holds
    anything defines close(). The rest has defaults. transports/mpi.py is an example of messages, a thread and timeouts;
    process_group.py with gloo.py and notices.py is one of give_up() and rebuild().
    """

    rank: int
    size: int
    generation: int = 0
    """How often the transport was rebuilt, the same on every rank: messages of two generations never meet."""
    tells_arrivals: bool = False
    """Set it to have PendingExchange.arrivals() also where that costs something: with gloo between more than two ranks
    a thread for each of them."""

    @property
    def job_ranks(self) -> tuple[int, ...] | None:
        """The numbers that this transport's ranks, in their order, have in the whole job; None where it has no others.

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
            rows: (sum of input_splits, ...), contiguous, any dtype; those for rank 0 first.
            input_splits: W row counts, input_splits[k] go to rank k (this rank included).
            output_splits: W row counts, output_splits[k] come from rank k.
            out: (sum of output_splits, ...), contiguous, same dtype; allocated where None.
        Raises:
            ValueError, TypeError: splits and tensors disagree; raised before anything is sent.
        """

    @abstractmethod
    def post_counts(self, counts: Tensor) -> PendingExchange:
        """Start sending row k of counts (W, L) int64 on the CPU to rank k; wait() gives the rows received, (W, L).

        L must be the same on every rank. Returns at once.

        Raises:
            ValueError: counts is not (W, L) int64 on the CPU.
        """

    def exchange_counts(self, counts: Tensor) -> Tensor:
        """Post the counts, wait, and give the rows received.

        Raises:
            ValueError: counts is not (W, L) int64 on the CPU.
            TransportError: the exchange failed or took longer than the transport's timeout.
        """
        return self.post_counts(counts).wait()

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce `tensor` over all ranks, in place, and give it: the same bits on every rank and in every run.

        It is reduced in rank order, in fp32 or wider (integers as int64), and rounded once. One rank alone keeps its
        tensor. Where this raises, the tensor is as it was. It blocks as exchange_counts and PendingExchange.wait do.
        torch.compile leaves its graph for it.

        Args:
            tensor: any shape (none, empty and strided ones too), on the CPU or CUDA; the same shape and dtype on every
                rank. One that hangs on a graph is refused: no gradient passes.
            op: "sum", "mean" (floating point and complex), "max" or "min" (not complex; a NaN anywhere gives NaN).
                bool has "max", whether any rank has it set, and "min".
        Raises:
            ValueError, TypeError: on the rank whose arguments don't fit; the others raise TransportError.
            CountMismatch: the ranks' shapes, dtypes, ops or calls differ. TransportError: an exchange failed.
        Example:
            Two ranks with [1, 2] and [10, 20] both have [11, 22] after transport.all_reduce(tensor).
        """
        return run_outside_graphs(all_reduce, self, tensor, op)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Write rank `source`'s tensor into every rank's, bit by bit, in place, and give it; else as in all_reduce."""
        return run_outside_graphs(broadcast, self, tensor, source)

    def barrier(self) -> None:
        """Return once every rank has come here. Only hosts wait: a device goes on with what it still computes.

        Raises:
            CountMismatch: a rank makes another call. TransportError: a rank didn't come within the timeout.
        """
        run_outside_graphs(barrier, self)

    def share_number(self, number: int) -> list[int]:
        """Return every rank's integer, in their order: a barrier by which each rank says one, in a single exchange.

        Raises:
            CountMismatch: a rank makes another call. TransportError: a rank didn't come within the timeout.
        """
        return run_outside_graphs(share_number, self, number)

    @property
    def message_length(self) -> int:
        """How many integers a rank sends each other one before a layer call or a collective (exchange_counts).

        It is one number for all of these: ranks that begin different ones tell each other so, where gloo would abort.
        """
        return MAX_HEADER + 2 * self.size + 3 * MAX_SEGMENTS

    def wait_for_copy(self, copy: HostCopy) -> list[Tensor]:
        """Wait for a copy from this rank's device, in a call that other ranks make too, and give what it holds.

        Raises:
            TransportError: only the device waits for rows (NCCL), another rank has failed, or timeout_s has passed.
        """
        return copy.wait()

    def uses_rendezvous(self, device: torch.device) -> bool:
        """Say whether rows leave for a rank only when its word has come that it may receive them (gloo).

        That word travels behind the rows which that rank has sent before, so a slow way back delays them.
        """
        return False

    def shares_link(self, device: torch.device) -> bool:
        """Say whether exchanges of rows on this device that are under way together share the link (MPI over TCP).

        Where they take their turn, as on one stream of NCCL or one connection of gloo, the first posted arrives first.
        """
        return False

    def give_up(self, what: str) -> None:
        """Break the transport, unless it is broken already, and let the other ranks hear what this rank did.

        Their exchanges that need this rank raise TransportError that says "rank k" and `what`, as "failed with an
        OSError". One rank alone has nobody who waits for it.
        """

    def rebuild(self) -> None:
        """Make the transport anew over the same ranks: what is under way is dropped, and can't be received any more.

        All ranks must call it, those included that have seen no failure: their exchanges under way end. Calls are
        counted from the same number on all ranks afterwards; `num_chunks="auto"` starts to measure again. Layers, their
        parameters and their places stay, and so do outputs: all ranks may still run the backward of one.

        Raises:
            TransportError: a rank has ended or doesn't come within the timeout (it may be called again), or the
                transport has no way back.
        """
        raise TransportError(f"a {type(self).__name__} has no way back after a failure: make a new one")

    def __deepcopy__(self, memo: dict) -> "Transport":
        # A connection, not a value: the copy of a layer talks over the same one.
        return self

    def close(self) -> None:
        """Release what the transport holds; using it afterwards raises TransportError."""
