"""export_weights(): a model's weights as (name, tensor) of its checkpoint, gathered in buckets, adapters merged."""

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonmoe.config.numbers import is_integer
from tritonmoe.errors import CountMismatch
from tritonmoe.integrations.weight_sync.checkpoint_names import CheckpointPart, checkpoint_parts, converted
from tritonmoe.integrations.weight_sync.merged_rows import active_adapters, has_sharded_factors, local_part, merged_rows
from tritonmoe.integrations.weight_sync.model_weights import (
    Weight,
    check_as_it_is,
    check_plain,
    model_inside,
    model_weights,
)
from tritonmoe.layer import GroupedExperts
from tritonmoe.placement.placed_rows import ExpertsOfRank
from tritonmoe.placement.watched_collectives import full_tensor, watched_on

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

__all__ = ["export_weights"]

WHAT = "export_weights, which gathers what is spread"


def export_weights(
    model: nn.Module, *, bucket_bytes: int = 512 * 1024**2, only_shapes: bool = False, dequantize: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over (name, tensor) of a transformers model, as save_pretrained would write them.

    For an inference engine that takes new weights while the model trains: names and bytes are those of the checkpoint,
    one tensor for each expert where the checkpoint has such. Every rank calls it, and iterates to the end, as the
    others do; each gets all tensors, on its own device, in the same order every time. Active adapters (LoRA of PEFT)
    are merged into what comes out, and the model keeps them; inside `model.disable_adapter()` the base comes.

    What is spread over ranks is gathered a few experts at a time. Beside the model a rank holds at most `bucket_bytes`
    and one projection of a layer, as long as the caller keeps no tensor: a tensor is a view of its bucket or, where
    nothing had to be gathered or merged, of the model's own memory, so copy what is kept.

    Args:
        model: of transformers, also inside DistributedDataParallel, fully_shard, torch.compile or PEFT.
        bucket_bytes: how much of experts is gathered, or merged, at once; at least one expert's projection.
        only_shapes: give tensors on the meta device, and exchange nothing, not even a check.
        dequantize: packed experts come in bf16, decoded some at a time, under the names of a checkpoint that is not
            quantised, and with active adapters merged. Without it they come as the checkpoint has them, in its bytes,
            to which no adapter can be merged.
    Raises:
        TypeError: no model of transformers.
        ValueError: quantised weights that are no packed experts, active adapters of those without `dequantize`, layers
            upcycled in place, adapters that are no plain LoRA, FSDP1, DeepSpeed.
        CountMismatch: the ranks' weights, adapters or `bucket_bytes` differ. TransportError: not all of them export.
    Example:
        for name, tensor in tm.export_weights(model):
            engine.load_weights([(name, tensor)])
    """
    from tritonmoe.integrations.transformers.sharded_model import refuse_to_meet

    inside = model_inside(model)
    try:
        weights, parts = _prepare(inside, bucket_bytes, dequantize)
    except Exception:
        if not only_shapes:
            refuse_to_meet(inside)
        raise
    if only_shapes:
        return iter([item for part in parts for item in part.outputs.items()])
    _agree(inside, weights, bucket_bytes)
    return _iterate(inside, weights, parts, bucket_bytes)


def _prepare(
    model: "PreTrainedModel", bucket_bytes: object, dequantize: bool
) -> tuple[dict[str, Weight], list[CheckpointPart]]:
    if not is_integer(bucket_bytes) or bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be a positive number of bytes, got {bucket_bytes!r}")
    for name, child in model.named_modules():
        if isinstance(child, GroupedExperts):
            raise ValueError(
                f"{name} is a layer of tritonmoe, upcycled in place, which no inference engine has: save_pretrained() "
                "writes such a model, and tmt.load_upcycled() reads it"
            )
    weights = model_weights(model, dequantize=dequantize)
    check_plain(weights, or_packed=True)
    for name, weight in weights.items():
        if weight.packed is not None and not weight.is_decoded:
            check_as_it_is(model, name, weight.packed, weight.adapted_by)
        if weight.experts_of_rank is not None and _by_owner(weight) is None:
            raise ValueError(
                f"{name} has been moved between ranks by tm.rebalance, and FSDP2 shards it or its adapters too: call "
                "restore() of the Rebalancer on every rank, which moves all experts back, and export then"
            )
    return weights, checkpoint_parts(model, {name: weight.like for name, weight in weights.items()})


def _agree(model: "PreTrainedModel", weights: dict[str, Weight], bucket_bytes: int) -> None:
    """Raise on every rank unless all of them are about to export the same."""
    from torch.distributed.tensor import DTensor, Partial

    from tritonmoe.integrations.transformers.sharded_model import everybody_of, meet

    if not any(isinstance(weight.tensor, DTensor) for weight in weights.values()):
        return
    meet(model, "export_weights")
    said = [
        (
            name,
            tuple(weight.like.shape),
            str(weight.like.dtype),
            str(getattr(weight.tensor, "placements", "")),
            _adapters(weight),
            weight.experts_of_rank,
        )
        for name, weight in weights.items()
    ]
    digest = int.from_bytes(hashlib.sha256(repr((bucket_bytes, said)).encode()).digest()[:7], "big")
    mesh = everybody_of(model)
    both = torch.tensor([digest, -digest], device=mesh.device_type)
    of_all = full_tensor(DTensor.from_local(both, mesh, [Partial("max")] * mesh.ndim), "export_weights, which compares")
    if of_all.tolist() != [digest, -digest]:
        raise CountMismatch(
            "the ranks would export different weights: the same names, shapes, dtypes, active adapters, dequantize and "
            f"bucket_bytes are needed on every rank (here {len(weights)} weights, bucket_bytes={bucket_bytes})"
        )


def _adapters(weight: Weight) -> list[tuple[str, float]]:
    found = [(one.scaling, name) for one in weight.adapted_by for name in active_adapters(one)]
    return [(name, float(scaling[name])) for scaling, name in found]  # type: ignore[index]


def _iterate(
    model: "PreTrainedModel", weights: dict[str, Weight], parts: list[CheckpointPart], bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        if part.by_expert:
            for first, rows in _ranges(weights[part.names[0]], bucket_bytes):
                yield from _contiguous(part.of_experts(model, rows, first))
                del rows
        else:
            yield from _contiguous(converted(model, {name: _whole(weights[name], bucket_bytes) for name in part.names}))


def _whole(weight: Weight, bucket_bytes: int) -> Tensor:
    """Return a weight gathered and merged; every rank calls."""
    tensor = weight.tensor.detach()
    is_by_expert = weight.is_decoded or weight.experts_of_rank is not None or tensor.dim() == 3
    if not is_by_expert or not (weight.is_decoded or weight.adapted_by or hasattr(tensor, "to_local")):
        with torch.no_grad():
            return merged_rows(full_tensor(tensor, WHAT), weight.adapted_by, 0, is_local=False)
    whole = local_part(tensor).new_empty(weight.like.shape, dtype=weight.like.dtype)
    for first, rows in _ranges(weight, bucket_bytes):
        whole[first : first + len(rows)] = rows
        del rows
    return whole


def _contiguous(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    while tensors:  # the last reference to a tensor is the caller's
        name = next(iter(tensors))
        yield name, tensors.pop(name).contiguous()


def _ranges(weight: Weight, bucket_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of the first expert, and some experts from there on, merged; every rank iterates."""
    like = weight.like
    # A range is there twice: while it is merged, and again while it is converted.
    at_once = max(1, bucket_bytes * len(like) // (2 * like.numel() * like.element_size()))
    by_owner = _by_owner(weight)
    if by_owner is not None:
        yield from _broadcast(by_owner, weight, at_once)
        return
    read = _reader(weight, is_local=False)
    for first in range(0, len(like), at_once):
        with torch.no_grad():  # not while the caller has the rows
            rows = merged_rows(read(first, min(at_once, len(like) - first)), weight.adapted_by, first, is_local=False)
        yield first, rows
        del rows


def _reader(weight: Weight, *, is_local: bool) -> Callable[[int, int], Tensor]:
    """Return what gives so many rows of a weight, from one on, not yet merged: of this rank's, or of all gathered."""
    if weight.packed is not None and weight.is_decoded:
        return weight.packed.decoder(WHAT, is_local=is_local)
    tensor = weight.tensor.detach()
    whole = local_part(tensor) if is_local else full_tensor(tensor, WHAT)
    return lambda first, number: whole[first : first + number]


def _by_owner(weight: Weight) -> "DTensor | None":
    """Return a weight of which each rank of a mesh holds some experts, with their adapters; None for another."""
    from torch.distributed.tensor import DTensor, Shard

    tensor = weight.tensor.detach()
    if not isinstance(tensor, DTensor) or tensor.placements != (Shard(0),) or has_sharded_factors(weight.adapted_by):
        return None
    return tensor


def _broadcast(tensor: "DTensor", weight: Weight, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """Yield ranges of experts of which each rank of a mesh holds some: their owner sends, merged, to the others."""
    import torch.distributed as dist

    mesh, like, places = tensor.device_mesh, weight.like, _places(tensor, weight.experts_of_rank)
    read = _reader(weight, is_local=True)
    first = 0
    while first < len(places):
        (owner, slot), number = places[first], 1
        while number < at_once and places[first + number : first + number + 1] == [(owner, slot + number)]:
            number += 1
        if owner == mesh.get_local_rank():
            with torch.no_grad():
                rows = merged_rows(read(slot, number), weight.adapted_by, slot, is_local=True).contiguous()
        else:
            rows = torch.empty(number, *like.shape[1:], dtype=like.dtype, device=tensor.to_local().device)
        with watched_on(mesh, WHAT):  # fp8, which gloo doesn't know, travels as bytes
            dist.broadcast(
                rows.view(torch.uint8) if rows.itemsize == 1 else rows, group=mesh.get_group(), group_src=owner
            )
        yield first, rows
        del rows
        first += number


def _places(tensor: "DTensor", experts_of_rank: ExpertsOfRank | None) -> list[tuple[int, int]]:
    """Return the rank that holds each expert, and its slot there."""
    if experts_of_rank is None:
        each = -(-len(tensor) // tensor.device_mesh.size())  # as DTensor divides
        return [divmod(expert, each) for expert in range(len(tensor))]
    slots = [(rank, slot, expert) for rank, held in enumerate(experts_of_rank) for slot, expert in enumerate(held)]
    return [(rank, slot) for rank, slot, _ in sorted(slots, key=lambda place: place[2])]
