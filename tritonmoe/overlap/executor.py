"""Runs a schedule: computes what is on the compute lane, posts what is on the comm lane, waits where a step needs it.

The same loop serves every transport and device: the only place where it meets communication is
PendingExchange.wait(). What a step does is in the passes (overlap/layer_pass.py, overlap/node_pass.py).
"""

from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

import torch

from tritonmoe.errors import TransportError
from tritonmoe.overlap.report import ExchangeMarks, Mark, PassReport, StepMarks, mark
from tritonmoe.overlap.schedule import Schedule, phase_ends
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.transports import PendingExchange
from tritonmoe.transports.waiting import Doing

__all__ = ["Actions", "Phases", "execute", "execute_in_phases", "run_all_phases"]

Result = TypeVar("Result")
Phases = Generator[None, None, Result]
"""Work that can be left twice, after its first and after its second phase, and goes on where it was left."""

Actions = Mapping[StepKind, Callable[..., PendingExchange | None]]
"""What a step of each kind does: it takes the step's chunk, unless the step is of the whole layer, and gives back the
exchange that it posted, if its lane is comm."""


def execute(schedule: Schedule, actions: Actions, device: torch.device, call: str = "") -> PassReport:
    """Run the steps in order, and give their timings; call: names the layer call to whoever waits long."""
    return run_all_phases(execute_in_phases(schedule, actions, device, call))


def run_all_phases(phases: Phases[Result]) -> Result:
    """Run all phases, one behind the other, and give the result."""
    while True:
        try:
            next(phases)
        except StopIteration as end:
            return end.value


def execute_in_phases(schedule: Schedule, actions: Actions, device: torch.device, call: str) -> Phases[PassReport]:
    """Do what execute() does, in three phases: see schedule.phase_ends()."""
    report = PassReport(device)
    posted: dict[int, tuple[Mark, Mark, PendingExchange]] = {}
    ends = phase_ends(schedule)
    for position, step in enumerate(schedule):
        for _ in range(ends.count(position)):
            yield
        for earlier in step.after:
            if earlier in posted:
                report.exchanges.append(_wait(schedule[earlier], *posted.pop(earlier), device, call))
        started = mark(device)
        pending = _run(step, actions)
        if pending is None:
            report.computed.append(StepMarks(step, started, mark(device)))
        else:
            posted[position] = (started, mark(device), pending)
    for _ in range(ends.count(len(schedule))):
        yield
    report.end()
    return report


def _run(step: Step, actions: Actions) -> PendingExchange | None:
    """Return the exchange that a step posts; None where it computes."""
    action = actions[step.kind]
    try:
        pending = action() if step.chunk is None else action(step.chunk)
    except TransportError as error:
        raise _at_step(step, error) from error
    if (pending is None) != (step.lane == "compute"):
        raise TypeError(f"step {step} is on the {step.lane} lane, and its action gave {pending!r}")
    return pending


def _wait(
    step: Step, started: Mark, posted: Mark, pending: PendingExchange, device: torch.device, call: str
) -> ExchangeMarks:
    """Wait for an exchange, and give its times: they are all that is kept, since an exchange would keep its buffers."""
    before = mark(device)
    try:
        with Doing(lambda: _words(step, call)):
            pending.wait()
    except TransportError as error:
        raise _at_step(step, error) from error
    after = mark(device)
    if device.type != "cpu":
        return ExchangeMarks(step, started, posted, before, after, None)
    return ExchangeMarks(step, started, posted, before, after, pending.finished_at(), pending.arrivals())


def _at_step(step: Step, error: TransportError) -> TransportError:
    """Say where in the layer an exchange failed; the error itself says on which rank."""
    return TransportError(f"{_words(step)}: {error}")


def _words(step: Step, call: str = "") -> str:
    where = "all chunks" if step.chunk is None else "local rows" if step.chunk < 0 else f"chunk {step.chunk}"
    return ", ".join([f"step {step.kind}", where, *([f"of {call}"] if call else ())])
