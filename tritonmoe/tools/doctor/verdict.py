"""The doctor's verdict on a run, ours or of others: in words for a terminal, and as JSON."""

from collections.abc import Sequence

from tritonmoe.runtime.files import Json
from tritonmoe.tools.doctor.advice import Advice
from tritonmoe.tools.doctor.attribution import Cost, Finding, Verdict
from tritonmoe.tools.doctor.chrome_timeline import slowdown_of
from tritonmoe.tools.doctor.lanes import Shown, shown_of
from tritonmoe.tools.doctor.reading import ReadRun
from tritonmoe.tools.doctor.recorded_run import RecordedRun
from tritonmoe.tools.doctor.words import (
    cost_words,
    count_words,
    describe_finding,
    mended_words,
    share_words,
    time_words,
)
from tritonmoe.tools.recording.call_recording import Recording
from tritonmoe.tools.report.terminal import one_line

__all__ = [
    "about",
    "as_json",
    "as_text",
    "headline",
    "recording_of",
    "remarks",
    "step_words",
    "warnings_of",
]

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
