"""Runs a schedule: computes what is on the compute lane, posts what is on the comm lane, waits where a step needs it.

The same loop serves every transport and device: the only place where it meets communication is
PendingExchange.wait(). What a step does is in the passes (expert_parallel/layer_pass.py and plans/two_level.py there).
"""

from collections.abc import Callable, Mapping

import torch

from tritonmoe.errors import TransportError
from tritonmoe.overlap.report import Mark, PassReport, StepMarks
from tritonmoe.overlap.schedule import Schedule, phase_ends
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.runtime.streamed import waited
from tritonmoe.transports import PendingExchange
from tritonmoe.transports.waiting import Doing

__all__ = ["Actions", "Execution"]

Actions = Mapping[StepKind, Callable[..., PendingExchange | None]]
"""What a step of each kind does: it takes the step's chunk, unless the step is of the whole layer, and gives back the
exchange that it posted, if its lane is comm."""


class Execution:
    """The steps of a schedule: run() runs them all, or begin(), compute() and end() the phases of phase_ends(), so that
    other work can run between these.

    call: names the layer call to whoever waits long.
    """

    def __init__(
        self, schedule: Schedule, actions: Actions, device: torch.device, call: Callable[[], str] = str
    ) -> None:
        self._schedule, self._actions, self._call = schedule, actions, call
        self._report = PassReport(device)
        self._posted: dict[int, tuple[Mark, Mark, PendingExchange]] = {}
        self._position = 0

    def run(self) -> PassReport:
        """Run all steps that are left in order, and give the timings of all."""
        self._run_until(len(self._schedule))
        self._report.end()
        return self._report

    def begin(self) -> None:
        self._run_until(phase_ends(self._schedule)[0])

    def compute(self) -> None:
        self._run_until(phase_ends(self._schedule)[1])

    end = run

    def _run_until(self, end: int) -> None:
        report, now, posted = self._report, self._report.now, self._posted
        for position in range(self._position, end):
            step = self._schedule[position]
            for earlier in step.after:
                if earlier in posted:
                    report.ran.append(_wait(self._schedule[earlier], *posted.pop(earlier), report, self._call))
            started, waited_s, waits_around, waited.spans = now(), waited.seconds, waited.spans, ()
            try:
                pending = _run(step, self._actions)
            finally:
                loads = waited.spans or ()
                waited.spans = None if waits_around is None else (*waits_around, *loads)
            if pending is None:
                load_s = waited.seconds - waited_s
                report.ran.append(StepMarks(step, started, now(), load_s=load_s, loads=loads))
            else:
                posted[position] = (started, now(), pending)
        self._position = end


def _run(step: Step, actions: Actions) -> PendingExchange | None:
    """Return the exchange that a step posts; None where it computes."""
    action = actions[step.kind]
    try:
        pending = action() if step.chunk is None else action(step.chunk)
    except TransportError as error:
        raise _at_step(step, error) from error
    if (pending is None) != (step.kind.lane == "compute"):
        raise TypeError(f"step {step} is on the {step.lane} lane, and its action gave {pending!r}")
    return pending


def _wait(
    step: Step, started: Mark, posted: Mark, pending: PendingExchange, report: PassReport, call: Callable[[], str]
) -> StepMarks:
    """Wait for an exchange, and give its times: they are all that is kept, since an exchange would keep its buffers."""
    before = report.now()
    try:
        with Doing(lambda: _words(step, call())):
            pending.wait()
    except TransportError as error:
        raise _at_step(step, error) from error
    after = report.now()
    if report.device.type != "cpu":
        return StepMarks(step, started, after, posted, before)
    return StepMarks(step, started, after, posted, before, pending.finished_at(), pending.arrivals())


def _at_step(step: Step, error: TransportError) -> TransportError:
    """Return an error that names the step in which an exchange failed; `error` itself names the rank."""
    return TransportError(f"{_words(step)}: {error}")


def _words(step: Step, call: str = "") -> str:
    where = "all chunks" if step.chunk is None else "local rows" if step.chunk < 0 else f"chunk {step.chunk}"
    return ", ".join([f"step {step.kind}", where, *([f"of {call}"] if call else ())])
