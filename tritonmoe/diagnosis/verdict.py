"""The doctor's verdict: in words for a terminal, and as JSON."""

from tritonmoe.diagnosis.attribution import Attribution, Finding, Gain
from tritonmoe.diagnosis.run_figures import figures_of
from tritonmoe.runtime.files import Json

__all__ = ["as_json", "as_text"]

MOST_FINDINGS = 5
MOST_OTHERS = 3
MOST_ADVICE = 4
MOST_LINES = 20
LEAST_NOTES = 3


def as_text(found: Attribution) -> str:
    """Give the verdict in at most 20 lines."""
    call, recording = found.call, found.recording
    kind = "forward and backward" if call.has_backward else "forward"
    ranks = f"{recording.size} ranks, {recording.transport}"
    replayed = f"replayed {1e3 * found.replayed_s:.1f} ms ({found.error:+.1%})"
    lines = [
        f"{recording.path}: {ranks}, {found.num_calls} calls ({kind}) of {call.plan}",
        f"measured {1e3 * found.measured_s:.1f} ms a call, {replayed}",
    ]
    if not found.is_explained:
        lines.append("UNEXPLAINED: the replay is off by more than 10 %, so nothing below is certain. What doesn't fit:")
        lines += [f"  {words}" for words in found.misfits] or ["  no kind of step alone"]
    if found.is_healthy:
        lines.append("HEALTHY: no cause costs 8 % of the step")
    for number, one in enumerate(found.findings[:MOST_FINDINGS], 1):
        lines.append(f"{number}. {one.kind.upper()}: {_share(one.gain, found)}: {one.words}")
    if len(found.findings) > 1:
        lines.append(f"all of these and what is below together: {_share(found.together, found)}; causes overlap")
    for advice in found.advice[:MOST_ADVICE]:
        costs = f"; it {advice.costs}" if advice.costs else ""
        lines.append(f"would help: {advice.words}: {advice.gain.share(found.replayed_s):.0%} less{costs}")
    small = [_in_short(one, found) for one in found.others if one.kind != "expert compute"]
    if small:
        lines.append("below 8 % or not certain: " + ", ".join(small[:MOST_OTHERS]))
    lines += [_in_short(one, found) + " (the bound, no fault)" for one in found.others if one.kind == "expert compute"]
    lines += [f"note: {note}" for note in found.notes[: max(LEAST_NOTES, MOST_LINES - len(lines))]]
    return "\n".join(lines)


def _share(gain: Gain, found: Attribution) -> str:
    low, high = (value / found.replayed_s for value in (gain.low_s, gain.high_s))
    share = gain.seconds / found.replayed_s
    return f"without it {share:.0%} less ({low:.0%} to {high:.0%}), {1e3 * gain.seconds:.1f} ms"


def _in_short(one: Finding, found: Attribution) -> str:
    return f"{one.kind} {one.gain.seconds / found.replayed_s:.0%}"


def as_json(found: Attribution) -> Json:
    """Give the verdict with all its figures, as plain values."""
    return {
        "recording": str(found.recording.path),
        "ranks": found.recording.size,
        "transport": found.recording.transport,
        "headers": list(found.recording.headers),
        "calls": found.num_calls,
        "plan": str(found.call.plan),
        "measured_s": found.measured_s,
        "replayed_s": found.replayed_s,
        "error": found.error,
        "is_explained": found.is_explained,
        "is_healthy": found.is_healthy,
        "findings": [_plain(one, found) for one in found.findings],
        "others": [_plain(one, found) for one in found.others],
        "advice": [{"words": one.words, "costs": one.costs, **_plain_gain(one.gain, found)} for one in found.advice],
        "together": _plain_gain(found.together, found),
        "misfits": list(found.misfits),
        "link": {"latency_s": found.costs.link.latency_s, "bytes_per_s": found.costs.link.bytes_per_s},
        "link_ratios": found.costs.ratios.link.tolist(),
        "link_excess_s": found.costs.ratios.excess_s.tolist(),
        "port_ratios": {"out": found.costs.ratios.port_out.tolist(), "in": found.costs.ratios.port_in.tolist()},
        "slowness": list(found.costs.slowness),
        "notes": list(found.notes),
        **figures_of(found),
    }


def _plain(one: Finding, found: Attribution) -> Json:
    return {
        "kind": one.kind,
        "ranks": list(one.ranks),
        "words": one.words,
        "is_certain": one.is_certain,
        **_plain_gain(one.gain, found),
    }


def _plain_gain(gain: Gain, found: Attribution) -> Json:
    return {
        "gain_s": gain.seconds,
        "low_s": gain.low_s,
        "high_s": gain.high_s,
        "share": gain.share(found.replayed_s),
    }
