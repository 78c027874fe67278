"""The doctor's verdict on a run, ours or of others: its findings in words, in a terminal, and as JSON."""

from collections.abc import Sequence
from typing import NamedTuple

from tritonmoe.runtime.files import Json
from tritonmoe.tools.doctor.advice import Advice
from tritonmoe.tools.doctor.attribution import Cost, Finding, Verdict
from tritonmoe.tools.doctor.causes import CAUSES, Words
from tritonmoe.tools.doctor.chrome_timeline import slowdown_of
from tritonmoe.tools.doctor.culprits import phase_of
from tritonmoe.tools.doctor.graph import Graph, Key
from tritonmoe.tools.doctor.lanes import Shown, shown_of
from tritonmoe.tools.doctor.reading import ReadRun
from tritonmoe.tools.doctor.recorded_run import RecordedRun
from tritonmoe.tools.recording.call_recording import Recording
from tritonmoe.tools.report.terminal import one_line

__all__ = [
    "FindingWords",
    "about",
    "as_json",
    "as_text",
    "count_words",
    "describe_finding",
    "headline",
    "mended_words",
    "recording_of",
    "remarks",
    "step_words",
    "warnings_of",
]

ADDS_UP = 0.05
"""Costs add up to what mending all gains if they differ from that by a smaller part of it."""


class FindingWords(NamedTuple):
    """A finding in words."""

    title: str
    """The kind of the cause, in the plural where it is that of all ranks."""
    sentence: str
    to_do: str


def describe_finding(one: Finding, found: Verdict, recording: Recording | None = None) -> FindingWords:
    """Return the words of a finding; recording: the recording of this package's layers, where the run is one."""
    graph, culprits, cause = found.graph, one.culprits, CAUSES[one.kind]
    unlike = [str(stage) for stage in sorted({graph.stages[rank] for rank in culprits.ranks if cause.of_whom})]
    if cause.of_whom:
        several = "s" * (cause.of_whom == "stage" and len(unlike) != 1)
        who = f"{cause.of_whom}{several} {' and '.join(unlike)}".rstrip()
    elif culprits.links and not culprits.words:
        ways = [f"from rank {graph.ranks[i]} to rank {graph.ranks[k]}" for i, k in culprits.links]
        who = " and ".join(ways)
    elif culprits.moves and culprits.ranks:
        who = f"{graph.named(culprits.ranks)}, each in other steps,"
    elif culprits.moves:
        who = "a different rank from step to step"
    elif culprits.ranks:
        who = graph.named(culprits.ranks) + _host_words(graph, culprits.ranks)
    else:
        who = "all ranks" if len(graph.ranks) > 1 else "the rank"
    count = len(culprits.links) * (not culprits.words) or len(culprits.ranks) or len(graph.ranks)
    are_several = count > 1 and (not culprits.moves or bool(culprits.ranks)) and len(unlike) != 1
    where = [place_words(culprits.place)] if culprits.place else [f"in {culprits.phase}"] if culprits.phase else []
    where += [f"in layer {culprits.layer}"] if culprits.layer is not None else []
    hidden = "; other causes hide this cause: mending it alone gains little" if one.is_hidden else ""
    is_of_all = len(graph.ranks) > 1 and not (culprits.links or culprits.moves or culprits.ranks)
    is_of_no_rank = is_of_all and bool(cause.to_do_of_all)
    to_do = cause.to_do_of_all if is_of_no_rank else cause.to_do
    if len(graph.ranks) == 2 and cause.is_of_links:
        to_do = f"two ranks can't tell whether sender, receiver or link is at fault: check both; {to_do}"
    title = f"{one.kind}s" if is_of_no_rank else one.kind
    if cause.to_do_of_layer is not None and recording is not None:
        to_do = cause.to_do_of_layer(recording, culprits.layer)
    if one.may_be_noise:
        to_do = f"record again first, since 0 is in the interval and this may be noise; then {to_do}"
    what = cause.what(Words(culprits, len(graph.ranks), are_several))
    return FindingWords(title, f"{', '.join([f'{who} {what}', *where, str(one.when)])}{hidden}", to_do)


def mended_words(found: Verdict) -> str:
    """Return how the gain of mending all findings compares with the sum of their costs."""
    all_s, sum_s = found.mended.seconds, sum(one.cost.seconds for one in found.findings)
    if abs(all_s - sum_s) <= ADDS_UP * sum_s:
        return "their costs add up"
    if all_s < sum_s:
        return "causes overlap, so that this is less than their costs"
    return "waits hide behind each other, so that mending all gains more than mending each alone"


def _host_words(graph: Graph, ranks: Sequence[int]) -> str:
    """Return the host of which these are all ranks, in words; "" where they are not all, or the host has one rank."""
    hosts = {graph.hosts[rank] for rank in ranks} if graph.hosts else set()
    if len(hosts) != 1 or len(ranks) < 2 or graph.hosts.count(*hosts) != len(ranks):
        return ""
    return f", all of host {hosts.pop()},"


def place_words(key: Key) -> str:
    """Name a key: "before all_to_all 3 of forward"."""
    phase = phase_of(key)
    of_phase = f" of {phase}" if phase and phase == key[0] else ""
    if "before" in key:
        return f"before {key[2]} {key[3] + 1}{of_phase}"
    if len(key) == 3 and isinstance(key[2], int):
        return f"in {key[1]} {key[2] + 1}{of_phase}"
    return f"in {' '.join(map(str, key))}"


def count_words(count: int, what: str) -> str:
    """Return "1 rank", "3 ranks"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def time_words(seconds: float) -> str:
    """Return milliseconds, of long times seconds."""
    return f"{seconds:.1f} s" if abs(seconds) >= 10 else f"{1e3 * seconds:.1f} ms"


def share_words(seconds: float, found: Verdict, decimals: int = 0) -> str:
    """Return a time as a share of the whole step."""
    return f"{seconds / found.whole_s if found.whole_s else 0.0:.{decimals}%}"


def cost_words(cost: Cost, found: Verdict) -> str:
    """Return a cost with its interval, which no step can exceed: "12.1 ms a step, 14% (13% to 15%)"."""
    seconds, low_s, high_s = (min(value, found.whole_s) for value in (cost.seconds, cost.low_s, cost.high_s))
    share, low, high = (share_words(value, found) for value in (seconds, low_s, high_s))
    return f"{time_words(seconds)} a step, {share} ({low} to {high})"


MOST_LIMITS = 4
MOST_ADVICE = 4
DECIMALS = 7
MUCH_NOISE = 0.15
"""A run is noisy where differences without a pattern cost so large a share of a step."""
ENOUGH_STEPS = 12
"""With fewer a fault that comes in every fifth step comes once or not at all."""
MUCH_HOST = 0.3
"""A step of which the host has so large a share is spoken of."""


def recording_of(run: ReadRun) -> Recording | None:
    """Return the recording that a run was read from; None of traces."""
    return run.recording if isinstance(run, RecordedRun) else None


def as_text(run: ReadRun, found: Verdict, advice: Sequence[Advice] = ()) -> str:
    """Return the verdict in about 20 lines: what the files can't tell first."""
    lines = [about(run, found)]
    if run.limits:
        lines += ["what these files can't tell:", *(f"- {words}" for words in run.limits[:MOST_LIMITS])]
    if len(run.limits) > MOST_LIMITS:
        lines.append(f"- {count_words(len(run.limits) - MOST_LIMITS, 'limit')} more, which --json lists")
    lines.append(step_words(found))
    lines += headline(found)
    for number, one in enumerate(found.findings, 1):
        words = describe_finding(one, found, recording_of(run))
        lines.append(f"{number}. {words.title.upper()}: {words.sentence}")
        lines.append(f"   costs {cost_words(one.cost, found)}. To do: {words.to_do}")
    if len(found.findings) > 1:
        lines.append(f"mending all findings together saves {cost_words(found.mended, found)}: {mended_words(found)}")
    for proposal in advice[:MOST_ADVICE]:
        price = f". Price: {proposal.costs}" if proposal.costs else ""
        lines.append(f"would help: {proposal.words}. Saves {cost_words(proposal.gain, found)}{price}")
    return "\n".join([*lines, *remarks(run, found)])


def about(run: ReadRun, found: Verdict) -> str:
    """Return what was read, in words."""
    graph = found.graph
    kinds = ", ".join(f"{count} of {kind}" for kind, count in run.kinds.items())
    counts = f"{count_words(len(graph.ranks), 'rank')}, {count_words(len(graph.steps), 'step')}"
    return f"{one_line(run.path)}: {counts}; files: {kinds}"


def step_words(found: Verdict) -> str:
    """Return how long a step takes, and how ranks spend it, in words."""
    measured = time_words(found.measured_s)
    if found.whole_s != found.replayed_s:
        measured = f"{time_words(found.whole_s)}, its layer calls, which alone are recorded, {measured}"
    return (
        f"a step takes {measured}, in the replay {time_words(found.replayed_s)} "
        f"({found.error:+.1%}); a rank spends {share_words(found.computing_s, found)} of a step computing, "
        f"{share_words(found.waiting_s, found)} waiting in exchanges, {share_words(found.host_s, found)} on neither"
    )


def headline(found: Verdict) -> list[str]:
    """Return the verdict itself: one line where there is nothing to say, or nothing can be said."""
    lines = []
    if not found.is_explained:
        lines.append(
            "UNEXPLAINED: the replayed time differs from the measured one by more than 10 %, so nothing below "
            "is certain"
        )
    if not found.can_compare:
        differ = ". The findings below say how the steps differ, which may be chance" if found.findings else ""
        steps = "one step" if len(found.graph.steps) == 1 else "two steps"
        lines.append(
            f"NO VERDICT: there is nothing to compare {steps} of one rank with{differ}. Record at least 3 steps, and "
            "all ranks"
        )
    if found.is_untold:
        lines.append(
            f"NOT CERTAIN: for {share_words(found.graph.alone_s, found)} of a step a rank waits in exchanges whose "
            "other ranks the files don't tell, so nobody knows from them which rank is at fault: record all ranks with "
            "tritonmoe.tools.recording.on_trace_ready and record_shapes=True, or layers of this package with record"
        )
    if found.can_compare and found.is_uncertain:
        lines.append(
            f"NOT CERTAIN: if every operation took its usual time, a step would take "
            f"{share_words(found.together.seconds, found)} less, but only few steps are slow, which may have been an "
            "accident: record more steps"
        )
    if found.is_healthy:
        of = "" if len(found.graph.ranks) > 1 else ". For a single rank this means only that its steps are alike"
        lines.append(
            f"HEALTHY: if every operation took its usual time, a step would take only "
            f"{share_words(max(0.0, found.together.seconds), found)} less{of}"
        )
    return lines


def warnings_of(found: Verdict) -> list[str]:
    """Return warnings that findings may be noise or steps too few, with what to do; none where neither is so."""
    lines, num_steps = [], len(found.graph.steps)
    if found.noise_s > MUCH_NOISE * found.replayed_s:
        lines.append(
            "so much noise may hide a smaller fault of a rank or link, or make all ranks seem at fault: record again "
            "while nothing else runs on these machines"
        )
    if found.can_compare and num_steps < ENOUGH_STEPS:
        lines.append(
            f"{count_words(num_steps, 'step')} may be too few: record {ENOUGH_STEPS} or more, to see a fault that "
            "comes in every fifth step"
        )
    return lines


def remarks(run: ReadRun, found: Verdict) -> list[str]:
    """Return what is worth knowing beside the findings."""
    lines = []
    small = [f"{kind} {share:.0%}" for kind, share in found.others if share >= 0.005]
    if small:
        lines.append("other causes, too small, not certain, or part of a finding: " + ", ".join(small))
    if run.lanes == "timeline":
        jobs = slowdown_of(found.graph)
        lines.append(
            f"StragglerAnalysis' figures, from means: S {jobs.S:.3f}, M_W {jobs.M_W:.3f} of "
            f"{found.graph.named(jobs.slowest)}, M_S {jobs.M_S:.3f} of the last stage"
        )
    exposed = f"exchanges are {share_words(found.graph.exposed_s, found, 1)} exposed (nothing is computed then), "
    lines.append(
        f"noise costs {share_words(found.noise_s, found)} of a step; {exposed * (run.lanes == 'gpu')}with instant "
        f"exchanges a step would take {share_words(found.exposed_s, found)} less"
    )
    lines += warnings_of(found)
    idle_s = found.host_s - max(0.0, found.graph.exposed_s - found.waiting_s)
    if run.lanes == "gpu" and found.replayed_s and idle_s > MUCH_HOST * found.replayed_s:
        lines.append(
            f"for {share_words(idle_s, found)} of a step the GPU runs neither kernels nor exchanges: it waits for "
            "launches, Python or data loading"
        )
    return lines


def as_json(run: ReadRun, found: Verdict, advice: Sequence[Advice] = (), shown: Shown | None = None) -> Json:
    """Return the verdict with all its figures, as plain values; shown: where it is known already."""
    graph = found.graph
    jobs = slowdown_of(graph) if run.lanes == "timeline" else None
    shown = shown_of(found) if shown is None else shown
    return {
        "recording": str(run.path),
        "files": run.kinds,
        "ranks": len(graph.ranks),
        "steps": list(graph.steps),
        "cannot_tell": list(run.limits),
        "measured_s": found.measured_s,
        "measured_steps_s": list(graph.measured_s),
        "slow_steps": [graph.steps[index] for index in shown.slow],
        "replayed_s": found.replayed_s,
        "whole_s": found.whole_s,
        "error": found.error,
        "is_explained": found.is_explained,
        "is_healthy": found.is_healthy,
        "noise_s": found.noise_s,
        "computing_s": found.computing_s,
        "waiting_s": found.waiting_s,
        "host_s": found.host_s,
        "exposed_exchanges_s": found.exposed_s,
        "together": _plain(found.together, found),
        "findings_together": _plain(found.mended, found),
        "findings": [_plain_finding(one, run, found) for one in found.findings],
        "advice": [
            {
                "words": one.words,
                "costs": one.costs,
                "gain_s": one.gain.seconds,
                "low_s": one.gain.low_s,
                "high_s": one.gain.high_s,
                "share": one.gain.share(found.whole_s),
            }
            for one in advice
        ],
        "straggler_analysis": jobs and {"S": jobs.S, "M_W": jobs.M_W, "M_S": jobs.M_S, "workers": list(jobs.slowest)},
        "others": [{"kind": kind, "share": share} for kind, share in found.others],
        "by_rank": [
            {"rank": rank, "name": graph.names.get(index), **vars(of)}
            for index, (rank, of) in enumerate(zip(graph.ranks, shown.ranks, strict=True))
        ],
        "waits_for_ranks_s": [[round(seconds, DECIMALS) for seconds in of] for of in shown.waits_s],
    }


def _plain_finding(finding: Finding, run: ReadRun, found: Verdict) -> Json:
    culprits, words = finding.culprits, describe_finding(finding, found, recording_of(run))
    return {
        "kind": finding.kind,
        "ranks": [found.graph.ranks[index] for index in culprits.ranks],
        "moves": culprits.moves,
        "phase": culprits.phase or None,
        "place": list(culprits.place) if culprits.place else None,
        "layer": culprits.layer,
        "links": [list(link) for link in culprits.links],
        "factor": culprits.factor,
        "when": finding.when.when,
        "period": finding.when.period or None,
        "is_hidden": finding.is_hidden,
        "may_be_noise": finding.may_be_noise,
        "words": words.sentence,
        "to_do": words.to_do,
        **_plain(finding.cost, found),
    }


def _plain(cost: Cost, found: Verdict) -> Json:
    return {"cost_s": cost.seconds, "low_s": cost.low_s, "high_s": cost.high_s, "share": cost.share(found.whole_s)}
