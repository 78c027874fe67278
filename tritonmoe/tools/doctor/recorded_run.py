"""judge_recording: why the steps of a recording of this package's layers take so long, and what would help."""

from dataclasses import dataclass
from pathlib import Path

from tritonmoe.tools.doctor.advice import Advice, advice_on
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.costs import Costs
from tritonmoe.tools.doctor.recorded_causes import known_of
from tritonmoe.tools.doctor.recorded_graph import RecordedGraph, graph_of
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["RecordedRun", "judge_recording"]


@dataclass(frozen=True)
class RecordedRun:
    """A recording, and why its steps take as long as they do."""

    recording: Recording
    built: RecordedGraph
    costs: Costs
    """What steps and exchanges cost, by the calls below."""
    calls: tuple[RecordedCall, ...]
    found: Verdict
    advice: tuple[Advice, ...]
    """What would help, by its gain."""
    limits: tuple[str, ...]
    """What it can't tell."""
    is_timeline: bool = False

    @property
    def path(self) -> Path:
        return self.recording.path

    @property
    def kinds(self) -> dict[str, int]:
        return {"recording": self.recording.size}


def judge_recording(recording: Recording) -> RecordedRun:
    """Say why the steps of a recording take as long as they do.

    Raises:
        ValueError: there is no call that all ranks have recorded, or only one rank.
    """
    built = graph_of(recording)
    known = known_of(recording, built)
    found = attribute(built.graph, known)
    advice = advice_on(recording, known.calls, known.costs, known.share * found.replayed_s, found.exposed_s)
    limits = (*built.notes, *recording.notes, *known.costs.notes)
    return RecordedRun(recording, built, known.costs, known.calls, found, tuple(advice), limits)
