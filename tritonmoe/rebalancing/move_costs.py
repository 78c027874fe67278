"""What a better placement gains in each step, and what the move to it takes: integers that all ranks agree on."""

import time
from collections.abc import Sequence

import torch

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.overlap.steps import StepKind
from tritonmoe.rebalancing.better_placement import better_placements, busiest, moved_experts
from tritonmoe.rebalancing.spread_experts import SpreadExperts
from tritonmoe.transports import Transport

__all__ = ["SMALLEST_GAIN", "best_placement", "experts_time", "ns_of_a_megabyte"]

SMALLEST_GAIN = 0.03
"""Experts move where that takes this share from the busiest rank: less is within what loads of steps differ by."""
EXPERTS = (StepKind.EXPERTS, StepKind.EXPERTS_BACKWARD, StepKind.WEIGHT_GRAD)
PROBE_BYTES = 2**20
PROBES = 3


def experts_time(experts: SpreadExperts) -> tuple[int, int]:
    """Return the nanoseconds that the experts' last call computed on this rank, backward too, and of how many pairs.

    Reading them waits for the end of that call on a device.
    """
    report = experts.calls.last_report
    if report is None:
        return 0, 0
    passes = [report.forward] + ([] if report.backward is None else [report.backward])
    seconds = sum(one.lane_s(*EXPERTS) for one in passes)
    return round(seconds * 1e9), report.pair_offsets[-1]


def ns_of_a_megabyte(transport: Transport, device: torch.device) -> int:
    """Return how long this rank takes to send and receive 2**20 bytes, in nanoseconds; every rank calls it."""
    rank, size = transport.rank, transport.size
    rows = torch.zeros(1, PROBE_BYTES, dtype=torch.uint8, device=device)
    to = [int(other == (rank + 1) % size) for other in range(size)]
    came = [int(other == (rank - 1) % size) for other in range(size)]
    times = []
    for _ in range(PROBES):
        transport.barrier()
        began = time.perf_counter()
        transport.exchange(rows, to, came).wait()[0, 0].item()  # a device orders its stream alone
        times.append(time.perf_counter() - began)
    return max(1, round(min(times) * 1e9))


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
