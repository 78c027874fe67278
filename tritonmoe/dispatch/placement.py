"""Which rank holds which experts: any permutation, and replicas of hot experts whose tokens are split between them.

Everything behind the layer's entry counts *slots*: rank k holds the slots k * L .. (k + 1) * L, and the contiguous
placement is the one whose slots are the experts. A routed pair is sent to a slot of its expert.
"""

import heapq
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.config.numbers import is_integer
from tritonmoe.ops.backends.ops import WeightGrads, accumulation_dtype
from tritonmoe.runtime.cpu_memory import to_device

__all__ = [
    "ExpertPlacement",
    "check_experts_of_rank",
    "pack_replica_grads",
    "replica_bits",
    "sum_replica_grads",
    "weight_bits",
]


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of every rank, by slot; every rank must be given an equal placement.

    It raises ValueError unless all ranks have as many slots, every expert has one, and none has two on one rank.
    Example:
        ExpertPlacement(((0, 1, 2), (3, 2, 0))) spreads E=4 experts over two ranks of three slots; experts 0 and 2 have
        a replica on each. owners(2) is (0, 1) and first_owner(2) is 0.
    """

    experts_of_rank: tuple[tuple[int, ...], ...]
    """The expert in each slot of each rank."""

    def __post_init__(self) -> None:
        ranks = self.experts_of_rank
        if not isinstance(ranks, tuple) or not all(
            isinstance(slots, tuple) and all(is_integer(expert) for expert in slots) for slots in ranks
        ):
            raise TypeError(f"experts_of_rank must be a tuple, for every rank, of tuples of expert ids, got {ranks!r}")
        if not ranks or not ranks[0] or len({len(slots) for slots in ranks}) > 1:
            raise ValueError(
                f"a placement gives every rank the same number of slots, at least one: got {[len(s) for s in ranks]}"
            )
        for rank, slots in enumerate(ranks):
            if len(set(slots)) < len(slots):
                raise ValueError(f"rank {rank} has an expert twice ({slots}): replicas belong on different ranks")
        present = {expert for slots in ranks for expert in slots}
        if present != set(range(len(present))):
            raise ValueError(f"a placement needs every expert 0..E-1 at least once, got the experts {sorted(present)}")

    @classmethod
    def contiguous(cls, num_experts: int, size: int) -> "ExpertPlacement":
        """Return rank k the experts k * E / W .. (k + 1) * E / W: what a layer does without a placement."""
        if size < 1 or num_experts % size:
            raise ValueError(f"num_experts ({num_experts}) must be divisible by size ({size}), the number of ranks")
        local = num_experts // size
        return cls(tuple(tuple(range(rank * local, (rank + 1) * local)) for rank in range(size)))

    @classmethod
    def balanced(cls, load: Tensor, size: int, num_slots: int | None = None) -> "ExpertPlacement":
        """Spread experts over `size` ranks so that each has about the same load; hot ones get replicas.

        The greedy rule of DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB): a spare slot goes to
        the expert with the largest load per replica; then replicas, the heaviest first, go to the least loaded rank.

        Args:
            load: (E,) pairs of each expert, from routing statistics summed over ranks.
            num_slots: slots of each rank, at least E / W rounded up (the default).
        Example:
            load [8, 1, 1, 2], two ranks of three slots: expert 0 gets a second replica, so does expert 3.
        """
        load = torch.as_tensor(load, device=load.device if isinstance(load, Tensor) else "cpu")
        if load.dim() != 1 or not bool((load >= 0).all()):
            raise ValueError(f"load must be (E,) numbers that are not negative, got {tuple(load.shape)}: {load}")
        if not is_integer(size) or size < 1:
            raise ValueError(f"size must be a number of ranks of at least 1, got {size!r}")
        loads = [float(value) for value in load]
        num_experts = len(loads)
        slots = -(-num_experts // size) if num_slots is None else num_slots
        if not num_experts <= slots * size <= num_experts * size:
            raise ValueError(
                f"{size} ranks of {slots} slots can't hold {num_experts} experts, each at least once and at most once "
                f"per rank: choose {-(-num_experts // size)}..{num_experts} slots"
            )
        replicas = [1] * num_experts
        for _ in range(slots * size - num_experts):
            hottest = max((e for e in range(num_experts) if replicas[e] < size), key=lambda e: loads[e] / replicas[e])
            replicas[hottest] += 1
        # The most replicated first: such an expert needs that many different ranks with room.
        order = sorted(range(num_experts), key=lambda e: (-replicas[e], -loads[e] / replicas[e], e))
        ranks: list[list[int]] = [[] for _ in range(size)]
        carried = [0.0] * size
        for expert in order:
            free = [rank for rank in range(size) if len(ranks[rank]) < slots]
            for rank in heapq.nsmallest(replicas[expert], free, key=lambda r: (carried[r], len(ranks[r]), r)):
                ranks[rank].append(expert)
                carried[rank] += loads[expert] / replicas[expert]
        if any(len(held) < slots for held in ranks):
            _fill(ranks, replicas, slots)
        return cls(tuple(tuple(sorted(held)) for held in ranks))

    @property
    def size(self) -> int:
        """W, the number of ranks."""
        return len(self.experts_of_rank)

    @property
    def num_slots(self) -> int:
        """L, the slots of one rank."""
        return len(self.experts_of_rank[0])

    @cached_property
    def num_experts(self) -> int:
        """E, the number of different experts."""
        return 1 + max(max(slots) for slots in self.experts_of_rank)

    @property
    def is_contiguous(self) -> bool:
        """Whether rank k holds the experts k * E / W .. (k + 1) * E / W, as in a layer without a placement."""
        return not self.has_replicas and self == self.contiguous(self.num_experts, self.size)

    @property
    def has_replicas(self) -> bool:
        return self.size * self.num_slots > self.num_experts

    def owners(self, expert: int) -> tuple[int, ...]:
        """Return the owners of `expert`, the ranks that hold it, in ascending order."""
        return tuple(rank for rank, slots in enumerate(self.experts_of_rank) if expert in slots)

    def first_owner(self, expert: int) -> int:
        """Return the rank whose optimizer state and checkpoint entry count for `expert`."""
        return self.owners(expert)[0]

    def shared(self, rank: int, other: int) -> tuple[int, ...]:
        """Return the experts that both ranks hold, in ascending order; none for a rank and itself."""
        if rank == other:
            return ()
        return tuple(sorted(set(self.experts_of_rank[rank]) & set(self.experts_of_rank[other])))

    @cached_property
    def _slots_of_expert(self) -> tuple[Tensor, Tensor]:
        """(E, most replicas) int64 slots, and (E,) int64 how many each expert has."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, slots in enumerate(self.experts_of_rank):
            for slot, expert in enumerate(slots):
                found[expert].append(rank * self.num_slots + slot)
        most = max(map(len, found))
        return torch.tensor([s + [-1] * (most - len(s)) for s in found], device="cpu"), torch.tensor(
            [len(s) for s in found], device="cpu"
        )

    def slots(self, topk_ids: Tensor, rank: int) -> Tensor:
        """Return the slot (T, K) int64 of each routed pair of `rank`'s tokens, -1 where the id is no expert.

        Token t takes replica (t + rank) mod n of an expert's n: an even split, known without a word to other ranks.
        """
        slots, num_replicas = (to_device(table, topk_ids.device) for table in self._slots_of_expert)
        topk_ids = topk_ids.long()  # into a narrow dtype E itself may not fit
        skipped = (topk_ids < 0) | (topk_ids >= self.num_experts)
        experts = topk_ids.masked_fill(skipped, 0)
        token = torch.arange(topk_ids.shape[0], device=topk_ids.device)[:, None] + rank
        return slots[experts, token % num_replicas[experts]].masked_fill(skipped, -1)


def _fill(ranks: list[list[int]], replicas: list[int], slots: int) -> None:
    """Put replicas that found no rank where there is room, moving others out of the way.

    Filling by the least load can leave an expert with fewer ranks that have room than it has replicas.
    """
    size = len(ranks)
    missing = [
        expert for expert, count in enumerate(replicas) for _ in range(count - sum(expert in held for held in ranks))
    ]
    for expert in missing:
        target = next(rank for rank in range(size) if len(ranks[rank]) < slots)
        if expert not in ranks[target]:
            ranks[target].append(expert)
            continue
        for rank in range(size):
            movable = next((e for e in ranks[rank] if e not in ranks[target]), None)
            if expert not in ranks[rank] and movable is not None:
                ranks[rank].remove(movable)
                ranks[target].append(movable)
                ranks[rank].append(expert)
                break
        else:
            raise AssertionError(f"no rank can take expert {expert}")


def check_experts_of_rank(
    num_local_experts: int, num_experts: int, size: int, placement: ExpertPlacement | None = None
) -> None:
    """Raise ValueError or TypeError unless num_experts can be split over `size` ranks and this rank holds its share."""
    if not is_integer(num_experts):
        raise TypeError(f"num_experts must be a whole number, E over all ranks, got {num_experts!r}")
    if placement is not None and not isinstance(placement, ExpertPlacement):
        raise TypeError(f"placement must be an ExpertPlacement or None, got {placement!r}")
    if placement is not None:
        if (placement.size, placement.num_experts) != (size, num_experts):
            raise ValueError(
                f"placement is for {placement.num_experts} experts on {placement.size} ranks, the layer has "
                f"{num_experts} experts on {size} ranks"
            )
        if num_local_experts != placement.num_slots:
            raise ValueError(
                f"placement gives each rank {placement.num_slots} slots, but this rank's gate_up_proj has "
                f"{num_local_experts} experts: pass the experts of placement.experts_of_rank[rank], in that order"
            )
        return
    if num_experts < 1 or num_experts % size:
        sizes = [w for w in range(1, num_experts + 1) if num_experts % w == 0]
        raise ValueError(
            f"num_experts ({num_experts}) must be divisible by the number of ranks ({size}); "
            f"choose one of {', '.join(map(str, sizes))} ranks"
        )
    if num_local_experts != num_experts // size:
        raise ValueError(
            f"each of {size} ranks holds num_experts / ranks = {num_experts // size} experts, but this rank's "
            f"gate_up_proj has {num_local_experts}: pass only this rank's experts"
        )


def weight_bits(needs: PerWeight[bool]) -> int:
    """Return a bit for each kind of weight that needs a gradient."""
    return sum(2**i for i, needed in enumerate(needs) if needed)


def replica_bits(placement: ExpertPlacement | None, needs_weights: PerWeight[bool]) -> int:
    """Return a bit for each kind of weight whose gradients are summed over replicas, 0 where there are no replicas."""
    return 0 if placement is None or not placement.has_replicas else weight_bits(needs_weights)


def pack_replica_grads(grads: WeightGrads, placement: ExpertPlacement, rank: int) -> tuple[Tensor, list[int]]:
    """Return what `rank` sends to the other owners of its replicas, and the rows for each of them (as many come back).

    A row is one expert: the gradients of its weights, side by side.
    """
    held = placement.experts_of_rank[rank]
    shared = [placement.shared(rank, other) for other in range(placement.size)]
    parts = [grad for grad in grads if grad is not None]
    slots = to_device(
        torch.tensor([held.index(e) for experts in shared for e in experts], device="cpu"), parts[0].device
    )
    rows = torch.cat([part.flatten(1).index_select(0, slots) for part in parts], dim=1)
    return rows, [len(experts) for experts in shared]


def sum_replica_grads(grads: WeightGrads, received: Tensor, placement: ExpertPlacement, rank: int) -> WeightGrads:
    """Add the other owners' gradients (the rows of pack_replica_grads) to this rank's, in place.

    Every owner sums in rank order and in fp32, so that all replicas get the same bits.
    """
    held = placement.experts_of_rank[rank]
    arrived: dict[int, dict[int, int]] = {}  # expert -> owner -> received row
    number = 0
    for other in range(placement.size):
        for expert in placement.shared(rank, other):
            arrived.setdefault(expert, {})[other] = number
            number += 1
    parts = [grad.flatten(1) for grad in grads if grad is not None]
    for part, columns in zip(parts, received.split([part.shape[1] for part in parts], dim=1), strict=True):
        for expert, rows in arrived.items():
            own = part[held.index(expert)]
            terms = [own if owner == rank else columns[rows[owner]] for owner in placement.owners(expert)]
            total = terms[0].to(accumulation_dtype(own.dtype))
            for term in terms[1:]:
                total = total + term
            own.copy_(total)
    return grads
