"""What ranks compare before experts are spread: whether all can spread them, and whether all have the same weights."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.placement.expert_shards import Sharding
from tritonmoe.placement.marks import own_buffers
from tritonmoe.placement.sharded_parameters import numbers_of_all
from tritonmoe.transports import as_transport

__all__ = ["check_on_all_ranks"]

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
DTYPES = {
    zlib.crc32(str(value).encode()): str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)
}


class Digest(NamedTuple):
    """What ranks compare of one tensor."""

    is_meta: int
    dtype: int
    shape: int
    bits: int
    """0 on the meta device, where there are no values yet."""


def check_on_all_ranks(
    module: nn.Module, found: Mapping[str, nn.Module], sharding: Sharding, check: Callable[[], None] = lambda: None
) -> None:
    """Raise on every rank where `check` raises on one, or where the weights of `module` are not the same on all.

    Every rank calls it. The weights of the experts `found` are compared, and all parameters and saved buffers beside
    them, of which each rank trains a copy; but no DTensors, no tensors of other classes, and none that is named in a
    module's _ddp_params_and_buffers_to_ignore.

    Raises:
        What `check` raises, where it does. ValueError: it does on another rank, or weights differ.
    """
    error: Exception | None = None
    there: dict[str, Digest] = {}
    try:
        check()
        there = {name: _digest(tensor) for name, tensor in _compared(module)}
    except Exception as refused:  # whatever it is, the other ranks wait in the exchange below
        error = refused
    digests = torch.tensor(list(there.values()), dtype=torch.int64, device="cpu")
    names = zlib.crc32(" ".join(there).encode())
    transports = [sharding.transport]
    if sharding.replicas is not None:  # and what is found among these goes to all the others
        transports += [as_transport(sharding.replicas), sharding.transport]
    for transport in transports:
        states = numbers_of_all(torch.tensor([error is not None, len(there), names], device="cpu"), transport).tolist()
        of_all = None
        if not any(failed for failed, *_ in states) and len({tuple(state) for state in states}) == 1:
            of_all = numbers_of_all(digests.flatten(), transport).view(transport.size, -1, len(Digest._fields))
        ranks = transport.job_ranks or range(transport.size)
        error = error or _difference(module, found, list(there), ranks, states, of_all)
    if error is not None:
        raise error


def _difference(
    module: nn.Module,
    found: Mapping[str, nn.Module],
    names: list[str],
    ranks: Sequence[int],
    states: list[list[int]],
    of_all: Tensor | None,
) -> ValueError | None:
    """Return what tells the ranks apart, in words; None where nothing does."""
    kind = type(module).__name__
    failed = [rank for rank, (has_failed, *_) in zip(ranks, states, strict=True) if has_failed]
    if failed:
        return ValueError(
            f"ranks {failed} can't spread the experts of {kind}, so that none does, and nothing is changed: their own "
            "errors say why"
        )
    if of_all is None:
        return ValueError(
            f"the modules {kind} of ranks {list(ranks)} have weights of other names, "
            f"{[number for _, number, _ in states]} of them: make the same module on every rank"
        )
    for name, values in zip(names, of_all.unbind(1), strict=True):
        digests = [Digest(*row) for row in values.tolist()]
        other = next((digest for digest in digests if digest != digests[0]), None)
        if other is not None:
            others = [rank for rank, digest in zip(ranks, digests, strict=True) if digest != digests[0]]
            is_expert = name.rpartition(".")[0] in found
            return ValueError(f"{name} of {kind} {_words(digests[0], other, ranks[0], others, is_expert)}")
    return None


def _words(first: Digest, other: Digest, here: int, others: list[int], is_expert: bool) -> str:
    """Return how a tensor on ranks `others` differs from that on rank `here`, and the way out."""
    if other.is_meta != first.is_meta:
        where = ("has values", "is on the meta device")
        return (
            f"{where[other.is_meta]} on ranks {others} and {where[first.is_meta]} on rank {here}: give it values on "
            "every rank before parallelize(), or on none, and load it afterwards"
        )
    if other.dtype != first.dtype:
        return (
            f"is {DTYPES[other.dtype]} on ranks {others} and {DTYPES[first.dtype]} on rank {here}: give the module the "
            "same dtype on every rank, with module.to(dtype)"
        )
    if other.shape != first.shape:
        return f"has another shape on ranks {others} than on rank {here}: make the same module on every rank"
    why = "each rank would keep its part of another model"
    way_out = (
        "load the same checkpoint on every rank, or call torch.manual_seed() with the same seed before the module is "
        "made"
    )
    if not is_expert:
        why = (
            "each rank would train another model, since an average of gradients leaves copies as different as they are"
        )
        way_out += ". What is to differ is named in module._ddp_params_and_buffers_to_ignore"
    return f"has another value on ranks {others} than on rank {here}, and {why}: {way_out}"


def _compared(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return what is to be the same on every rank, by name; a tensor with two names under its first."""
    left_out, seen = set(own_buffers(module)), set()
    for prefix, child in module.named_modules():
        ignored = getattr(child, "_ddp_params_and_buffers_to_ignore", ())
        left_out |= {f"{prefix}.{name}".lstrip(".") for name in ignored}
    for prefix, child in module.named_modules():
        saved = {name: b for name, b in child._buffers.items() if name not in child._non_persistent_buffers_set}
        for own_name, tensor in {**child._parameters, **saved}.items():
            name = f"{prefix}.{own_name}".lstrip(".")
            if type(tensor) in (Tensor, nn.Parameter) and id(tensor) not in seen and name not in left_out:
                seen.add(id(tensor))
                yield name, tensor


def _digest(tensor: Tensor) -> Digest:
    """Return what ranks compare of this tensor: of its bits the sums of its rows, in their order."""
    dtype, shape = (zlib.crc32(str(value).encode()) for value in (tensor.dtype, tuple(tensor.shape)))
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return Digest(int(tensor.is_meta), dtype, shape, 0)
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    rows = tensor.contiguous().reshape(tensor.shape[0] if tensor.dim() > 1 else tensor.numel(), -1)
    size, row_bytes = rows.element_size(), rows.element_size() * rows.shape[1]
    width = next(width for width in BITS if row_bytes % width == 0)  # a CPU sums int64 30 times as fast as others
    if rows.storage_offset() * size % width:
        rows = rows.clone()
    sums = rows.view(BITS[width]).sum(1, dtype=torch.int64)
    return Digest(0, dtype, shape, zlib.crc32(str(sums.tolist()).encode()))
