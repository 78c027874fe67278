"""What a better placement gains in each step, and what the move to it takes: integers that all ranks agree on."""

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.layer.rebalancing.better_placement import better_placements, busiest, moved_experts
from tritonmoe.layer.rebalancing.spread_experts import SpreadExperts
from tritonmoe.overlap.steps import StepKind
from tritonmoe.transports import Transport

__all__ = ["SMALLEST_GAIN", "best_placement", "experts_time", "ns_of_a_megabyte"]

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
