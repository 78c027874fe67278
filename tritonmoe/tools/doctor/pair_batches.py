"""as_all_to_alls: sends and receives that don't say with whom, as all-to-alls where ranks post one to each other rank.

So the layers of this package exchange rows over gloo, and what a trace has of it is its kinds and times alone.
"""

from collections.abc import Sequence

from tritonmoe.tools.doctor.trace import Part, RankTrace

__all__ = ["as_all_to_alls"]

PAIRS = ("send", "recv")


def as_all_to_alls(traces: Sequence[RankTrace], limits: list[str]) -> None:
    """Join each rank's receives from all others, and the sends to them behind these, to one exchange.

    Where any rank's don't come so, all stay as they are, and the limits say that nobody knows with whom they are.
    """
    untold = [[part for part in trace.parts if part.kind in PAIRS and part.peer is None] for trace in traces]
    if not any(untold) or len(traces) < 2:
        return
    batches = [_batches(parts, len(traces) - 1) for parts in untold]
    known = [found for found in batches if found is not None]
    if len(known) < len(traces) or len({len(found) for found in known}) > 1:
        limits.append(
            "the files don't name the other rank of sends and receives: each counts alone, and which rank waits "
            "for which is not known (tritonmoe.tools.recording.record tells for layers of this package)"
        )
        return
    for trace, parts, found in zip(traces, untold, known, strict=True):
        joined = {id(part) for part in parts}
        trace.parts = [*(part for part in trace.parts if id(part) not in joined), *map(_exchange, found)]
        trace.parts.sort(key=lambda part: part.posted_s)


def _batches(parts: Sequence[Part], num_others: int) -> list[list[Part]] | None:
    """Return so many receives and as many sends behind them, again and again; None where they don't come so."""
    ordered = sorted(parts, key=lambda part: part.posted_s)
    size = 2 * num_others
    found = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    wanted = ["recv"] * num_others + ["send"] * num_others
    return found if all([part.kind for part in batch] == wanted for batch in found) else None


def _exchange(batch: Sequence[Part]) -> Part:
    last = batch[-1]
    ends = [part.end_s for part in batch if part.end_s is not None]
    whole = Part("all_to_all", last.posted_s, last.start_s, max(ends, default=None), last.lane, last.phase)
    whole.is_noticed = last.is_noticed
    return whole
