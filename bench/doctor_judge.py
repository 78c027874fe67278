"""What the doctor says of the jobs that bench.doctor has recorded, beside what is true of them."""

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.doctor_faults import MEASURED, OF_NOBODY, STEADY, Job, JobFault, drift_of, read_job
from tritonmoe.runtime.files import Json
from tritonmoe.tools.cli import main as tritonmoe

__all__ = ["Said", "judge_all", "judge_one", "summarize"]

CERTAIN_SHARE, SMALL_SHARE = 0.15, 0.08
"""What faults must cost together to be asked for, and one of several."""
CLOSE = 0.15
"""A promised gain may be off by so large a part of the measured one."""
NAMES = {"bandwidth": {"bandwidth", "slow link"}, "late link": {"late link", "slow link"}}
"""What a fault may be called, where that isn't its name alone."""
WHEN = {"rare": "at random", "flapping": "at random"}


@dataclass(frozen=True)
class Said:
    """A finding, as far as it is judged."""

    kind: str
    ranks: tuple[int, ...]
    moves: bool
    when: str | None
    period: int | None
    cost_s: float

    def names(self, fault: JobFault) -> bool:
        return self.kind in NAMES.get(fault.kind, {fault.kind})

    def blames(self, fault: JobFault, size: int) -> bool:
        """Return whether the verdict names all ranks at fault, and no other."""
        if fault.moves:
            return self.moves
        if fault.kind in OF_NOBODY:
            return len(self.ranks) in (0, size)
        return set(self.ranks) == set(fault.ranks) and not self.moves

    def times(self, fault: JobFault) -> bool:
        """Return whether the verdict names the time of the fault; of one that moves, that it does."""
        if fault.moves:
            return self.moves
        return self.when == WHEN.get(fault.when, fault.when) and (not fault.period or self.period == fault.period)

    def __str__(self) -> str:
        who = "moving" if self.moves else self.ranks or ""
        return f"{self.kind} {who} {self.when or ''}{self.period or ''}"


def ask_doctor(folder: Path, step_s: float) -> tuple[list[Said], float]:
    """Return what `tritonmoe doctor` finds, and how far its replay is off."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file, contextlib.redirect_stdout(io.StringIO()):
        status = tritonmoe(["doctor", str(folder), "--json", file.name])
        if status == 2:
            raise ValueError(f"the doctor can't read {folder}")
        (verdict,) = json.loads(Path(file.name).read_text())

    def said(one: Json) -> Said:
        cost_s = one["cost_s"] if "cost_s" in one else one["share"] * step_s
        moves, when, period = (one.get(name) for name in ("moves", "when", "period"))
        return Said(one["kind"], tuple(one["ranks"]), bool(moves), when, period, cost_s)

    return [said(one) for one in verdict["findings"]], verdict["error"]


def judge_one(folder: Path) -> Json:
    """Have the doctor read what was recorded in a folder, and compare."""
    kept = json.loads((folder / MEASURED).read_text())
    job = read_job(kept["job"])
    step_s = statistics.fmean(kept["seconds"]["with"])
    drift = drift_of(job, kept["seconds"]) if kept["where"] == "netns" else 0.0
    judged = judge(job, kept["seconds"], *ask_doctor(folder, step_s))
    return {"where": kept["where"], "drift": round(drift, 4), **judged}


def judge(job: Job, seconds: dict[str, list[float]], said: Sequence[Said], error: float) -> Json:
    """Compare what is said of a job with what is true; None where it isn't asked for."""
    means = {name: statistics.fmean(of) for name, of in seconds.items()}
    step_s = means["with"]
    total = 1 - means.get("without", step_s) / step_s
    shares = {
        fault.kind: 1 - means.get(f"without {fault.kind}", means.get("without", step_s)) / step_s
        for fault in job.faults
    }
    is_asked = total >= CERTAIN_SHARE
    # Of two that hide each other neither gains much alone: then the first is asked for.
    asked = [fault for fault in job.faults if shares[fault.kind] >= SMALL_SHARE] or job.faults[:0]
    found = {fault.kind: next((one for one in said if one.names(fault)), None) for fault in job.faults}
    first = next((fault for fault in job.faults if said and said[0].names(fault)), None)
    asked = asked or ([first] if first else list(job.faults))
    largest = max(shares.values(), default=0.0)
    promised = {kind: one.cost_s / step_s if one else 0.0 for kind, one in found.items()}

    def all_right(is_right: Any) -> bool | None:
        if not is_asked:
            return None
        return all((one := found[fault.kind]) is not None and is_right(one, fault) for fault in asked)

    return {
        "kind": job.kind,
        "seed": job.seed,
        "ranks": job.size,
        "layers": len(job.layers),
        "faults": [f"{of.kind} {list(of.ranks)} {of.when}{of.period or ''} {of.phase} {of.layer}" for of in job.faults],
        "step_ms": round(1e3 * step_s, 2),
        "true_share": round(total, 4),
        "true_shares": {kind: round(share, 4) for kind, share in shares.items()},
        "promised_shares": {kind: round(share, 4) for kind, share in promised.items()},
        "said": [f"{one} {one.cost_s / step_s:.0%}" for one in said],
        "replay_error": round(error, 4),
        "is_silent": not said,
        "cause_right": (first is not None and shares[first.kind] >= largest / 2) if is_asked else None,
        "culprits_right": all_right(lambda one, fault: one.blames(fault, job.size)),
        "when_right": all_right(lambda one, fault: one.times(fault)),
        "gains_right": {
            kind: abs(promised[kind] / share - 1) <= CLOSE for kind, share in shares.items() if share >= SMALL_SHARE
        },
    }


def line_of(result: Json) -> str:
    """Return a scenario in one line; what is wrong in capitals."""
    marks = [
        name.upper() if result[f"{name}_right"] is False else "-" if result[f"{name}_right"] is None else name
        for name in ("cause", "culprits", "when")
    ]
    marks += [
        f"{kind} {result['true_shares'][kind]:.0%} {'gain' if right else 'GAIN'} {result['promised_shares'][kind]:.0%}"
        for kind, right in result["gains_right"].items()
    ]
    said = "; ".join(result["said"]) or "healthy"
    return (
        f"{result['kind']} ({result['ranks']} ranks, {result['layers']} layers, seed {result['seed']}): "
        f"{result['step_ms']:.0f} ms, replay {result['replay_error']:+.1%}, true {result['true_share']:.0%}: "
        f"{', '.join(marks)} | {'; '.join(result['faults']) or 'nothing'} | said: {said}"
    )


FIGURES = {
    "first cause right": "cause_right",
    "all culprits right": "culprits_right",
    "pattern in time right": "when_right",
}


def summarize(results: Sequence[Json]) -> Json:
    """Return the figures of all scenarios: how many are right, of how many."""

    def share(values: Iterable[bool | None]) -> dict[str, int]:
        known = [value for value in values if value is not None]
        return {"right": sum(known), "of": len(known)}

    faulty = [of for of in results if of["faults"]]
    steady = [of for of in faulty if of.get("drift", 0.0) <= STEADY]
    errors = sorted(abs(of["replay_error"]) for of in results)
    return {
        **{name: share(of[key] for of in faulty) for name, key in FIGURES.items()},
        "not called healthy": share(not of["is_silent"] for of in faulty if of["cause_right"] is not None),
        "gain within 15 %": share(right for of in steady for right in of["gains_right"].values()),
        "healthy ones silent": share(of["is_silent"] for of in results if not of["faults"]),
        "not steady": len(faulty) - len(steady),
        "replay: median error": round(statistics.median(errors), 4) if errors else None,
        "replay: worst error": round(errors[-1], 4) if errors else None,
    }


def judge_all(into: Path, kinds: Collection[str]) -> list[Json]:
    """Judge all that was recorded of these kinds, and print a line of each."""
    results = []
    for file in sorted(into.glob(f"*/{MEASURED}")):
        if json.loads(file.read_text())["job"]["kind"] in kinds:
            results.append(judge_one(file.parent))
            print(line_of(results[-1]), flush=True)
    return results
