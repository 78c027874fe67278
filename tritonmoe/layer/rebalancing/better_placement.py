"""better_placements: placements under which the busiest rank has less to do, found from the load of each expert.

Every rank finds the same ones: loads are integers that all ranks have summed, and nothing else decides.
best_placement() takes the one that gains more than its move costs, by times that all ranks have agreed on.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.layer.rebalancing.spread_experts import SpreadExperts
from tritonmoe.overlap.steps import StepKind
from tritonmoe.transports import Transport

__all__ = ["best_placement", "better_placements", "busiest", "experts_time", "moved_experts", "ns_of_a_megabyte"]

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


SMALLEST_GAIN = 0.03
"""Experts move where that takes this share from the busiest rank: less is within what loads of steps differ by."""
EXPERTS = (StepKind.EXPERTS, StepKind.EXPERTS_BACKWARD, StepKind.WEIGHT_GRAD)
PROBE_BYTES = 2**24
"""More than the bursts of links and the buffers of sockets, which hold some megabytes."""
PROBES = 2


def experts_time(experts: SpreadExperts) -> tuple[int, int]:
    """Return the nanoseconds that the experts' last call computed on this rank, backward too, and of how many pairs.

    Reading them waits for the end of that call on a device.
    """
    report = experts.shards.calls.last_report
    if report is None:
        return 0, 0
    passes = [report.forward] + ([] if report.backward is None else [report.backward])
    seconds = sum(one.lane_s(*EXPERTS) for one in passes)
    return round(seconds * 1e9), report.pair_offsets[-1]


def ns_of_a_megabyte(transport: Transport, tensors: Mapping[str, Tensor], num_slots: int) -> int:
    """Return how long 2**20 bytes of experts take to leave this rank and to come, in nanoseconds; every rank calls it.

    Each rank sends experts to the next one as a move does, all their tensors at once: as many as have PROBE_BYTES, or
    all that it has. Links let a first burst pass faster, so what counts is by how much many take longer than few.

    Args:
        tensors: what moves of a layer. num_slots: how many experts of it a rank has.
    """
    views = [tensor.unflatten(0, (num_slots, -1)) for tensor in tensors.values()]
    expert_bytes = sum(view[0].nbytes for view in views)
    many = min(num_slots, max(1, PROBE_BYTES // max(1, expert_bytes)))
    few = many // 4
    few_s, many_s = (
        min(_exchange_s(transport, [view[:number] for view in views]) for _ in range(PROBES)) if number else 0.0
        for number in (few, many)
    )
    of_expert_s = max(many_s / many, (many_s - few_s) / (many - few))
    return max(1, round(of_expert_s / max(1, expert_bytes) * 2**20 * 1e9))


def _exchange_s(transport: Transport, views: Sequence[Tensor]) -> float:
    """Return how long this rank takes to send these rows to the next one, and to write those of the one before."""
    rank, size = transport.rank, transport.size
    num_rows = len(views[0])
    to = [num_rows * (other == (rank + 1) % size) for other in range(size)]
    came = [num_rows * (other == (rank - 1) % size) for other in range(size)]
    transport.barrier()
    began = time.perf_counter()
    pending = [transport.exchange(view.clone(), to, came) for view in views]
    for exchange in pending:
        arrived = exchange.wait().clone()  # in a move they are written into the tensors
    arrived.flatten()[0].item()  # a device orders its stream alone
    return time.perf_counter() - began


def best_placement(
    load: Sequence[int], before: ExpertPlacement, ns_of_pair: float, ns_of_expert: float, num_steps: int
) -> ExpertPlacement | None:
    """Return the placement that gains most in `num_steps` steps, its move paid; None where none pays for its move.

    Args:
        load: the pairs of each expert, over some steps.
        ns_of_pair: what one of them adds to the average step of its rank.
        ns_of_expert: how long one expert travels.
    """
    was = busiest(load, before)
    best, most = None, 0.0
    for after in better_placements(load, before):
        less = was - busiest(load, after)
        price = max(map(max, moved_experts(before, after))) * ns_of_expert
        if less > SMALLEST_GAIN * was and less * ns_of_pair * num_steps - price > most:
            best, most = after, less * ns_of_pair * num_steps - price
    return best
