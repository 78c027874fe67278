"""better_placements: placements under which the busiest rank has less to do, found from the load of each expert.

Every rank finds the same ones: loads are integers that all ranks have summed, and nothing else decides.
"""

from collections.abc import Iterator, Sequence

import torch

from tritonmoe.dispatch.placement import ExpertPlacement

__all__ = ["better_placements", "busiest", "moved_experts"]

SHARE = 720720
"""The pairs of one copy of an expert are counted in this part of a pair, which 1 to 16 copies divide."""


def better_placements(load: Sequence[int], placement: ExpertPlacement) -> Iterator[ExpertPlacement]:
    """Return placements with as many slots, each with a less busy busiest rank than the one that it begins from.

    First the given one after one exchange of two experts, after two, and so on: those that move few experts. Then one
    made from the load alone, with other replicas where there are some, by the same ranks as far as that can be.

    Args:
        load: the pairs of each expert.
    Example:
        load [9, 8, 1, 2] and the placement ((0, 1), (2, 3)), 17 pairs on rank 0: exchanging the experts 0 and 3 gives
        ((3, 1), (2, 0)), 10 pairs on each.
    """
    yield from _exchanged(load, placement)
    balanced = ExpertPlacement.balanced(torch.tensor(load, device="cpu"), placement.size, placement.num_slots)
    *_, fresh = balanced, *_exchanged(load, balanced)
    yield _by_the_same_ranks(fresh, placement)


def busiest(load: Sequence[int], placement: ExpertPlacement) -> float:
    """Return the pairs of the busiest rank, where an expert's copies share its pairs evenly."""
    return max(_loads_of_ranks(_loads_of_copies(load, placement), placement)) / SHARE


def moved_experts(before: ExpertPlacement, after: ExpertPlacement) -> tuple[list[int], list[int]]:
    """Return how many experts every rank sends, and how many it receives, from one placement to the other."""
    sent, received = [0] * before.size, [0] * before.size
    for rank, held in enumerate(after.experts_of_rank):
        for expert in held:
            source, _ = source_of(expert, rank, before)
            if source != rank:
                sent[source] += 1
                received[rank] += 1
    return sent, received


def source_of(expert: int, rank: int, before: ExpertPlacement) -> tuple[int, int]:
    """Return from which rank, and which of its slots, `rank` takes an expert: from itself where it holds it."""
    owners = before.owners(expert)
    source = rank if rank in owners else owners[rank % len(owners)]
    return source, before.experts_of_rank[source].index(expert)


def _loads_of_copies(load: Sequence[int], placement: ExpertPlacement) -> list[int]:
    copies = [0] * placement.num_experts
    for held in placement.experts_of_rank:
        for expert in held:
            copies[expert] += 1
    return [pairs * SHARE // number for pairs, number in zip(load, copies, strict=True)]


def _loads_of_ranks(of_copy: Sequence[int], placement: ExpertPlacement) -> list[int]:
    return [sum(of_copy[expert] for expert in held) for held in placement.experts_of_rank]


def _exchanged(load: Sequence[int], placement: ExpertPlacement) -> Iterator[ExpertPlacement]:
    """Return the placement after each exchange of an expert of the busiest rank, the best one first."""
    of_copy = _loads_of_copies(load, placement)
    held = [list(experts) for experts in placement.experts_of_rank]
    while (found := _best_exchange(of_copy, held)) is not None:
        (rank, slot), (other, other_slot) = found
        held[rank][slot], held[other][other_slot] = held[other][other_slot], held[rank][slot]
        yield ExpertPlacement(tuple(map(tuple, held)))


def _best_exchange(of_copy: Sequence[int], held: list[list[int]]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the two slots whose exchange relieves the busiest rank most; None where none does.

    That is the exchange after which the busier one of both ranks is the least busy, and the first one of several.
    """
    loads = torch.tensor([[of_copy[expert] for expert in experts] for experts in held], device="cpu")  # (W, L)
    of_rank = loads.sum(1)
    rank = int(of_rank.argmax())
    less = loads[rank][:, None, None] - loads[None]  # (L, W, L): what an exchange takes from the busiest rank
    after = torch.maximum(of_rank[rank] - less, of_rank[None, :, None] + less)
    is_there = torch.tensor(
        [[[a in other or b in held[rank] for b in other] for other in held] for a in held[rank]],
        device="cpu",
    )  # of replicas a rank holds one
    after = after.masked_fill(is_there, torch.iinfo(torch.int64).max)
    number = int(after.flatten().argmin())
    if int(after.flatten()[number]) >= int(of_rank[rank]):
        return None
    size, num_slots = loads.shape
    return (rank, number // (size * num_slots)), (number // num_slots % size, number % num_slots)


def _by_the_same_ranks(fresh: ExpertPlacement, before: ExpertPlacement) -> ExpertPlacement:
    """Return a placement whose ranks, and slots, are numbered so that few experts move."""
    pairs = sorted(
        (-len(set(group) & set(held)), rank, number)
        for rank, held in enumerate(before.experts_of_rank)
        for number, group in enumerate(fresh.experts_of_rank)
    )
    group_of: dict[int, int] = {}
    for _, rank, number in pairs:
        if rank not in group_of and number not in group_of.values():
            group_of[rank] = number
    placed = []
    for rank, held in enumerate(before.experts_of_rank):
        group = fresh.experts_of_rank[group_of[rank]]
        coming = iter([expert for expert in group if expert not in held])
        placed.append(tuple(expert if expert in group else next(coming) for expert in held))
    return ExpertPlacement(tuple(placed))
