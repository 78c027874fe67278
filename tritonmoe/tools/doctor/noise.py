"""gain_of_noise: what a run would seem to gain without its causes if there were none: noise alone has some."""

import copy
import statistics
from dataclasses import replace

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.usual import Usual, usual_of
from tritonmoe.tools.doctor.walk import Walker

__all__ = ["gain_of_noise"]

MOST_RUNS, FEWEST_RUNS = 8, 2
MOST_OPERATIONS = 1_000_000
"""In all runs together: of many operations each run gains about the same."""


def gain_of_noise(graph: Graph, usual: Usual, walker: Walker) -> float:
    """Return the seconds of a step that removing all causes gains in runs of the same noise and of no cause.

    In such a run every operation takes what is usual, and the noise of another operation of its kind: what operations
    differ by, without what is due to something, is dealt out anew among the ranks, of each key in each step.
    """
    tables, draw = graph.tables, torch.Generator(device="cpu").manual_seed(0)
    num_steps = len(graph.steps)
    run_places = tables.run_key * num_steps + tables.run_step
    member_places = tables.member_key * num_steps + tables.member_step
    level_busy_s, level_transfer_s = usual.level_busy_s - usual.of_rows_s, usual.level_transfer_s - usual.of_bytes_s
    gains = []
    for _ in range(max(FEWEST_RUNS, min(MOST_RUNS, MOST_OPERATIONS // max(1, len(tables.run_key))))):
        run_of, member_of = (_dealt(places, draw) for places in (run_places, member_places))
        busy_s = (level_busy_s + (usual.busy_s - usual.level_busy_s)[run_of]).clamp(min=0)
        idle_s = (usual.level_idle_s + (usual.idle_s - usual.level_idle_s)[run_of]).clamp(min=0)
        transfer_s = level_transfer_s + (usual.transfer_s - usual.level_transfer_s)[member_of]
        healthy = copy.copy(graph)
        healthy.tables = replace(tables, busy_s=busy_s, idle_s=idle_s, transfer_s=transfer_s)
        found = usual_of(healthy)
        as_it_is = walker.step_times(healthy.tables.run_s, transfer_s)
        without = walker.step_times(
            (found.busy_s - found.of_rows_s + found.idle_s + tables.overhead_s).clamp(min=0),
            found.transfer_s - found.of_bytes_s,
        )
        gains.append(statistics.fmean(as_it_is) - statistics.fmean(without))
    return max(0.0, *gains)


def _dealt(places: Tensor, draw: torch.Generator) -> Tensor:
    """Return for each operation another one (or itself) of the same place, drawn without putting back."""
    shuffled = torch.randperm(len(places), generator=draw)
    found = torch.empty_like(places)
    found[places.argsort(stable=True)] = shuffled[places[shuffled].argsort(stable=True)]
    return found
