"""load_weights(): (name, tensor) of a checkpoint into a model in place, whoever trained them."""

from collections.abc import Callable, ItemsView, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.integrations.weight_sync.checkpoint_names import CheckpointPart, checkpoint_parts, converted
from tritonmoe.integrations.weight_sync.merged_rows import is_in_use
from tritonmoe.integrations.weight_sync.model_weights import Weight, check_plain, model_inside, model_weights
from tritonmoe.placement.placed_rows import ExpertsOfRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_weights"]

MAX_NAMED = 4
PAIRS = "pairs (name, dense tensor), as export_weights() gives them, or items() of a dict"


class Place(NamedTuple):
    """Where a tensor of the checkpoint goes."""

    like: Tensor
    """Of its shape and dtype."""
    write: Callable[[Tensor], object]


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy (name, tensor) into the weights of a transformers model, in place, by the names of its checkpoint.

    For a model that generates here while another one trains elsewhere, as `export_weights` there gives them: in any
    order, on any device, in any floating dtype, which is cast. Where experts are spread over ranks, every rank is
    given all tensors and keeps its own. Nothing is exchanged. Names and shapes in a list, or in items() of a dict, are
    looked at before any tensor is copied, those of an iterator as they come.

    Args:
        model: of transformers, also inside DistributedDataParallel, torch.compile or PEFT without active adapters.
    Raises:
        TypeError: no model of transformers; something that is no pair of a name and a dense tensor.
        ValueError: a name that the checkpoint has not, another shape, an integer where a float is; at the end: names
            that didn't come, after the others were copied. Before any: quantised weights, active adapters, weights that
            FSDP2 or transformers have sharded other than by rows.
    Example:
        tm.load_weights(rollout_model, tm.export_weights(trained_model))
    """
    inside = model_inside(model)
    own = model_weights(inside)
    check_plain(own)
    for name, weight in own.items():
        if any(is_in_use(wrapper) for wrapper in weight.adapted_by):
            raise ValueError(
                f"{name} has an adapter, active or merged, in addition to the weights to load: call unload() first, "
                "or load unmerged inside model.disable_adapter()"
            )
    places: dict[str, Place] = {}
    for part in checkpoint_parts(inside, {name: weight.tensor for name, weight in own.items()}):
        places |= _places(inside, own, part)
    missing = dict.fromkeys(places)
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights must be {PAIRS}, got {type(weights).__name__}")
    if isinstance(weights, Sequence | ItemsView):
        given = {_checked(pair, places, inside)[0] for pair in weights}
        _check_missing([name for name in places if name not in given], "nothing was loaded")
    with torch.no_grad():
        for pair in weights:
            name, tensor = _checked(pair, places, inside)
            places[name].write(tensor)
            missing.pop(name, None)
    num_loaded = len(places) - len(missing)
    _check_missing([*missing], f"the model now has {num_loaded} new weights beside old ones")


def _check_missing(missing: Sequence[str], state: str) -> None:
    if missing:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        raise ValueError(
            f"{state}, since the weights given lack {', '.join(missing[:MAX_NAMED])}{more}: one call of load_weights() "
            "takes all weights of a checkpoint, so call it again with all of them"
        )


def _checked(pair: object, places: dict[str, Place], model: "PreTrainedModel") -> tuple[str, Tensor]:
    """Return a name and a tensor that has a place; raises TypeError or ValueError for anything else."""
    parts = pair if isinstance(pair, tuple | list) else ()
    name, tensor = parts if len(parts) == 2 else (None, None)
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        got = ", ".join(type(part).__name__ for part in parts) or type(pair).__name__
        raise TypeError(f"weights must be {PAIRS}, got {got}")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor with values, got {tensor.layout} on {tensor.device}")
    if name not in places:
        raise ValueError(
            f"the checkpoint of {type(model).__name__} has no {name}: names are those of save_pretrained and "
            f"of tritonmoe.export_weights, as {next(iter(places))}"
        )
    like = places[name].like
    if tensor.shape != like.shape or tensor.is_floating_point() != like.is_floating_point():
        raise ValueError(
            f"{name} must be {like.dtype}, or what casts to it, of {tuple(like.shape)}, got {tensor.dtype} of "
            f"{tuple(tensor.shape)}"
        )
    return name, tensor


def _places(model: "PreTrainedModel", weights: dict[str, Weight], part: CheckpointPart) -> dict[str, Place]:
    """Return where the tensors of a part go on this rank: nowhere, where other ranks hold them."""
    (weight,) = [weights[name].tensor.detach() for name in part.names][:1]
    order = weights[part.names[0]].experts_of_rank
    if len(part.names) > 1:
        raise ValueError(
            f"transformers makes {next(iter(part.outputs))} of {', '.join(part.names)}, which load_weights() can't "
            "take apart: load the model again with from_pretrained()"
        )
    local, experts = _own_rows(part, weight, order)
    if part.by_expert:
        return _expert_places(model, part, local, experts)
    (name, like), *more = part.outputs.items()
    if local is not weight:
        if more or like.shape != weight.shape:
            raise _not_divided(part, weight)
        return {name: Place(like, lambda given: local.copy_(given[experts]))}
    found = converted(model, {part.names[0]: weight})
    if len(found) == 1 and found[name].data_ptr() == weight.data_ptr() and found[name].stride() == weight.stride():
        return {name: Place(like, weight.copy_)}  # a copy() of a view, as of most, has made no memory
    return _reordered(part, weight, lambda numbers: converted(model, {part.names[0]: numbers}))


def _own_rows(part: CheckpointPart, weight: Tensor, order: ExpertsOfRank | None) -> tuple[Tensor, list[int]]:
    """Return this rank's rows of a weight, and which of all rows each is; the weight itself where it is whole."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(weight, DTensor):
        return weight, list(range(len(weight)))
    if weight.placements != (Shard(0),):
        raise _not_divided(part, weight)
    rank, local = weight.device_mesh.get_local_rank(), weight.to_local()
    if order is not None:
        return local, list(order[rank])
    first = rank * -(-len(weight) // weight.device_mesh.size())  # as DTensor divides
    return local, list(range(first, first + len(local)))


def _not_divided(part: CheckpointPart, weight: Tensor) -> ValueError:
    return ValueError(
        f"{part.names[0]} is sharded as {getattr(weight, 'placements', None)}, and a rank can't tell which part of a "
        "checkpoint's tensor is its own: load before fully_shard(), or with torch.distributed.checkpoint"
    )


def _expert_places(
    model: "PreTrainedModel", part: CheckpointPart, local: Tensor, experts: list[int]
) -> dict[str, Place]:
    """Return where the tensors of each expert go: into this rank's rows, which are those of `experts`."""
    places = {name: Place(like, lambda _: None) for name, like in part.outputs.items()}
    for number, expert in enumerate(experts):
        if number == 0:
            of_one = _reordered(part, local[0], lambda numbers: converted(model, {part.names[0]: numbers.unsqueeze(0)}))
        for place, template in zip(of_one.values(), part.by_expert, strict=True):
            view = place.like
            there = local[number].as_strided(
                view.shape, view.stride(), view.storage_offset() + number * local.stride(0)
            )
            places[template.replace("*", str(expert))] = Place(there, there.copy_)
    return places


def _reordered(
    part: CheckpointPart, weight: Tensor, convert: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Place]:
    """Return the views of a weight whose elements `convert` gives in copies: asked with the numbers of the elements."""
    found = {}
    numbers = convert(torch.arange(weight.numel(), device=weight.device).view(weight.shape))
    total = 0
    for name, order in numbers.items():
        corner = int(order.flatten()[0])
        steps = [
            0 if size == 1 else int(order.select(dim, 1).flatten()[0]) - corner for dim, size in enumerate(order.shape)
        ]
        expected = torch.full((), corner, device=order.device)
        for dim, (size, step) in enumerate(zip(order.shape, steps, strict=True)):
            along = torch.arange(size, device=order.device) * step
            expected = expected + along.view([-1 if other == dim else 1 for other in range(order.dim())])
        total += order.numel()
        if not weight.is_contiguous() or not torch.equal(order, expected.expand_as(order)):
            raise ValueError(
                f"transformers computes {name} from {part.names[0]} by more than views, and load_weights() can't "
                "reverse that: load the model again with from_pretrained()"
            )
        view = weight.as_strided(order.shape, steps, weight.storage_offset() + corner)
        found[name] = Place(view, view.copy_)
    assert total == weight.numel()
    return found
