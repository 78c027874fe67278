"""`python -m bench.doctor`: does the doctor find the cause of a slow step, and is its promise kept when that is gone?

Random scenarios, healthy ones and ones with one cause or two. Calls with the causes and calls without them take turns;
the doctor reads a recording of the former, and its promised gain is compared with what the latter measure. The
experts sleep for so long a pair, so that ranks which share cores don't disturb each other.
--netns W runs them on W processes in network namespaces, --emulated N on emulated ranks and links. --synthetic N
measures nothing: the simulator makes the recordings, with noise, and says what would be measured; that tells what the
method can do, and whether it was broken. --keep DIR keeps what was recorded and measured, and --judge DIR reads it
again, so that another version of the doctor can be tried on the same runs. What is kept in DIR already is not run
again, so that a campaign can be ended at any time and gone on with.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

import tritonmoe as tm
from bench.synthetic_runs import Run, write_run
from tritonmoe.benchmarks.argument_types import output_file, positive, seed
from tritonmoe.benchmarks.inside_namespace import ask, check_start, is_inside
from tritonmoe.benchmarks.namespaces import Namespaces
from tritonmoe.benchmarks.ranks import gather
from tritonmoe.benchmarks.timing import quartiles, write_json
from tritonmoe.diagnosis.recorder import record
from tritonmoe.diagnosis.recording_reader import read_recording
from tritonmoe.doctor.causes import CauseKind
from tritonmoe.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.transports import EmulatedTransport, LinkModel, PendingExchange, Transport
from tritonmoe.transports.emulated.run import run_on_emulated_ranks
from tritonmoe.transports.torchrun import torchrun_ranks
from tritonmoe.transports.two_level import GroupView

__all__ = [
    "Scenario",
    "begin",
    "draw_scenario",
    "judge_kept",
    "keep_and_judge",
    "main",
    "run_emulated",
    "run_synthetic",
]

HIDDEN_SIZE, NETNS_HIDDEN_SIZE = 64, 1024
"""D. A real link is fast for the first 128 KB, tc's burst, so its messages must be larger."""
NETNS_TIMES = 2.0
"""The experts take so many times as long there: what a chunk costs a real process by itself, 3 ms forward and backward,
would else be a tenth of a healthy call, and a finding."""
EMULATED_TIMES = 3.0
"""And on emulated ranks, whose Python code takes turns and whose sleeps end up to a millisecond late: a twentieth of
chunks of 20 ms, which stays when the cause is gone."""
TOKENS, EMULATED_TOKENS = (256, 384, 512), (1024, 1536, 2048)
"""T. Of few tokens the fullest rank gets some 5 % more than the mean by chance, which stays without the imbalance; the
rows of real links are long, so that few make a large message."""
NUM_EXPERTS, TOP_K = 8, 2
WARM_UP = 3
"""So many calls run in one chunk before the others, as the first ones of num_chunks="auto" do."""
NOISE = 0.04
WHERE = {
    "synthetic": "recordings that the simulator made, with noise",
    "emulated": "emulated ranks and links in one process",
    "netns": "processes in network namespaces, gloo, links shaped by tc",
}
START_RATE = 1e9
TIMEOUT_S = 120.0
MEASURED = "measured.json"
"""The file beside a kept recording with its scenario, and the seconds of the calls of every variant."""
NOT_DRAWN = ("exchange contention", "late link", "pause")
CAUSES: tuple[CauseKind, ...] = tuple(kind for kind in get_args(CauseKind) if kind not in NOT_DRAWN)
"""Of network namespaces: tc's buckets have no latency, and experts that sleep are not slowed by exchanges."""
EMULATED_CAUSES: tuple[CauseKind, ...] = (*CAUSES, "late link")
SYNTHETIC_CAUSES: tuple[CauseKind, ...] = (*CAUSES, "exchange contention", "late link")
HEALTHY_SHARE = 0.3
TWO_SHARE = 0.2
CERTAIN_SHARE, SMALL_SHARE = 0.15, 0.08
"""What a cause must cost to be asked for first, and to be asked for at all."""
STEADY = 0.10
"""Where calls of one kind differ by more, from quartile to quartile over their median, something else ran on the
machine: what the cause costs isn't known well enough then to say whether a gain is within 15 % of it."""


@dataclass(frozen=True)
class Scenario:
    """A layer, its link, and what is wrong with it."""

    seed: int
    size: int
    num_tokens: int
    num_chunks: int
    pair_s: float
    """What the experts take for a pair, in the forward; a backward takes twice as long."""
    fixed_s: float
    """What they take for a chunk."""
    rate: float
    """GB/s."""
    latency_s: float
    hidden_size: int = HIDDEN_SIZE
    causes: tuple[CauseKind, ...] = ()
    culprits: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By cause: the rank, or sender and receiver."""
    amounts: dict[str, float] = field(default_factory=dict)
    """By cause: how bad it is: a factor, or seconds."""

    def amount(self, kind: CauseKind, rank: int, without: float) -> float:
        """Give how bad a cause is on a rank; `without` where it isn't."""
        return self.amounts[kind] if kind in self.causes and rank in self.culprits[kind] else without

    def link(self) -> LinkModel:
        slow_links, slow_ports, late_links_us = {}, {}, {}
        if "slow link" in self.causes:
            sender, receiver = self.culprits["slow link"]
            slow_links[sender, receiver] = self.amounts["slow link"]
        if "late link" in self.causes:
            sender, receiver = self.culprits["late link"]
            late_links_us[sender, receiver] = 1e6 * self.amounts["late link"]
        if "slow port" in self.causes:
            slow_ports[self.culprits["slow port"][0]] = self.amounts["slow port"]
        rate = self.rate / (self.amounts["bandwidth"] if "bandwidth" in self.causes else 1.0)
        latency_s = self.amounts["latency"] if "latency" in self.causes else self.latency_s
        return LinkModel(rate, 1e6 * latency_s, slow_ports, slow_links, late_links_us)

    def ids(self, rank: int) -> Tensor:
        """Give (T, K) ids, uniform but for the hot expert."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        scores = torch.rand(self.num_tokens, NUM_EXPERTS, generator=generator)
        if "imbalance" in self.causes:
            hot = self.culprits["imbalance"][0] * (NUM_EXPERTS // self.size)
            scores[: round(self.num_tokens * self.amounts["imbalance"]), hot] += 1.0
        return scores.topk(TOP_K).indices

    def chunk_s(self) -> float:
        """Give the fixed seconds of a chunk; without the cause those of all are what one's were with it."""
        if "chunk overhead" not in self.amounts:
            return self.fixed_s
        parts = self.num_chunks + 2  # and the two of local pairs
        return self.amounts["chunk overhead"] / (1 if "chunk overhead" in self.causes else parts)


def draw_scenario(
    number: int,
    sizes: Sequence[int] = (2, 4, 4),
    hidden_size: int = HIDDEN_SIZE,
    times: float = 1.0,
    drawn: Sequence[CauseKind] = CAUSES,
    tokens: Sequence[int] = TOKENS,
) -> Scenario:
    """Draw a scenario; without causes the experts take so much longer than the exchanges that these are hidden.

    times: how many times as long they take as otherwise, and the exchanges with them. drawn: the possible causes.
    tokens: the possible numbers of them on a rank.
    """
    draw = random.Random(number)
    size, num_tokens = draw.choice(sizes), draw.choice(tokens)
    compute_s = times * draw.uniform(0.06, 0.14)
    pair_s = compute_s / (num_tokens * TOP_K)
    bytes_out = num_tokens * TOP_K * (1 - 1 / size) * 4 * hidden_size
    rate = bytes_out / (compute_s * draw.uniform(0.15, 0.35)) / 1e9
    num_chunks, latency_s = draw.choice((3, 4, 6)), draw.uniform(5e-5, 3e-4)
    plain = Scenario(number, size, num_tokens, num_chunks, pair_s, 0.0005, rate, latency_s, hidden_size)
    kind = draw.random()
    if kind < HEALTHY_SHARE:
        return plain
    # With two ranks a slow port is one of two directions, or both: the bandwidth.
    possible = [cause for cause in drawn if size > 2 or cause != "slow port"]
    causes = draw.sample(possible, 2 if kind > 1 - TWO_SHARE else 1)
    is_masked = bool({"slow link", "slow port"} & set(causes)) and "bandwidth" in causes
    is_masked |= {"late link", "latency"} <= set(causes)
    if is_masked or {"imbalance", "slow rank"} <= set(causes):
        causes = causes[:1]  # one hides the other
    culprits: dict[str, tuple[int, ...]] = {}
    amounts: dict[str, float] = {}
    for cause in causes:
        sender, receiver = draw.sample(range(size), 2)
        culprits[cause] = (sender, receiver) if cause in ("slow link", "late link") else (sender,)
        amounts[cause] = {
            "slow link": draw.uniform(6, 16) * (size - 1),
            "late link": compute_s * draw.uniform(0.15, 0.4),
            "slow port": draw.uniform(4, 12),
            "slow rank": draw.uniform(1.25, 2.0),
            "late rank": compute_s * draw.uniform(0.4, 1.2),
            "imbalance": draw.uniform(0.5, 0.9),
            "bandwidth": draw.uniform(6, 12),
            "latency": compute_s * draw.uniform(0.15, 0.4),
            "chunk overhead": compute_s / plain.num_chunks * draw.uniform(0.3, 1.0),
            "host overhead": compute_s * draw.uniform(0.4, 1.2),
            "exchange contention": draw.uniform(0.3, 0.6),
        }[cause]
    return replace(plain, causes=tuple(causes), culprits=culprits, amounts=amounts)


class _Sleep(torch.autograd.Function):
    """Takes a time for its rows, forward, and twice as long backward."""

    @staticmethod
    def forward(ctx, rows: Tensor, chunk_s: float, pair_s: float) -> Tensor:
        ctx.seconds = (chunk_s + pair_s * len(rows)) if len(rows) else 0.0
        time.sleep(ctx.seconds)
        return rows.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None, None


class _SlowHost(GroupView):
    """All ranks of a transport, whose host takes a time before it sends its counts."""

    def __init__(self, world: Transport, seconds: float) -> None:
        super().__init__(world, range(world.size))
        self.seconds = seconds

    def post_counts(self, counts: Tensor) -> PendingExchange:
        time.sleep(self.seconds)
        return super().post_counts(counts)


class _Layer:
    """A rank's layer and batch in a scenario; every call is a forward and a backward."""

    def __init__(self, transport: Transport, scenario: Scenario) -> None:
        rank = transport.rank
        slowness = scenario.amount("slow rank", rank, 1.0)
        times = scenario.chunk_s() * slowness, scenario.pair_s * slowness

        def activation(h: Tensor) -> Tensor:
            gate, up = h.chunk(2, dim=1)
            return _Sleep.apply(gate * up, *times)

        host_s = scenario.amounts["host overhead"] if "host overhead" in scenario.causes else 0.0
        config = tm.MoEConfig(scenario.hidden_size, 8, NUM_EXPERTS, TOP_K, activation=activation)
        overlap = tm.OverlapConfig(scenario.num_chunks)
        self.transport = _SlowHost(transport, host_s)
        self.layer = tm.GroupedExperts(config, self.transport, overlap, backend="torch")
        self.late_s = scenario.amount("late rank", rank, 0.0)
        generator = torch.Generator().manual_seed(rank)
        self.x = torch.randn(scenario.num_tokens, scenario.hidden_size, generator=generator, requires_grad=True)
        self.ids = scenario.ids(rank)
        self.weights = torch.rand(self.ids.shape, generator=generator)

    def seconds(self, meet: Callable[[], object]) -> float:
        """Give how long a call takes on this rank; all ranks start together, as they come from `meet`."""
        meet()
        started = time.perf_counter()
        time.sleep(self.late_s)
        self.layer(self.x, self.ids, self.weights).sum().backward()
        return time.perf_counter() - started


def variants_of(scenario: Scenario) -> dict[str, Scenario]:
    """Give the scenario with its causes, if it has any without all of them, and where there are two without each."""
    variants = {"with": scenario}
    if scenario.causes:
        variants["without"] = replace(scenario, causes=())
    if len(scenario.causes) > 1:
        for cause in scenario.causes:
            variants[f"without {cause}"] = replace(scenario, causes=tuple(c for c in scenario.causes if c != cause))
    return variants


def run_emulated(scenario: Scenario, calls: int, folder: Path) -> dict[str, list[float]]:
    """Give the slowest rank's seconds of calls of every variant; those with the causes are recorded into `folder`."""

    # Over the link itself ranks would meet late, by its latency, and some of them by that of the link before.
    meeting = threading.Barrier(scenario.size, timeout=TIMEOUT_S)

    def on_rank(transport: Transport) -> dict[str, list[float]]:
        assert isinstance(transport, EmulatedTransport)
        return run_rank(transport, scenario, calls, lambda of: transport.world.set_link(of.link()), meeting.wait)

    with record(folder):  # the first transport's calls, those with the causes, are in the folder itself
        ranks = run_on_emulated_ranks(on_rank, scenario.size, link=scenario.link(), timeout_s=TIMEOUT_S)
    return slowest_of(ranks)


def slowest_of(ranks: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Give the slowest rank's seconds of every call, by variant."""
    return {name: [max(times) for times in zip(*(of[name] for of in ranks), strict=True)] for name in ranks[0]}


def run_rank(
    transport: Transport,
    scenario: Scenario,
    calls: int,
    set_link: Callable[[Scenario], None],
    meet: Callable[[], object],
) -> dict[str, list[float]]:
    """Give this rank's seconds of calls of every variant, which take turns.

    set_link: called on rank 0.
    meet: returns on all ranks together.
    """
    variants = variants_of(scenario)
    layers = {name: _Layer(transport, variant) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(WARM_UP + calls):
        for name, layer in layers.items():
            meet()
            if transport.rank == 0:
                set_link(variants[name])
            layer.layer.overlap = tm.OverlapConfig(1 if number < WARM_UP else scenario.num_chunks)
            elapsed = layer.seconds(meet)
            if number >= WARM_UP:
                seconds[name].append(elapsed)
    return seconds


def run_in_namespaces(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the ranks in network namespaces; they run this program again."""
    command = [sys.executable, "-m", "bench.doctor", *argv]
    with Namespaces(command, arguments.netns, START_RATE) as namespaces:
        return namespaces.run(TIMEOUT_S)


def run_netns_rank(arguments: argparse.Namespace) -> list[Json]:
    """Run every scenario on this rank of the namespaces; rank 0 gives the results."""
    results = []
    with torchrun_ranks(timeout_s=TIMEOUT_S) as transport:
        for number in range(arguments.seed, arguments.seed + arguments.scenarios):
            scenario = draw_scenario(number, (transport.size,), NETNS_HIDDEN_SIZE, NETNS_TIMES)
            if "latency" in scenario.causes:  # tc's bucket has none of its own
                continue
            begun = str(begin(arguments.keep, scenario)) if transport.rank == 0 else None
            (name,) = set(gather(transport, begun)) - {None}
            folder = Path(name)
            if (folder / MEASURED).exists():
                results += [judge_kept(folder)] if transport.rank == 0 else []
                continue
            with record(folder):
                seconds = run_rank(transport, scenario, arguments.calls, _shape, transport.barrier)
            ranks = gather(transport, seconds)
            if transport.rank == 0:
                results.append(keep_and_judge(folder, "netns", scenario, slowest_of(ranks)))
                if arguments.keep is None:
                    shutil.rmtree(folder.parent)
    return results


def keep_and_judge(folder: Path, where: str, scenario: Scenario, seconds: dict[str, list[float]]) -> Json:
    """Write what was measured beside the recording in a folder, and judge both."""
    kept = {"where": where, "scenario": asdict(scenario), "seconds": seconds}
    write_whole(folder / MEASURED, json.dumps(kept), "measurement")
    return judge_kept(folder)


def begin(keep: str | None, scenario: Scenario) -> Path:
    """Give the folder of a scenario in that of all, a new temporary one where they are not kept.

    What a run has left there that was ended before it had measured the scenario is removed.
    """
    folder = Path(tempfile.mkdtemp() if keep is None else keep).absolute() / f"{scenario.seed}-{scenario.size}"
    if not (folder / MEASURED).exists():
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def judge_kept(folder: Path) -> Json:
    """Judge what keep_and_judge left in a folder."""
    kept = json.loads((folder / MEASURED).read_text())
    culprits = {cause: tuple(ranks) for cause, ranks in kept["scenario"]["culprits"].items()}
    scenario = Scenario(**{**kept["scenario"], "causes": tuple(kept["scenario"]["causes"]), "culprits": culprits})
    result = judge(scenario, kept["seconds"], judge_recording(read_recording(folder)))
    print(_line(result), flush=True)
    return result


def _shape(scenario: Scenario) -> None:
    """Have the process that made the namespaces give the links their rates."""
    link = scenario.link()
    assert link.bandwidth_gb_per_s is not None
    bits = 8e9 * link.bandwidth_gb_per_s
    of_ranks = [bits / link.slow_ports.get(rank, 1.0) for rank in range(scenario.size)]
    of_links = [[sender, receiver, bits / times] for (sender, receiver), times in link.slow_links.items()]
    ask(f"rates {json.dumps([of_ranks, of_links])}")


def run_synthetic(scenario: Scenario, calls: int, folder: Path) -> dict[str, list[float]]:
    """Give what the simulator says of calls with the causes and without; it also makes the recording, with noise."""
    run = replace(synthetic_run(scenario), noise=NOISE)
    write_run(folder, [replace(run, num_chunks=1)] * WARM_UP + [run] * calls, seed=scenario.seed)
    return {name: [synthetic_run(of).seconds()] for name, of in variants_of(scenario).items()}


def synthetic_run(scenario: Scenario) -> Run:
    """Give the scenario as the simulator walks it."""
    amounts = {cause: scenario.amounts[cause] for cause in scenario.causes}

    def at_culprit(cause: CauseKind) -> tuple[int, float] | None:
        return (scenario.culprits[cause][0], amounts[cause]) if cause in amounts else None

    def of_link(cause: CauseKind) -> tuple[int, int, float] | None:
        if cause not in amounts:
            return None
        sender, receiver = scenario.culprits[cause]
        return sender, receiver, amounts[cause]

    hot = at_culprit("imbalance")
    return Run(
        size=scenario.size,
        num_chunks=scenario.num_chunks,
        rows=scenario.num_tokens * TOP_K / scenario.size,
        pair_s=scenario.pair_s,
        fixed_s=scenario.chunk_s(),
        byte_s=amounts.get("bandwidth", 1.0) / (scenario.rate * 1e9),
        latency_s=amounts.get("latency", scenario.latency_s),
        host_s=amounts.get("host overhead", 4e-4) / 2,
        slow_link=of_link("slow link"),
        late_link=of_link("late link"),
        slow_port=at_culprit("slow port"),
        slow_rank=at_culprit("slow rank"),
        late_rank=at_culprit("late rank"),
        hot_rank=None if hot is None else (hot[0], 1 + hot[1] * (scenario.size - 1) / 2),
        contention=amounts.get("exchange contention", 0.0),
    )


def judge(scenario: Scenario, seconds: dict[str, list[float]], run: RecordedRun) -> Json:
    """Give what the doctor said of a scenario beside what is true of it."""
    found = run.found
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    step_s = medians["with"]
    one_by_one = len(scenario.causes) > 1
    true_s = {c: step_s - medians[f"without {c}" if one_by_one else "without"] for c in scenario.causes}
    said = {one.kind: one for one in reversed(found.findings)}
    everything = {kind: share * found.replayed_s for kind, share in found.others}
    everything |= {one.kind: one.cost.seconds for one in found.findings}
    return {
        "number": scenario.seed,
        "ranks": scenario.size,
        "calls": len(seconds["with"]),
        "causes": list(scenario.causes),
        "culprits": {cause: list(ranks) for cause, ranks in scenario.culprits.items()},
        "amounts": scenario.amounts,
        "step_ms": round(1e3 * step_s, 2),
        "spread": round(max(map(_spread, seconds.values())), 4),
        "recorded_ms": round(1e3 * found.measured_s, 2),
        "replay_error": round(found.error, 4),
        "true_share": {cause: round(gain / step_s, 4) for cause, gain in true_s.items()},
        "said": [(one.kind, list(one.culprits.ranks), round(one.cost.seconds / step_s, 4)) for one in found.findings],
        "predicted_share": {cause: round(everything.get(cause, 0.0) / step_s, 4) for cause in scenario.causes},
        "is_first": bool(found.findings) and found.findings[0].kind in scenario.causes,
        "all_said": all(cause in said for cause in scenario.causes),
        "culprits_right": {
            cause: said[cause].culprits.ranks == scenario.culprits[cause]
            for cause in scenario.causes
            if cause in said and said[cause].culprits.ranks
        },
    }


def _spread(seconds: Sequence[float]) -> float:
    """Give from quartile to quartile of calls, over their median."""
    if len(seconds) < 2:
        return 0.0
    low, high = quartiles(seconds)
    return (high - low) / statistics.median(seconds)


def summarize(results: Sequence[Json]) -> Json:
    """Give the figures of all scenarios; None where no scenario has any."""

    def share(values: Sequence[bool]) -> float | None:
        return round(sum(values) / len(values), 3) if values else None

    single = [r for r in results if len(r["causes"]) == 1]
    large = [r for r in single if r["true_share"][r["causes"][0]] >= CERTAIN_SHARE]
    small = [r for r in single if SMALL_SHARE <= r["true_share"][r["causes"][0]] < CERTAIN_SHARE]
    healthy = [r for r in results if not r["causes"]]
    two = [r for r in results if len(r["causes"]) == 2 and min(r["true_share"].values()) >= SMALL_SHARE]
    gains = [
        abs(r["predicted_share"][cause] / true - 1)
        for r in results
        for cause, true in r["true_share"].items()
        if true >= SMALL_SHARE and r["spread"] <= STEADY
    ]
    errors = sorted(abs(r["replay_error"]) for r in results)
    return {
        "scenarios": len(results),
        "of 15 %: cause first": share([r["is_first"] for r in large]),
        "of 15 %: number": len(large),
        "of 8 to 15 %: cause first": share([r["is_first"] for r in small]),
        "of 8 to 15 %: number": len(small),
        "healthy: false alarms": share([bool(r["said"]) for r in healthy]),
        "healthy: number": len(healthy),
        "culprit right": share([right for r in results for right in r["culprits_right"].values()]),
        "two causes: both said": share([r["all_said"] for r in two]),
        "two causes: number": len(two),
        "not steady: number": sum(r["spread"] > STEADY for r in results),
        "gain: number": len(gains),
        "gain within 15 %": share([gain <= 0.15 for gain in gains]),
        "gain: median error": round(statistics.median(gains), 3) if gains else None,
        "replay: median error": round(statistics.median(errors), 3) if errors else None,
        "replay: worst error": round(errors[-1], 3) if errors else None,
    }


def run_here(where: str, arguments: argparse.Namespace) -> list[Json]:
    """Run every scenario in this process, emulated or synthetic."""
    is_emulated = where == "emulated"
    run, drawn = (run_emulated, EMULATED_CAUSES) if is_emulated else (run_synthetic, SYNTHETIC_CAUSES)
    times, tokens = (EMULATED_TIMES, EMULATED_TOKENS) if is_emulated else (1.0, TOKENS)
    results = []
    for number in range(arguments.seed, arguments.seed + (arguments.emulated or arguments.synthetic)):
        scenario = draw_scenario(number, times=times, drawn=drawn, tokens=tokens)
        folder = begin(arguments.keep, scenario)
        if (folder / MEASURED).exists():
            results.append(judge_kept(folder))
            continue
        results.append(keep_and_judge(folder, where, scenario, run(scenario, arguments.calls, folder)))
        if arguments.keep is None:
            shutil.rmtree(folder.parent)
    return results


def _line(result: Json) -> str:
    true = ", ".join(f"{cause} {share:.0%}" for cause, share in result["true_share"].items()) or "healthy"
    said = ", ".join(f"{kind} {ranks or ''} {share:.0%}" for kind, ranks, share in result["said"]) or "healthy"
    return (
        f"{result['number']:4d} W={result['ranks']} {result['step_ms']:6.0f} ms, replay {result['replay_error']:+.1%}: "
        f"{true} | said: {said}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print a line for each scenario, and the figures of all; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.doctor", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--synthetic", type=positive, metavar="N", help="N scenarios, walked by the simulator")
    where.add_argument("--emulated", type=positive, metavar="N", help="N scenarios on emulated ranks and links")
    where.add_argument("--netns", type=positive, metavar="W", help="W ranks in network namespaces (Linux, root) ...")
    where.add_argument("--judge", metavar="DIR", help="read again what --keep kept there")
    parser.add_argument("--keep", metavar="DIR", help="keep recordings and seconds in this folder")
    parser.add_argument("--scenarios", type=positive, default=20, metavar="N", help="... in N scenarios (default 20)")
    parser.add_argument("--calls", type=positive, default=9, help="calls of each kind, taking turns (default 9)")
    parser.add_argument("--seed", type=seed, default=0, help="of the first scenario (default 0)")
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    check_start(arguments.netns, {})
    if arguments.netns and not is_inside():
        return run_in_namespaces(arguments, sys.argv[1:] if argv is None else argv)
    if arguments.netns:
        kind, results = "netns", run_netns_rank(arguments)
        if not results:
            return 0
    elif arguments.judge:
        kept = sorted(file.parent for file in Path(arguments.judge).glob(f"*/{MEASURED}"))
        (kind,) = {json.loads((folder / MEASURED).read_text())["where"] for folder in kept}
        results = [judge_kept(folder) for folder in kept]
    else:
        kind = "emulated" if arguments.emulated else "synthetic"
        results = run_here(kind, arguments)
    summary = summarize(results)
    print(f"{WHERE[kind]}:")
    for name, value in summary.items():
        print(f"  {name:28} {value}")
    write_json(arguments.json, "doctor", {"where": WHERE[kind], "summary": summary, "scenarios": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
