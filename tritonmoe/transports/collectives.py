"""Collectives on any transport: what the ranks say first, then at most two exchanges of rows.

The ranks compare their calls in one count exchange, which has the size of a layer call's: gloo aborts a process whose
peer sends another size, and then nobody could say what disagreed. Rows follow only where all ranks make the same call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor

from tritonmoe.config.numbers import is_integer
from tritonmoe.errors import CountMismatch, PeerFailure, TransportError
from tritonmoe.runtime.autograd import outside_graphs
from tritonmoe.transports.waiting import Doing

if TYPE_CHECKING:
    from tritonmoe.transports.base import Transport

__all__ = ["all_reduce", "barrier", "broadcast", "leaving_nobody_waiting", "run_outside_graphs", "share_number"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

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


def all_reduce(transport: "Transport", tensor: Tensor, op: str) -> Tensor:
    """Do what Transport.all_reduce says: each rank reduces one part of the tensor and sends the result to all."""
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
    with leaving_nobody_waiting(transport), Doing(lambda: _words(said)):
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


def broadcast(transport: "Transport", tensor: Tensor, source: int) -> Tensor:
    """Do what Transport.broadcast says: the source gives each rank one part, which that rank sends to all."""
    with _refused_with_word(transport):
        _check_tensor(tensor)
        if not is_integer(source) or not 0 <= source < transport.size:
            raise ValueError(f"source must be one of the ranks 0..{transport.size - 1}, got {source!r}")
    if transport.size == 1:
        return tensor
    said = _agree(transport, "broadcast", tensor, source=source)[transport.rank]
    with leaving_nobody_waiting(transport), Doing(lambda: _words(said)):
        rank, counts = transport.rank, _parts(tensor.numel(), transport.size)
        flat = tensor.detach().contiguous().view(-1)
        from_source = [counts[rank] if sender == source else 0 for sender in range(transport.size)]
        if rank == source:
            part = _exchange(transport, flat, counts, from_source)
        else:
            part = _exchange(transport, flat[:0], [0] * transport.size, from_source)
        return _gather(transport, part, counts, tensor)


def barrier(transport: "Transport") -> None:
    """Do what Transport.barrier says."""
    if transport.size > 1:
        _agree(transport, "barrier")


def share_number(transport: "Transport", number: int) -> list[int]:
    """Do what Transport.share_number says, in the one exchange by which the ranks agree on this call."""
    return (
        [number]
        if transport.size == 1
        else [row[FIXED_FIELDS] for row in _agree(transport, "share_number", number=number)]
    )


@contextmanager
def leaving_nobody_waiting(transport: "Transport") -> "Iterator[None]":
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
def _refused_with_word(transport: "Transport") -> "Iterator[None]":
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
    transport: "Transport", call: str, tensor: Tensor | None = None, op: str = "sum", source: int = 0, number: int = 0
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
    """Say in words what one rank calls."""
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


def _gather(transport: "Transport", part: Tensor, counts: list[int], tensor: Tensor) -> Tensor:
    """Write every rank's part into the tensor, only once all have come, and give it."""
    whole = _exchange(transport, part.repeat(transport.size), [part.numel()] * transport.size, counts)
    tensor.detach().copy_(whole.view(tensor.shape))
    return tensor


def _exchange(transport: "Transport", rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
    if rows.is_complex():
        return torch.view_as_complex(transport.exchange(torch.view_as_real(rows), input_splits, output_splits).wait())
    return transport.exchange(rows, input_splits, output_splits).wait()
