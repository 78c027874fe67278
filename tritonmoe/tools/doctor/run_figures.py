"""What a recording shows beside the doctor's verdict: waits, loads, the marks and lanes of its median call."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from tritonmoe.runtime.files import Json
from tritonmoe.tools.doctor.conditions import PassesBefore, conditions_of, measured_s, passes_before, walk
from tritonmoe.tools.doctor.messages import members
from tritonmoe.tools.doctor.recorded_run import RecordedRun
from tritonmoe.tools.recording.call_recording import RecordedCall, RecordedPass
from tritonmoe.tools.recording.pass_steps import arrivals_of, places_of, times_of
from tritonmoe.tools.report.timeline import PassTimeline, Timeline, simulated_timeline, spans_of

__all__ = ["PASSES", "figures_of", "timelines_of"]

PASSES = ("forward", "backward")
DECIMALS = 7
MOST_RATE = 1e14
"""Bytes a second. A faster link is none: its bytes took no time that could be measured, and its rate is not known."""
MOST_RATIO = 1e3
"""Where bytes elsewhere take next to no time, how many times as long they take on a link is not known."""


def _median_call(run: RecordedRun) -> tuple[RecordedCall, PassesBefore]:
    """Return the call that took the median of all that the verdict is about, and the recording's passes_before."""
    before = passes_before(run.recording)
    ordered = sorted(run.calls, key=lambda call: measured_s(call, before))
    return ordered[(len(ordered) - 1) // 2], before


def figures_of(run: RecordedRun) -> Json:
    """Return them as plain values, in seconds.

    median_call: for each pass and rank its marks, from when most ranks had entered the pass.
    waits_s: (W, W): how long rank i stood still for rows of rank k in a call, the median of all calls; None where it is
        not known when each rank's rows arrived. byte_ratios: (W, W): how many times as long as on the others a byte
        takes from rank i to rank k, ports included. loads: by layer, the pairs of each expert in all calls, and
        how many times the mean that is.
    """
    (call, before), ratios, steps = _median_call(run), run.costs.ratios, run.costs.steps
    of_byte = [[ratio if ratio < MOST_RATIO else None for ratio in row] for row in ratios.of_byte.tolist()]
    link, call_of = run.costs.link, {of.call.sequence: of.call for of in run.built.passes}
    return {
        "transport": run.recording.transport,
        "headers": list(run.recording.headers),
        "calls": len(call_of),
        "plan": str(call.plan),
        "step_s": run.built.step_s,
        "link": {
            "latency_s": link.latency_s,
            "bytes_per_s": link.bytes_per_s if link.bytes_per_s < MOST_RATE else None,
        },
        "slowness": list(run.costs.slowness),
        "median_call": {
            "call": call.sequence,
            "layer": call.layer,
            "measured_s": measured_s(call, before),
            "replayed_s": walk(conditions_of(call, before, run.costs)).total_s,
            **{
                which: [_marks(one, _typical_entry(passes)) for one in passes]
                for which, passes in zip(PASSES, call.by_pass, strict=False)
            },
        },
        "waits_s": _waits(run),
        "byte_ratios": of_byte if ratios.are_told_apart else None,
        "loads": _loads(run),
        "step_costs": {"fixed_s": dict(steps.fixed_s), "unit_s": dict(steps.unit_s)},
        "gap_s": run.costs.gap_s,
    }


def _typical_entry(passes: Sequence[RecordedPass]) -> float:
    return statistics.median_low(one.entered for one in passes)


def _marks(one: RecordedPass, since: float) -> Json:
    marks = one.marks
    return {
        "entered_s": round(one.entered - since, DECIMALS),
        "counts_posted_s": None if marks is None else round(marks.counts_posted - since, DECIMALS),
        "counts_left_s": None if marks is None else round(marks.counts_left - since, DECIMALS),
        "first_step_s": round(one.origin - since, DECIMALS),
        "ended_s": round(one.end - since, DECIMALS),
    }


def _loads(run: RecordedRun) -> Json:
    loads: dict[str, list[int]] = {}
    for call in run.calls:
        of_call = [pairs for rank in call.ranks for pairs in rank.pairs_per_expert]
        name = f"layer {call.layer}" if call.layer >= 0 else "function"
        loads[name] = [a + b for a, b in zip(loads.get(name, [0] * len(of_call)), of_call, strict=True)]
    means = {name: sum(pairs) / max(1, len(pairs)) or 1.0 for name, pairs in loads.items()}
    return {
        name: {"pairs": pairs, "of_mean": [round(count / means[name], 3) for count in pairs]}
        for name, pairs in loads.items()
    }


def _waits(run: RecordedRun) -> list[list[float]] | None:
    if not (run.recording.has_arrivals and run.costs.ratios.are_told_apart):
        return None
    of_calls = torch.stack([_waits_of(call) for call in run.calls])
    return [[round(value, DECIMALS) for value in row] for row in of_calls.median(0).values.tolist()]


def _waits_of(call: RecordedCall) -> torch.Tensor:
    waits_s = torch.zeros(len(call.ranks), len(call.ranks), dtype=torch.float64, device="cpu")
    for of_pass in call.by_pass:
        for passes, is_inside in (
            ([one.steps for one in of_pass], False),
            ([one.steps_inside for one in of_pass], True),
        ):
            peers = torch.tensor([list(members(call, rank, is_inside)) for rank in range(len(call.ranks))])
            layout = passes[0].layout
            steps = [layout.steps[place] for place in layout.exchanges]
            places = places_of(passes, steps)
            tells = [[one.layout.tell_arrivals[n] for n in of] for one, of in zip(passes, places, strict=False)]
            if not any(map(any, tells)):
                continue
            end_s, wait_s = times_of(passes, places)[:, :, 1:3].unbind(2)
            stood_s = (arrivals_of(passes, places) - (end_s - wait_s)[:, :, None]).clamp(min=0)
            stood_s = torch.minimum(stood_s, wait_s[:, :, None]).nan_to_num(nan=0.0)
            stood_s = torch.where(torch.tensor(tells)[:, :, None], stood_s, 0.0)
            waits_s.scatter_add_(1, peers, stood_s.sum(1))
    return waits_s


def timelines_of(run: RecordedRun) -> dict[str, list[Timeline]]:
    """Return the median call's lanes as measured and as replayed, from when most ranks had entered each pass."""
    call, before = _median_call(run)
    simulations = walk(conditions_of(call, before, run.costs)).passes
    measured, replayed = [], []
    for rank in range(len(call.ranks)):
        passes = [_pass_timeline(passes, rank) for passes in call.by_pass]
        measured.append(Timeline("measured", rank, *_both(passes)))
        timeline = simulated_timeline("replayed", rank, simulations)
        parts = [timeline.forward, timeline.backward][: len(simulations)]
        # The backward begins for all ranks when the last one has ended its forward.
        parts = [replace(part, total_s=of.total_s) for part, of in zip(parts, simulations, strict=True)]
        replayed.append(Timeline("replayed", rank, *_both(parts)))
    return {"measured": measured, "replayed": replayed}


def _both(passes: Sequence[PassTimeline]) -> Sequence[PassTimeline]:
    return [*passes, PassTimeline((), 0.0)][:2]


def _pass_timeline(passes: Sequence[RecordedPass], rank: int) -> PassTimeline:
    since, own = _typical_entry(passes), passes[rank]
    spans = tuple(span.shifted(own.origin - since) for span in spans_of(own.steps, own.steps_inside))
    return PassTimeline(spans, max(one.end for one in passes) - since)
