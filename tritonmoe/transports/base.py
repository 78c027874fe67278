"""Transport: moves rows between ranks and knows nothing of experts; PendingExchange: rows under way.

Collectives are made of what the ranks say first, then at most two exchanges of rows. The ranks compare their calls in
one count exchange, which has the size of a layer call's: gloo aborts a process whose peer sends another size, and then
nobody could say what disagreed. Rows follow only where all ranks make the same call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor

from tritonmoe.config.numbers import is_integer
from tritonmoe.config.overlap import MAX_CHUNKS
from tritonmoe.errors import CountMismatch, PeerFailure, TransportError
from tritonmoe.runtime.autograd import outside_graphs
from tritonmoe.runtime.handles import Handled
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports.waiting import Doing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PendingExchange", "Transport", "fail_peers_on_error", "run_outside_graphs"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MAX_HEADER = 41
"""The most integers with which one rank describes a layer call or a collective to the others."""
MAX_SEGMENTS = MAX_CHUNKS + 2
"""The most segments that a layer call has: its chunks, and the two local slices before them."""
MAGIC = 0x7417_C0
"""Stands where the header of a layer call has another number, so that ranks see that they make different calls."""
CALLS = ("all_reduce", "broadcast", "barrier", "share_number")
OPS = ("sum", "mean", "max", "min")
DEVICES = ("cpu", "cuda")
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.complex128),
)
FIXED_FIELDS = 8
"""Magic, whether the arguments were refused, call, op, source, dtype, device, number of dimensions.

Then the shape; with share_number() the number, in which ranks may differ."""


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
    records_arrivals: bool = False
    """Set it to True to get PendingExchange.arrivals() also from transports for which it is not free: gloo between more
    than two ranks then has a thread for each rank."""

    @property
    def single_level(self) -> "Transport":
        """The transport of the same ranks that has one level: this one, but for a TwoLevelTransport."""
        return self

    @property
    def group(self) -> "ProcessGroup | None":
        """The torch.distributed group of the same ranks, over which parameters can be DTensors; None if there is none.

        A transport around another one gives that one's.
        """
        return None

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
        return run_outside_graphs(_all_reduce, self, tensor, op)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy the tensor of rank `source` into that of every rank, in place, and return it; else as in all_reduce."""
        return run_outside_graphs(_broadcast, self, tensor, source)

    def barrier(self) -> None:
        """Return once every rank has called barrier(). Only the hosts wait, not their devices.

        Raises:
            CountMismatch: a rank makes another call. TransportError: a rank didn't come within the timeout.
        """
        run_outside_graphs(_barrier, self)

    def share_number(self, number: int) -> list[int]:
        """Return the integers of all ranks, in rank order: a barrier in which each rank sends one integer.

        Raises:
            CountMismatch: a rank makes another call. TransportError: a rank didn't come within the timeout.
        """
        return run_outside_graphs(_share_number, self, number)

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
        """Return whether rows are sent to a rank only after its message that it is ready to receive them (gloo).

        The message travels behind the rows that the rank has sent before, so a slow way back delays the rows.
        """
        return False

    def shares_link(self, device: torch.device) -> bool:
        """Return whether exchanges of rows that are under way together on this device share the link (MPI over TCP).

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


def _all_reduce(transport: Transport, tensor: Tensor, op: str) -> Tensor:
    """Run Transport.all_reduce: each rank reduces one part of the tensor and sends the result to all."""
    with _refused_with_word(transport):
        _check_tensor(tensor)
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
        if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"a mean of {tensor.dtype} is no {tensor.dtype}: sum it, or pass tensor.float()")
        if op == "sum" and tensor.dtype == torch.bool:
            raise ValueError('a sum of torch.bool is no torch.bool: op="max" says whether any is set, or pass .int()')
        if op in ("max", "min") and tensor.is_complex():
            raise ValueError(f"complex numbers have no {op}: reduce their real and imaginary parts or their abs()")
    if transport.size == 1:
        return tensor
    said = _agree(transport, "all_reduce", tensor, op=op)[transport.rank]
    with fail_peers_on_error(transport), Doing(lambda: _words(said)):
        rank, counts = transport.rank, _parts(tensor.numel(), transport.size)
        flat = tensor.detach().contiguous().view(-1)
        received = _exchange(transport, flat, counts, [counts[rank]] * transport.size)
        # Not Tensor.sum, whose order of adding is its own: in rank order, fp32 or wider, integers as int64.
        total, *others = (part.to(_accumulation_dtype(tensor.dtype)) for part in received.split(counts[rank] or 1))
        for other in others:
            if op in ("max", "min"):
                total = torch.maximum(total, other) if op == "max" else torch.minimum(total, other)
            else:
                total = total + other
        if op == "mean":
            total = total / transport.size
        return _gather(transport, total.to(tensor.dtype), counts, tensor)


def _broadcast(transport: Transport, tensor: Tensor, source: int) -> Tensor:
    """Run Transport.broadcast: the source gives each rank one part, which that rank sends to all."""
    with _refused_with_word(transport):
        _check_tensor(tensor)
        if not is_integer(source) or not 0 <= source < transport.size:
            raise ValueError(f"source must be one of the ranks 0..{transport.size - 1}, got {source!r}")
    if transport.size == 1:
        return tensor
    said = _agree(transport, "broadcast", tensor, source=source)[transport.rank]
    with fail_peers_on_error(transport), Doing(lambda: _words(said)):
        rank, counts = transport.rank, _parts(tensor.numel(), transport.size)
        flat = tensor.detach().contiguous().view(-1)
        from_source = [counts[rank] if sender == source else 0 for sender in range(transport.size)]
        if rank == source:
            part = _exchange(transport, flat, counts, from_source)
        else:
            part = _exchange(transport, flat[:0], [0] * transport.size, from_source)
        return _gather(transport, part, counts, tensor)


def _barrier(transport: Transport) -> None:
    """Run Transport.barrier."""
    if transport.size > 1:
        _agree(transport, "barrier")


def _share_number(transport: Transport, number: int) -> list[int]:
    """Run Transport.share_number, in the one exchange by which the ranks agree on this call."""
    return (
        [number]
        if transport.size == 1
        else [row[FIXED_FIELDS] for row in _agree(transport, "share_number", number=number)]
    )


@contextmanager
def fail_peers_on_error(transport: Transport) -> Iterator[None]:
    """Break the transport where this rank leaves a call in its middle, so that others needn't wait for a timeout."""
    try:
        yield
    except GeneratorExit:
        raise  # the call was left some time ago, and is collected now: the transport may have been rebuilt since
    except BaseException as error:
        transport.give_up(f"failed with {type(error).__name__}: {error}")
        raise


def run_outside_graphs(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs
) -> Result:
    """Call the function; under torch.compile outside of the graph, which would reorder or drop its exchanges."""
    if torch.compiler.is_compiling():
        return _call_outside(function, *arguments, **keywords)
    return function(*arguments, **keywords)


_call_outside = outside_graphs(lambda function, *arguments, **keywords: function(*arguments, **keywords))


def _check_tensor(tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "device_mesh"):
        raise TypeError("tensor is a DTensor, which torch.distributed reduces over its own mesh: pass .to_local()")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.device.type not in DEVICES:
        raise TypeError(
            f"tensor must be dense, on the CPU or a CUDA device, and one of {', '.join(map(str, DTYPES))}, got "
            f"{tensor.dtype} {tensor.layout} on {tensor.device}"
        )
    if tensor.grad_fn is not None:
        raise ValueError(
            "tensor is part of an autograd graph, and no gradient passes through all_reduce and broadcast: pass "
            "tensor.detach()"
        )
    if any(stride == 0 and length > 1 for length, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"tensor {tuple(tensor.shape)} with strides {tensor.stride()} repeats its elements, so it can't be written "
            "in place: pass tensor.contiguous()"
        )


@contextmanager
def _refused_with_word(transport: Transport) -> Iterator[None]:
    """Where the checks inside refuse this rank's arguments, tell the other ranks so: they wait for it in _agree."""
    try:
        yield
    except Exception:
        if transport.size > 1:
            counts = torch.zeros(transport.size, transport.message_length, dtype=torch.int64, device="cpu")
            counts[:, :2] = torch.tensor([MAGIC, 1], device="cpu")
            transport.exchange_counts(counts)
        raise


def _agree(
    transport: Transport, call: str, tensor: Tensor | None = None, op: str = "sum", source: int = 0, number: int = 0
) -> list[list[int]]:
    """Raise the same error on every rank unless all make this call, and give what each rank said of it."""
    said = [MAGIC, 0, CALLS.index(call), OPS.index(op), source]
    if tensor is None:
        said += [0, 0, 0, number]
    else:
        said += [DTYPES.index(tensor.dtype), DEVICES.index(tensor.device.type), tensor.dim(), *tensor.shape]
    counts = torch.zeros(transport.size, transport.message_length, dtype=torch.int64, device="cpu")
    counts[:, : len(said)] = torch.tensor(said, device="cpu")
    try:
        with Doing(lambda: _words(said)):
            everybody = transport.exchange_counts(counts).tolist()
    except TransportError as error:
        raise TransportError(f"the ranks could not agree on this {_words(said)}: {error}") from error
    strangers = [rank for rank, row in enumerate(everybody) if row[0] != MAGIC]
    if strangers:
        raise CountMismatch(
            f"this rank calls {_words(said)}, ranks {strangers} make another call (a layer call, for example): every "
            "rank must make the same calls in the same order on this transport"
        )
    refused = [rank for rank, row in enumerate(everybody) if row[1]]
    if refused:
        raise PeerFailure(
            f"ranks {refused} refused the arguments of their part of this {_words(said)}; see the error raised there"
        )
    compared = FIXED_FIELDS if call == "share_number" else None
    if any(row[:compared] != everybody[0][:compared] for row in everybody):
        calls = ", ".join(f"rank {rank}: {_words(row)}" for rank, row in enumerate(everybody))
        raise CountMismatch(
            f"the ranks disagree on this call ({calls}): give every rank the same arguments and make the same calls in "
            "the same order"
        )
    return everybody


def _words(said: list[int]) -> str:
    """Return in words what one rank calls."""
    _, _, call, op, source, dtype, device, num_dims = said[:FIXED_FIELDS]
    if CALLS[call] in ("barrier", "share_number"):
        return CALLS[call]
    how = OPS[op] if CALLS[call] == "all_reduce" else f"from rank {source}"
    shape = tuple(said[FIXED_FIELDS : FIXED_FIELDS + num_dims])
    return f"{CALLS[call]} ({how}) of {shape} {DTYPES[dtype]} on {DEVICES[device]}"


def _parts(count: int, size: int) -> list[int]:
    """Split `count` elements over the ranks, as evenly as it goes."""
    return [count // size + (rank < count % size) for rank in range(size)]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype in (torch.float64, torch.complex64, torch.complex128):
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int64


def _gather(transport: Transport, part: Tensor, counts: list[int], tensor: Tensor) -> Tensor:
    """Write every rank's part into the tensor, only once all have come, and give it."""
    whole = _exchange(transport, part.repeat(transport.size), [part.numel()] * transport.size, counts)
    tensor.detach().copy_(whole.view(tensor.shape))
    return tensor


def _exchange(transport: Transport, rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
    if rows.is_complex():
        return torch.view_as_complex(transport.exchange(torch.view_as_real(rows), input_splits, output_splits).wait())
    return transport.exchange(rows, input_splits, output_splits).wait()
