"""The doctor's verdict on a run that others recorded: in words for a terminal, and as JSON."""

from tritonmoe.doctor.attribution import Cost, Finding, Verdict
from tritonmoe.doctor.culprits import phase_of
from tritonmoe.doctor.graph import Key
from tritonmoe.doctor.reading import ForeignRun
from tritonmoe.doctor.recorded_run import RecordedRun
from tritonmoe.doctor.slowdown import slowdown_of
from tritonmoe.runtime.files import Json

__all__ = ["as_json", "as_text"]

MOST_LIMITS = 4
DO = {
    "slow rank": "look at its clocks, its temperature and what else runs there; else leave the machine out",
    "late rank": "look at what it does outside of operations: data loading, logging, checkpoints, garbage collection",
    "slow link": "look at cable, port, switch and route; measure the links alone",
    "late link": "look at the route, and at what delays messages there: a switch, a proxy, a busy core",
    "slow port": "look at the network card of that rank, its cable and its driver; measure it alone",
    "bandwidth": "send fewer bytes, or hide them: chunks that overlap, two levels, a narrower wire_dtype",
    "latency": "fewer and larger exchanges: fewer chunks; a nearer network",
    "chunk overhead": "fewer chunks",
    "host overhead": "a faster host, fewer threads beside it; look at what runs between the layer's steps",
    "exchange contention": "leave exchanges cores of their own",
    "pause": "look at what all ranks do at once between calls: checkpoints, evaluation, logging",
    "imbalance": "load_balance_loss_weight where it is 0, a placement of the experts, batches of one length",
}


def as_text(run: ForeignRun | RecordedRun, found: Verdict) -> str:
    """Give the verdict in about 20 lines: what the files can't tell first."""
    graph = found.graph
    kinds = ", ".join(f"{count} of {kind}" for kind, count in run.kinds.items())
    lines = [
        f"{run.path}: {_count(len(graph.ranks), 'rank')}, {_count(len(graph.steps), 'step')}; files: {kinds}",
        *(f"can't be told: {words}" for words in run.limits[:MOST_LIMITS]),
    ]
    if len(run.limits) > MOST_LIMITS:
        lines.append(f"can't be told: {len(run.limits) - MOST_LIMITS} things more, see --json")
    lines.append(
        f"a step takes {_ms(found.measured_s)}, replayed {_ms(found.replayed_s)} ({found.error:+.1%}); of a rank's "
        f"step {_share(found.computing_s, found)} is computing, {_share(found.waiting_s, found)} waiting in exchanges, "
        f"{_share(found.host_s, found)} neither"
    )
    if not found.is_explained:
        lines.append("UNEXPLAINED: the replay is off by more than 10 %, so nothing below is certain")
    if not found.can_compare:
        lines.append(
            "NO VERDICT: so few steps of one rank have nothing to be compared with; record 3 steps, or all ranks"
        )
    if found.is_healthy:
        lines.append(
            f"HEALTHY: with every operation as usual for its kind a step would take "
            f"{_share(max(0.0, found.together.seconds), found)} less"
        )
    if found.can_compare and found.is_uncertain:
        lines.append(
            f"NOT CERTAIN: with every operation as usual for its kind a step would take "
            f"{_share(found.together.seconds, found)} less, but so few have it that it may not come again: record more"
        )
    for number, one in enumerate(found.findings, 1):
        lines.append(f"{number}. {one.kind.upper()}: {words_of(one, found)}")
        lines.append(f"   costs {_cost(one.cost, found)}. To do: {DO[one.kind]}")
    if found.findings:
        lines.append(f"all that is not usual together: {_cost(found.together, found)}; causes overlap")
    for advice in run.advice if isinstance(run, RecordedRun) else ():
        costs = f"; it {advice.costs}" if advice.costs else ""
        lines.append(f"would help: {advice.words}: {_share(advice.gain.seconds, found)} less{costs}")
    small = [f"{kind} {max(0.0, share):.0%}" for kind, share in found.others]
    if small:
        lines.append("too small or not certain: " + ", ".join(small))
    if run.is_timeline:
        jobs = slowdown_of(graph)
        lines.append(
            f"as StragglerAnalysis counts, by means: S {jobs.slowdown:.3f}, M_W {jobs.share_of_slowest:.3f} of "
            f"{graph.named(jobs.slowest)}"
        )
    if isinstance(run, RecordedRun):
        lines.append(
            f"a step is the sum of its calls here; with all that lies between them it takes {_ms(run.built.step_s)}"
        )
    lines.append(f"differences without a pattern: {_share(found.noise_s, found)} of a step")
    lines.append(f"rows under way that nothing hides: {_share(found.exposed_s, found)} of a step")
    return "\n".join(lines)


def words_of(one: Finding, found: Verdict) -> str:
    """Say who, where and when, in one sentence."""
    graph, culprits = found.graph, one.culprits
    if culprits.links:
        who = "from " + " and from ".join(f"rank {graph.ranks[i]} to rank {graph.ranks[k]}" for i, k in culprits.links)
    elif culprits.moves:
        who = "another rank from step to step"
    elif culprits.ranks:
        who = graph.named(culprits.ranks)
    else:
        who = "all ranks" if len(graph.ranks) > 1 else "the rank"
    several = not culprits.moves and (len(culprits.ranks) or len(graph.ranks)) > 1
    what = {
        "late link": f"{'bring' if several else 'brings'} every message later than other links, however small",
        "slow port": culprits.words or "has a slow port",
        "bandwidth": "wait for the bytes of exchanges, at the links' usual rate",
        "latency": "wait for exchanges for what these take however small they are",
        "chunk overhead": "pay what a part of a layer costs however small it is once for every chunk",
        "host overhead": "wait for the host, before the first step of a pass and between steps",
        "exchange contention": "compute more slowly beside an exchange",
        "pause": "do something else at once between calls, for longer than usual",
        "slow rank": f"{'compute' if several else 'computes'} {culprits.factor:.2f} times as long as usual",
        "late rank": f"{'come' if several else 'comes'} late to exchanges, doing nothing that the file shows",
        "slow link": f"{'need' if several else 'needs'} {culprits.factor:.2f} times as long as usual for their bytes",
        "imbalance": f"{'get' if several else 'gets'} more rows than others",
    }[one.kind]
    where = f", {place_words(culprits.place)}" if culprits.place else f", in {culprits.phase}" if culprits.phase else ""
    where += f", in layer {culprits.layer}" if culprits.layer is not None else ""
    hidden = "; hidden by the other causes: alone it gains little" if one.is_hidden else ""
    return f"{who} {what}{where}, {one.when}{hidden}"


def place_words(key: Key) -> str:
    """Name a key: "before all_to_all 3 of forward"."""
    phase = phase_of(key)
    of_phase = f" of {phase}" if phase and phase == key[0] else ""
    if "before" in key:
        return f"before {key[2]} {key[3] + 1}{of_phase}"
    if len(key) == 3 and isinstance(key[2], int):
        return f"in {key[1]} {key[2] + 1}{of_phase}"
    return f"in {' '.join(map(str, key))}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _share(seconds: float, found: Verdict) -> str:
    return f"{seconds / found.replayed_s if found.replayed_s else 0.0:.0%}"


def _cost(cost: Cost, found: Verdict) -> str:
    low, high = (_share(value, found) for value in (cost.low_s, cost.high_s))
    return f"{_ms(cost.seconds)} a step, {_share(cost.seconds, found)} ({low} to {high})"


def as_json(run: ForeignRun | RecordedRun, found: Verdict) -> Json:
    """Give the verdict with all its figures, as plain values."""
    graph = found.graph
    jobs = slowdown_of(graph) if run.is_timeline else None
    return {
        "recording": str(run.path),
        "files": run.kinds,
        "ranks": len(graph.ranks),
        "steps": list(graph.steps),
        "cannot_tell": list(run.limits),
        "measured_s": found.measured_s,
        "measured_steps_s": list(graph.measured_s),
        "replayed_s": found.replayed_s,
        "error": found.error,
        "is_explained": found.is_explained,
        "is_healthy": found.is_healthy,
        "noise_s": found.noise_s,
        "computing_s": found.computing_s,
        "waiting_s": found.waiting_s,
        "host_s": found.host_s,
        "exposed_exchanges_s": found.exposed_s,
        "together": _plain(found.together, found),
        "findings": [
            {
                "kind": one.kind,
                "ranks": [graph.ranks[index] for index in one.culprits.ranks],
                "moves": one.culprits.moves,
                "phase": one.culprits.phase or None,
                "place": list(one.culprits.place) if one.culprits.place else None,
                "layer": one.culprits.layer,
                "links": [list(link) for link in one.culprits.links],
                "factor": one.culprits.factor,
                "when": one.when.when,
                "period": one.when.period or None,
                "is_hidden": one.is_hidden,
                "words": words_of(one, found),
                "to_do": DO[one.kind],
                **_plain(one.cost, found),
            }
            for one in found.findings
        ],
        "straggler_analysis": jobs
        and {"S": jobs.slowdown, "M_W": jobs.share_of_slowest, "workers": list(jobs.slowest)},
        "others": [{"kind": kind, "share": share} for kind, share in found.others],
    }


def _plain(cost: Cost, found: Verdict) -> Json:
    return {"cost_s": cost.seconds, "low_s": cost.low_s, "high_s": cost.high_s, "share": cost.share(found.replayed_s)}
