"""Steps of traces in which none are marked: what repeats in the order of exchanges."""

from collections.abc import Sequence

from tritonmoe.tools.doctor.trace import Part, RankTrace, Step

__all__ = ["mark_steps"]

REPEATED = 0.97
"""So many of the exchanges must be what was so many exchanges before."""
MOST_EXCHANGES = 4096


def mark_steps(traces: Sequence[RankTrace], limits: list[str]) -> None:
    """Mark steps in traces without any, the same ones on every rank; say how they were found."""
    common = _common(traces)
    period, first = _period([(part.kind, part.group) for part in common[0]])
    count = (len(common[0]) - first - 1) // period if period else 0  # the last step has no end before another begins
    if count < 3:
        limits.append("no steps are marked, and nothing repeats: the whole recording counts as one step")
        period, first, count = len(common[0]), 0, 1
    else:
        limits.append(
            f"no steps are marked: the same exchanges repeat after {period} exchanges, which count as one step"
        )
    for trace, parts in zip(traces, common, strict=True):
        ends = [part.start_s if part.end_s is None else part.end_s for part in parts]
        trace.steps = []
        for index in range(count):
            own = slice(first + index * period, first + (index + 1) * period)
            after = own.stop < len(parts)
            end_s = parts[own.stop].posted_s if after else max(ends[own]) + 1e-9
            trace.steps.append(Step(index, parts[own.start].posted_s, end_s))
        trace.parts = parts


def _common(traces: Sequence[RankTrace]) -> list[list[Part]]:
    """Return each trace's exchanges that all traces of that group have: dumps keep the last so many of each rank."""
    known = [{(part.group, part.sequence) for part in trace.parts if part.sequence is not None} for trace in traces]
    found = []
    for trace in traces:
        parts = []
        for part in trace.parts:
            name = (part.group, part.sequence)
            others = [
                one for one, of in zip(known, traces, strict=True) if any(p.group == part.group for p in of.parts[:1])
            ]
            if part.sequence is None or all(name in one for one in others):
                parts.append(part)
        found.append(parts)
    shortest = min(len(parts) for parts in found)
    if not shortest:
        raise ValueError(
            f"{traces[0].source} and the other files have no exchange in common: dump all ranks at one time"
        )
    return [parts[-shortest:] for parts in found] if len({len(parts) for parts in found}) > 1 else found


def _period(tokens: Sequence[object]) -> tuple[int, int]:
    """Return the smallest number of exchanges after which they repeat, and the first from where they do; 0 for none."""
    tokens = tokens[-MOST_EXCHANGES:]
    count = len(tokens)
    for period in range(1, count // 3 + 1):
        start = 0
        alike = [tokens[place] == tokens[place + period] for place in range(count - period)]
        while start < len(alike) and not alike[start]:
            start += 1
        tail = alike[start:]
        if len(tail) >= 2 * period and sum(tail) >= REPEATED * len(tail) and start <= count // 2:
            if period == 1 and len(set(tokens[start:])) == 1 and count - start < 3:
                continue
            return period, start
    return 0, 0
