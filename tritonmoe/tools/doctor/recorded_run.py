"""judge_recording: why the steps of a recording of this package's layers take so long, and what would help."""

from collections import defaultdict
from dataclasses import dataclass

from tritonmoe.tools.doctor.advice import Advice, advice_on
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.causes import Known
from tritonmoe.tools.doctor.costs import Costs, fit_costs
from tritonmoe.tools.doctor.reading import ReadRun
from tritonmoe.tools.doctor.recorded_graph import RecordedGraph, graph_of
from tritonmoe.tools.doctor.recorded_links import linked_of
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["RecordedRun", "judge_recording", "known_of"]

MOST_FITTED = 24
"""Costs are fitted to so many calls, spread over the recording."""


@dataclass(kw_only=True)
class RecordedRun(ReadRun):
    """A recording, and why its steps take as long as they do."""

    recording: Recording
    built: RecordedGraph
    costs: Costs
    """What steps and exchanges cost, by the calls below."""
    calls: tuple[RecordedCall, ...]
    found: Verdict
    advice: list[Advice]
    """What would help, by its gain."""


def judge_recording(recording: Recording) -> RecordedRun:
    """Find why the steps of a recording take as long as they do.

    Raises:
        ValueError: there is no call that all ranks have recorded, or only one rank.
    """
    built = graph_of(recording)
    known = known_of(recording, built)
    found = attribute(built.graph, known)
    advice = advice_on(recording, known.calls, known.costs, known.share * found.replayed_s, found.exposed_s)
    return RecordedRun(
        recording.path, built.graph, {"recording": recording.size}, "recording",
        [*built.notes, *recording.notes, *known.costs.notes],
        recording=recording, built=built, costs=known.costs, calls=known.calls, found=found, advice=advice,
    )  # fmt: skip


def known_of(recording: Recording, built: RecordedGraph) -> Known:
    """Find what is known of a recording beside its graph, and which links are slow, which the graph gets."""
    calls, share = _fitted_calls(built)
    costs = fit_costs(calls, recording)
    built.graph.linked_s, built.graph.fault = linked_of(recording, built, costs)
    return Known(built.step_s, built, costs, tuple(calls), share)


def _fitted_calls(built: RecordedGraph) -> tuple[list[RecordedCall], float]:
    """Return calls to fit costs to, of the layers' sizes and plan that take most time, and the share they take."""
    seconds: dict[tuple, float] = defaultdict(float)
    calls: dict[tuple, dict[int, RecordedCall]] = defaultdict(dict)
    for of in built.passes:
        call = of.call
        row_bytes = call.row_bytes, call.gradient_row_bytes, call.other_row_bytes
        key = (*call.sizes.values(), *row_bytes, call.has_backward, of.work)
        calls[key][call.sequence] = call
        seconds[key] += max(one.end for one in of.of_ranks) - min(one.entered for one in of.of_ranks)
    most = max(seconds, key=lambda key: seconds[key])
    found = list(calls[most].values())
    every = max(1, len(found) // MOST_FITTED) | 1  # odd: layers follow each other
    return found[::every], seconds[most] / sum(seconds.values())
