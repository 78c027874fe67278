"""Lanes of runs as a chart of an HTML report: what every rank computed and exchanged, and when."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tritonmoe.tools.report.charts import Segment, Strip, Strips, ticks
from tritonmoe.tools.report.figures import Table
from tritonmoe.tools.report.png import COLORS, group_of
from tritonmoe.tools.report.timeline import Timeline

__all__ = ["MOST_SPANS", "lanes_chart", "ranks_within"]

MOST_SPANS = 3000
"""A page draws so many steps, and has them in its trace ..."""
MOST_RANKS = 16
"""... of so many ranks."""
CLASSES = {name: f"c{number}" for number, name in enumerate(COLORS)}
Marks = Mapping[str, float]
"""What a mark means, and its second on the timeline."""


def ranks_within(
    runs: Mapping[str, Sequence[Timeline]], most: int = MOST_SPANS, first: Iterable[int] = ()
) -> list[int]:
    """Return the ranks to draw, with at most `most` steps but at least one rank; `first` before the others."""
    size = max(map(len, runs.values()))
    order = list(dict.fromkeys([*first, *range(size)]))
    chosen: list[int] = []
    used = 0
    for rank in order:
        used += sum(len(timelines[rank].spans) for timelines in runs.values())
        if chosen and (used > most or len(chosen) == MOST_RANKS):
            break
        chosen.append(rank)
    return sorted(chosen)


def lanes_chart(
    title: str,
    runs: Mapping[str, Sequence[Timeline]],
    table: Table,
    marks: Mapping[int, Marks] | None = None,
) -> Strips:
    """Draw every rank's lanes, one run below the other, all to one scale.

    runs: name of a run -> timelines of the same ranks, in the same order.
    marks: rank -> marks, which stand on its first run's compute lane.
    """
    longest_s = max((one.total_s for timelines in runs.values() for one in timelines), default=0.0) or 1.0
    ranks = [one.rank for one in next(iter(runs.values()))]
    strips = []
    for number, rank in enumerate(ranks):
        for name, timelines in runs.items():
            timeline = timelines[number]
            heading = f"rank {rank}, {name}" if len(runs) > 1 else f"rank {rank}"
            for lane in timeline.lanes:
                segments = list(_segments(timeline, lane, longest_s))
                if marks is not None and name == next(iter(runs)) and lane == "compute":
                    segments += [
                        Segment(at / longest_s, 0.0, "mark", f"{word}: {1e3 * at:.3g} ms")
                        for word, at in marks[rank].items()
                    ]
                strips.append(Strip(lane, segments, heading=heading))
                heading = ""
    axis = ticks(1e3 * longest_s, " ms")
    return Strips(title, strips, axis, [(CLASSES[name], name) for name in COLORS], table)


def _segments(timeline: Timeline, lane: str, longest_s: float) -> Iterator[Segment]:
    for span in timeline.spans:
        width = (span.end_s - span.start_s) / longest_s
        if span.lane == lane and width >= 5e-5:  # one that rounds to nothing would look like a mark
            title = f"{span.name}: {1e3 * (span.end_s - span.start_s):.3g} ms"
            yield Segment(span.start_s / longest_s, width, CLASSES[group_of(span)], title)
