"""PlacedRows: the rows of experts in the order of a placement, which a state dict shows in the order of the model.

A parameter of spread experts is a DTensor of slots: rank k holds the rows of its slots. In a state dict the same memory
stands behind a DTensor of experts, whose local tensor is PlacedRows: torch.distributed.checkpoint asks it for its
chunks of the whole tensor, writes these and reads into these, and full_tensor() gives the model's order. What torch
would compute from the place of a row alone is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn, strided

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem
    from torch.distributed.tensor import DTensor

__all__ = ["ExpertsOfRank", "PlacedRows", "in_model_order", "is_in_model_order", "local_rows", "placed_rows_of"]

ExpertsOfRank = tuple[tuple[int, ...], ...]
"""The expert in each slot of each rank: ExpertPlacement.experts_of_rank."""

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
KEEP_ROWS = (
    *(aten.detach, aten.clone, aten._to_copy, aten.alias, aten.copy_, aten.zero_),
    *(aten.zeros_like, aten.empty_like, aten.new_empty),
)
"""What gives rows of the same experts; so does every pointwise operation."""


class _Run(NamedTuple):
    """Neighbouring slots that hold neighbouring experts."""

    slot: int
    expert: int
    length: int


def is_in_model_order(experts_of_rank: ExpertsOfRank) -> bool:
    """Return whether the slots of all ranks, one behind the other, are the experts in their order."""
    return all(expert == number for number, expert in enumerate(e for held in experts_of_rank for e in held))


class PlacedRows(Tensor):
    """This rank's rows of a tensor with a row, or several, for each expert; `rows` shares the parameter's memory."""

    rows: Tensor
    experts_of_rank: ExpertsOfRank
    rank: int

    @staticmethod
    def __new__(cls, rows: Tensor, experts_of_rank: ExpertsOfRank, rank: int) -> "PlacedRows":
        self = Tensor._make_wrapper_subclass(
            cls, rows.shape, strides=rows.stride(), dtype=rows.dtype, device=rows.device, requires_grad=False
        )
        self.rows, self.experts_of_rank, self.rank = rows, experts_of_rank, rank
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]  # PyTorch's takes Any
        return f"PlacedRows(experts {self.experts_of_rank[self.rank]}, {self.rows})"

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., "PlacedRows"], tuple[object, ...]]:
        return PlacedRows, (self.rows, self.experts_of_rank, self.rank)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch declares a plain function
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, PlacedRows)]
        first = given[0]
        if func.overloadpacket is c10d.all_gather_into_tensor:
            return first._gathered(*args[1:], **kwargs)
        if func.overloadpacket is aten.constant_pad_nd:  # before they are gathered, which pads the whole
            return first
        is_same_view = func.overloadpacket is aten.view and list(args[1]) == list(first.shape)
        if not is_same_view and func.overloadpacket not in KEEP_ROWS and torch.Tag.pointwise not in func.tags:
            raise ValueError(
                f"{func} is not defined for experts in a state dict, whose rows lie as a placement says: compute with "
                "the parameters of the module, or with full_tensor()"
            )
        if any(isinstance(value, Tensor) and value.dim() for value in args if not isinstance(value, PlacedRows)):
            raise ValueError(
                "experts in a state dict, whose rows lie as a placement says, are computed with a tensor whose rows "
                "don't: take both from state_dict(), or compute with full_tensor()"
            )
        if any(other.experts_of_rank != first.experts_of_rank for other in given):
            raise ValueError(
                "these experts come from state dicts before and after a rebalance(), and their rows belong to "
                "different experts: take both from the same placement, or compute with full_tensor()"
            )
        plain = [_plain(value) for value in args]
        found = func(*plain, **{name: _plain(value) for name, value in kwargs.items()})
        if found is first.rows:  # in place
            return first
        if not isinstance(found, Tensor) or found.shape != first.rows.shape:
            return found
        return PlacedRows(found, first.experts_of_rank, first.rank)

    @property
    def rows_of_expert(self) -> int:
        """How many rows an expert has: 1, but in the A of PEFT's adapters."""
        return self.rows.shape[0] // len(self.experts_of_rank[self.rank])

    def _gathered(self, *arguments: object, **keywords: object) -> Tensor:
        """Return all ranks' rows in the order of the model, of a replica those of its first owner.

        As torch expects, as many for each rank: where these don't divide the experts, zeros come last.
        """
        gathered = c10d.all_gather_into_tensor(self.rows.contiguous(), *arguments, **keywords)
        by_slot = c10d.wait_tensor(gathered).unflatten(0, (-1, self.rows_of_expert))
        every = [expert for held in self.experts_of_rank for expert in held]
        slots = torch.tensor([every.index(expert) for expert in range(1 + max(every))], device=by_slot.device)
        whole = by_slot.index_select(0, slots).flatten(0, 1)
        missing = -len(whole) % len(self.experts_of_rank)
        return torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])

    # What torch.distributed.checkpoint asks for

    def _runs(self, *, is_written: bool) -> Iterator[_Run]:
        """Return the runs of this rank's slots; those to be written leave out replicas that a lower rank has."""
        lower = {expert for held in self.experts_of_rank[: self.rank] for expert in held} if is_written else set()
        held = self.experts_of_rank[self.rank]
        slots = [slot for slot, expert in enumerate(held) if expert not in lower]
        starts = [
            number
            for number, slot in enumerate(slots)
            if number == 0 or slots[number - 1] != slot - 1 or held[slots[number - 1]] != held[slot] - 1
        ]
        for begin, end in pairwise([*starts, len(slots)]):
            yield _Run(slots[begin], held[slots[begin]], end - begin)

    def _chunk(self, run: _Run) -> "ChunkStorageMetadata":
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        each, rest = self.rows_of_expert, self.rows.shape[1:]
        return ChunkStorageMetadata(
            offsets=torch.Size([run.expert * each, *[0 for _ in rest]]), sizes=torch.Size([run.length * each, *rest])
        )

    def __create_write_items__(self, fqn: str, object: "DTensor") -> "list[WriteItem]":
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.rows)
        chunks = [self._chunk(run) for run in self._runs(is_written=True)]
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=object.size()),
            )
            for chunk in chunks
        ]

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        return [self._chunk(run) for run in self._runs(is_written=False)]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        runs = [run for is_written in (False, True) for run in self._runs(is_written=is_written)]
        each = self.rows_of_expert
        run = next(run for run in runs if torch.Size([run.expert * each, *[0] * (self.rows.dim() - 1)]) == index.offset)
        return self.rows.narrow(0, run.slot * each, run.length * each)


def _plain(value: object) -> object:
    return value.rows if isinstance(value, PlacedRows) else value


def in_model_order(tensor: "DTensor", experts_of_rank: ExpertsOfRank) -> "DTensor":
    """Return a DTensor of slots as one of experts in the model's order, of the same memory.

    Raises:
        ValueError: FSDP2 has sharded it over replicas besides.
    """
    from torch.distributed.tensor import DTensor, Shard

    if placed_rows_of(tensor) is not None or is_in_model_order(experts_of_rank):
        return tensor
    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(
            f"experts that lie as {tensor.placements}, or a state of an optimizer for them, and whose order a "
            "placement gives, have no state dict: leave them out of fully_shard "
            "(ignored_params=set(tritonmoe.expert_parameters(module))), take an optimizer whose states lie as the "
            "parameters do (AdamW, SGD, Adagrad), or use no placement"
        )
    local = tensor.to_local().detach()
    rows = PlacedRows(local, experts_of_rank, tensor.device_mesh.get_local_rank())
    num_experts = 1 + max(max(held) for held in experts_of_rank)
    shape = torch.Size([num_experts * rows.rows_of_expert, *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, tensor.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def placed_rows_of(tensor: object) -> PlacedRows | None:
    """Return the local tensor of what in_model_order() has made; None for anything else."""
    local = getattr(tensor, "_local_tensor", None)
    return local if isinstance(local, PlacedRows) else None


def local_rows(what: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's memory of a tensor with the experts in its first dimension, as the parameter has them.

    It is not detached: autograd is to see that a forward's weights have changed before its backward.

    Raises:
        ValueError: it doesn't lie as a parameter of spread experts does.
    """
    shape = tuple(parameter.shape)
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import Shard

        if tuple(getattr(parameter, "placements", ())) != (Shard(0),):
            raise ValueError(
                f"{what} lies as {getattr(parameter, 'placements', None)}, so it is sharded over replicas too, and "
                "only whole experts can move: leave the experts out of fully_shard "
                "(ignored_params=set(tritonmoe.expert_parameters(model)))"
            )
        if hasattr(tensor, "to_local"):
            lies = tuple(getattr(tensor, "placements", ()))
            if lies != (Shard(0),):
                raise ValueError(
                    f"{what} lies as {lies}, not like its parameter, and tm.rebalance can move only states that lie "
                    "like the parameter: take an optimizer whose states are like the parameter (AdamW, SGD, Adagrad)"
                )
            local = tensor.to_local() if tensor.shape[0] == shape[0] else None
        else:
            local = tensor if tensor.shape == parameter.to_local().shape else None
    else:
        is_by_expert = tensor.dim() and tensor.shape[0] == shape[0]
        # Experts by experts, as a preconditioner of the first dimension is, and no dimension of the weight's own.
        is_of_pairs = shape[0] > 1 and shape[0] in tensor.shape[1:] and shape[0] not in shape[1:]
        local = tensor if is_by_expert and not is_of_pairs else None
    if local is None or type(local) not in (Tensor, nn.Parameter) or local.layout != strided:
        raise ValueError(
            f"{what} is a {type(tensor).__name__} {tuple(tensor.shape)} for a parameter {shape}, and tm.rebalance "
            "can't tell which part belongs to an expert: it moves tensors with the experts in their first dimension, "
            "as the states of AdamW, SGD and Adagrad have"
        )
    return local
