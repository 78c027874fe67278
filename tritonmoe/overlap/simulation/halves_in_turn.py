"""How long the halves of a batch take that run in turn: their calls' phases, walked in the order of two_batches()."""

from collections.abc import Sequence

import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward, phase_ends
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.overlap.simulation.simulator import SimulatedStep, Simulation, Walk, WalkedPass
from tritonmoe.overlap.simulation.step_costs import StepCosts
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork

__all__ = ["MOST_LAYERS", "simulate_two_batches"]

MOST_LAYERS = 8
"""So many layers are enough to see what one of a longer stack takes, whose ends weigh nothing."""


def simulate_two_batches(
    plan: OverlapPlan,
    work: LayerWork | TwoLevelWork,
    costs: StepCosts,
    link: LinkCosts,
    beside_s: Sequence[float],
    num_layers: int,
    *,
    num_fillers: int = 0,
) -> list[Simulation]:
    """Return the simulated forward and, with two numbers in beside_s, the backward of a stack of layers in two halves.

    Ranks agree before each pass of a call: that takes a latency, behind the other half's rows.

    Args:
        work: of a call of one half; both are alike.
        beside_s: the seconds of compute that the rest of the model takes with one half before each layer's experts, in
            forward, and behind them, in backward.
        num_fillers: as in build_forward.
    Example:
        W=2, one layer, one row each way that takes 1 s, experts of 1 s, nothing beside them: dispatches until 1 and 2,
        experts until 2 and 3, combines until 3 and 4: 4 s, and one half after the other 6 s.
    """
    schedules = [build_forward(plan, num_fillers)]
    if len(beside_s) == 2:
        schedules.append(build_backward(plan, needs_x=True, needs_topk_weights=True))
    return [
        _simulate_pass(schedule, Walk(plan, work, costs, link), seconds, num_layers, is_backward=number == 1)
        for number, (schedule, seconds) in enumerate(zip(schedules, beside_s, strict=True))
    ]


def _simulate_pass(
    schedule: Schedule, walk: Walk, beside_s: float, num_layers: int, *, is_backward: bool
) -> Simulation:
    posted, computed = phase_ends(schedule)
    beside = torch.full_like(walk.now, beside_s)
    steps: list[SimulatedStep] = []
    of_halves: list[WalkedPass] = []
    for layer in range(num_layers + 1):
        before, of_halves = of_halves, []
        for half in range(2):  # each ends one layer and begins the next, up to its first handover there
            if layer > 0:
                before[half].go_on()
                steps += before[half].steps
            if layer > 0 if is_backward else layer < num_layers:
                walk.compute(beside)
            if layer < num_layers:
                if walk.work.size > 1:
                    walk.wait(walk.post(0, None))
                of_halves.append(WalkedPass(walk, schedule))
                of_halves[half].go_on(posted)
        for walked in of_halves:
            walked.go_on(computed)
    return Simulation(steps, walk.now)
