"""What every transport checks of the tensors and splits that it is given, and says of an exchange in its errors."""

import operator
import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import Transport

__all__ = ["as_counts", "as_wire", "check_counts", "check_exchange", "describe", "raise_in_child"]

NATIVE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)
"""Dtypes that every transport moves as they are; tensors of all others travel as bytes."""


def check_exchange(
    transport: Transport,
    rows: Tensor,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
    out: Tensor | None,
) -> Tensor:
    """Check an exchange's arguments and give the tensor it fills."""
    where = f"rank {transport.rank} of {transport.size}"
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows must be a tensor, got {type(rows).__name__} ({where})")
    for name, splits in (("input_splits", input_splits), ("output_splits", output_splits)):
        if len(splits) != transport.size:
            raise ValueError(f"{name} must have one count per rank ({transport.size}), got {len(splits)} ({where})")
        if any(count < 0 for count in splits):
            raise ValueError(f"{name} must not be negative, got {list(splits)} ({where})")
    sent, received = input_splits[transport.rank], output_splits[transport.rank]
    if sent != received:
        raise ValueError(
            f"a rank receives the rows that it sends to itself: input_splits[{transport.rank}] = {sent} and "
            f"output_splits[{transport.rank}] = {received} must be equal ({where})"
        )
    if rows.dim() < 1 or rows.shape[0] != sum(input_splits):
        raise ValueError(f"rows {tuple(rows.shape)} must have sum(input_splits) = {sum(input_splits)} rows ({where})")
    if not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous, got strides {rows.stride()}: call .contiguous() ({where})")
    shape = (sum(output_splits), *rows.shape[1:])
    if out is None:
        return rows.new_empty(shape)
    if tuple(out.shape) != shape or out.dtype != rows.dtype or out.device != rows.device:
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype} on {out.device} must be {shape} {rows.dtype} on {rows.device}, "
            f"as the rows are ({where})"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()} ({where})")
    return out


def check_counts(transport: Transport, counts: Tensor) -> None:
    """Check the argument of post_counts."""
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a tensor, got {type(counts).__name__}")
    if counts.dim() != 2 or counts.shape[0] != transport.size:
        raise ValueError(f"counts must be ({transport.size}, L), one row per rank, got {tuple(counts.shape)}")
    if counts.dtype != torch.int64 or counts.device.type != "cpu":
        raise ValueError(f"counts must be int64 on the CPU, got {counts.dtype} on {counts.device}")


def as_counts(splits: Sequence[int]) -> list[int]:
    """Return the splits as plain integers, whatever kind of integer they were.

    Raises:
        TypeError: a count is not an integer.
    """
    return [operator.index(count) for count in splits]


def as_wire(tensor: Tensor) -> Tensor:
    """Return a view of `tensor` in a dtype that every transport moves: its own, or bytes.

    Dimension 0 still counts the rows: int32 (R,) becomes uint8 (R, 4), int32 (R, D) becomes uint8 (R, 4*D).
    """
    if tensor.dtype in NATIVE_DTYPES:
        return tensor
    return (tensor.unsqueeze(-1) if tensor.dim() == 1 else tensor).view(torch.uint8)


def raise_in_child(transport: Transport, pid: int) -> NoReturn:
    """Refuse a call in a process that was forked from the one, `pid`, in which the transport was made."""
    raise TransportError(
        f"this {type(transport).__name__} was made in process {pid} and can't be used in its child {os.getpid()}, "
        "which shares its connections: use it in the process that made it, or make another one in the child"
    )


def describe(transport: Transport, input_splits: Sequence[int], output_splits: Sequence[int]) -> str:
    """Return the words by which a TransportError names its exchange."""
    return (
        f"rank {transport.rank} of {transport.size}, input_splits {list(input_splits)}, "
        f"output_splits {list(output_splits)}"
    )
