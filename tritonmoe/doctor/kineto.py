"""Reader of the traces of torch.profiler (Kineto): of NVIDIA's and AMD's GPUs, and of CPUs with gloo or MPI."""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import TypeGuard

from tritonmoe.doctor.exchange_names import as_run, kind_of_kernel, kind_of_name, kind_of_operator
from tritonmoe.doctor.hosts import host_in_name
from tritonmoe.doctor.kineto_arguments import from_nccl, from_operator, routed_of
from tritonmoe.doctor.trace import Part, RankTrace, Step
from tritonmoe.doctor.trace_files import damaged
from tritonmoe.runtime.files import Json

__all__ = ["KinetoReader", "union"]

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"}
OPERATORS = {"cpu_op", "operator"}
RUNTIMES = {"cuda_runtime", "cuda_driver", "hip_runtime", "runtime", "hip_api", "privateuse1_runtime"}
WORKERS = ("gloo:", "mpi:")
"""How the threads call what they do that run exchanges on CPUs."""
NO_WORK = ("autograd::", "c10d::", "record_param_comms", "_c10d_functional::", "profiler::", "torchdynamo::")
STEP = re.compile(r"ProfilerStep\s*#\s*(\d+)")
COMMON = re.compile(
    r'\{\s*"ph": "(?:(?P<arrow>[sft])"[^{}]*\}'
    r'|X",\s*"cat": "(?:cpu_op",\s*"name": "(?P<operator>aten::(?!topk")[^"\\]*)",\s*"pid": \d+,\s*"tid": (?P<thread>\d+),'
    r'\s*"ts": (?P<began>\d+\.?\d*),\s*"dur": (?P<lasts>\d+\.?\d*)[^{}]*\{[^{}]*\}\s*\}'
    r'|(?P<launch>cuda_runtime|hip_runtime)",\s*"name": "[^"]*",\s*"pid": \d+,\s*"tid": \d+,'
    r'\s*"ts": (?P<at>\d+\.?\d*),'
    r'[^{}]*\{[^{}]*?"correlation": (?P<of>\d{1,15})\b[^{}]*\}\s*\}'
    r'|(?P<kernel>kernel)",\s*"name": "(?P<name>[^"\\]*)",\s*"pid": \d+,\s*"tid": \d+,'
    r'\s*"ts": (?P<start>\d+\.?\d*),\s*"dur": (?P<dur>\d+\.?\d*)\s*,\s*"args": \{'
    r'(?P<args>[^{}]*?)"correlation": (?P<id>\d{1,15})\b(?P<more>[^{}]*)\}\s*\}))\s*,\s*(?=\S)'
)
"""What most events of a trace are, as Kineto itself writes them: taken from the text, five times as fast as JSON."""
LAST_S = 1e12
MOST_LANES = 1024
FAR_S = 3600.0
"""No event is further from the steps than that."""
BACKWARD = "autograd::engine::evaluate_function"


class KinetoReader:
    """Takes the members and events of one trace, and gives what it says of its rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.top: Json = {}
        self.num_events = 0
        self._is_exchange: dict[str, bool] = {}
        self._is_work: dict[str, bool] = {}
        self.kernels: tuple[array, array, array] = (array("d"), array("d"), array("q"))
        """Start, end and correlation of all that a GPU did, but exchanges; seconds."""
        self.operators: dict[object, tuple[array, array]] = defaultdict(lambda: (array("d"), array("d")))
        """Start and end of what computes on the CPU, by thread."""
        self.launches: tuple[array, array] = (array("d"), array("q"))
        self.backward: tuple[array, array] = (array("d"), array("d"))
        self.exchanges_on_gpu: list[tuple[str, float, float, dict]] = []
        self.posts: list[tuple[str, float, float, object, dict]] = []
        self.waits: list[tuple[object, float]] = []
        """Threads that wait for an exchange, and since when."""
        self.by_workers: list[tuple[str, float, float, object]] = []
        self.comms: list[tuple[float, dict]] = []
        """Of record_param_comms, with which NCCL's exchanges are handed over."""
        self.routed: dict[int, tuple[int, int]] = {}
        """The most rows, and choices of each, of operators that choose, by the dimensions of what they choose from."""
        self.processes: set[object] = set()
        """Whose operators these are."""
        self.steps: list[Step] = []
        self.steps_on_gpu: list[Step] = []

    def scan(self, text: str, at: int) -> tuple[int, int]:
        """Take events from the text, from this place on, as long as they are common ones.

        Returns the place of the first that is not, and how many were taken.
        """
        match, is_gpu, known = COMMON.match, bool(self.top.get("deviceProperties")), self._is_exchange
        launch_s, launched = (times.append for times in self.launches)
        start, end, correlation = (times.append for times in self.kernels)
        count = 0
        while (found := match(text, at)) is not None:
            kind = found.lastgroup
            if kind == "of":
                launch_s(float(found["at"]) / 1e6)
                launched(int(found["of"]) & 0x7FFFFFFF)
            elif kind == "more":
                name, start_us, us, number, arguments = found.group("name", "start", "dur", "id", "args")
                arguments += found["more"]
                is_exchange = known.get(name)
                if is_exchange is None:
                    is_exchange = known[name] = kind_of_kernel(name) is not None
                start_s = float(start_us) / 1e6
                end_s = start_s + float(us) / 1e6
                if is_exchange or "Collective name" in arguments or not end_s < LAST_S:
                    break
                start(start_s)
                end(end_s)
                correlation(int(number) & 0x7FFFFFFF)
            elif (
                kind == "lasts"
                and not is_gpu
                and not self._computed(*found.group("operator", "thread", "began", "lasts"))
            ):
                break
            at = found.end()
            count += 1
        self.num_events += count
        return at, count

    def _computed(self, name: str, thread: str, start_us: str, us: str) -> bool:
        """Note what a CPU without a GPU computes, of an event's text; False of an event that is something else."""
        is_work = self._is_work.get(name)
        if is_work is None:
            is_work = kind_of_operator(name) is None and not name.endswith("wait_tensor")
            self._is_work[name] = is_work
        start, seconds = float(start_us), float(us)
        if not is_work or not start < LAST_S * 1e6 or not seconds < LAST_S:
            return False
        starts, ends = self.operators[int(thread)]
        starts.append(start / 1e6)
        ends.append((start + seconds) / 1e6)
        return True

    def take(self, key: str, value: object) -> None:
        """Take a member of the file's object, or an event.

        Raises:
            ValueError: an event is damaged.
        """
        if key != "traceEvents":
            self.top[key] = value
            return
        self.num_events += 1
        if type(value) is not dict:
            raise damaged(self.path, f"event {self.num_events - 1} is {type(value).__name__} and no object")
        if value.get("ph") != "X":
            return
        category, name, start, seconds = value.get("cat"), value.get("name"), value.get("ts"), value.get("dur", 0)
        if type(category) is not str or type(name) is not str:
            if category is None and "ts" in value:
                return
            raise self._wrong("has no name or category")
        if not _is_number(start) or not _is_number(seconds):
            raise self._wrong(f"({name[:40]}) has no times")
        if not -1e18 < start < 1e19 or not 0 <= seconds < 1e15:
            raise self._wrong(f"({name[:40]}) has impossible times")
        category = category.lower()
        start_s = start / 1e6
        end_s = (start + seconds) / 1e6
        if category in ON_GPU:
            self._on_gpu(category, name, start_s, end_s, value)
        elif category in OPERATORS:
            self._operator(name, start_s, end_s, value)
        elif category in RUNTIMES:
            correlation = self._arguments(value).get("correlation")
            if type(correlation) is int:
                self.launches[0].append(start_s)
                self.launches[1].append(correlation & 0x7FFFFFFF)
        elif category in ("user_annotation", "gpu_user_annotation"):
            found = STEP.match(name)
            if category == "user_annotation":
                self.processes.add(str(value.get("pid")))
            if found is not None:
                of = self.steps if category == "user_annotation" else self.steps_on_gpu
                of.append(Step(int(found[1][:15]), start_s, end_s))
            elif name.startswith(WORKERS) and category == "user_annotation":
                self.by_workers.append((name, start_s, end_s, value.get("tid")))

    def _wrong(self, what: str) -> ValueError:
        return damaged(self.path, f"event {self.num_events - 1} {what}")

    def _arguments(self, event: dict) -> dict:
        found = event.get("args", {})
        if type(found) is not dict:
            raise self._wrong("has arguments that are no object")
        return found

    def _on_gpu(self, category: str, name: str, start_s: float, end_s: float, event: dict) -> None:
        arguments = self._arguments(event)
        if category == "kernel":
            kind = kind_of_name(str(arguments["Collective name"])) if "Collective name" in arguments else None
            kind = kind or kind_of_kernel(name)
            if kind is not None:
                self.exchanges_on_gpu.append((kind, start_s, end_s, arguments))
                return
        correlation = arguments.get("correlation")
        self.kernels[0].append(start_s)
        self.kernels[1].append(end_s)
        self.kernels[2].append(correlation & 0x7FFFFFFF if type(correlation) is int else -1)

    def _operator(self, name: str, start_s: float, end_s: float, event: dict) -> None:
        if name.startswith(BACKWARD):
            self.backward[0].append(start_s)
            self.backward[1].append(end_s)
            return
        kind = kind_of_operator(name)
        if kind is not None:
            self.posts.append((kind, start_s, end_s, event.get("tid"), self._arguments(event)))
        elif name == "record_param_comms":
            self.comms.append((start_s, self._arguments(event)))
        elif name.endswith("wait_tensor"):
            self.waits.append((event.get("tid"), start_s))
        elif "::" in name and not name.startswith(NO_WORK):
            if name == "aten::topk":
                self._route(self._arguments(event))
            thread = event.get("tid")
            if type(thread) not in (int, str):
                raise self._wrong("is of no thread")
            starts, ends = self.operators[thread]
            starts.append(start_s)
            ends.append(end_s)

    def _route(self, arguments: dict) -> None:
        """Note how many tokens a router has, and how many experts it gives each: with record_shapes=True."""
        chosen = routed_of(arguments)
        if chosen is not None:
            most = self.routed.get(chosen[0], (0, 0))
            self.routed[chosen[0]] = max(most[0], chosen[1]), max(most[1], chosen[2])

    def finish(self) -> RankTrace:
        """Return what the trace says of its rank.

        Raises:
            ValueError: there is nothing in it that a step could be due to; the message says what is missing.
        """
        about = self.top.get("distributedInfo", {})
        if not isinstance(about, dict):
            raise damaged(self.path, "distributedInfo is no object")
        rank, world = (about.get(key) for key in ("rank", "world_size"))
        for name, value in (("rank", rank), ("world_size", world)):
            if value is not None and (type(value) is not int or not 0 <= value < 1 << 24):
                raise damaged(self.path, f"{name} is {str(value)[:40]!r}")
        is_gpu = len(self.kernels[0]) > 0
        host = self.top.get("host_name") or host_in_name(self.path.name, self.processes)
        found = RankTrace(str(self.path), rank, world, "gpu" if is_gpu else "cpu", host if type(host) is str else "")
        found.routed = self.routed[min(self.routed)] if self.routed else None
        found.groups = self._groups(about)
        base = self.top.get("baseTimeNanoseconds", 0)
        if type(base) not in (int, float) or not abs(base) < 1e19:
            raise damaged(self.path, "baseTimeNanoseconds is no time")
        if not is_gpu and (self.comms or not self.operators) and not self.by_workers:
            why = (
                "it is of a run over NCCL and has no lanes of a GPU"
                if self.comms
                else "it has no operation that computes"
            )
            raise ValueError(f"{self.path} can't be judged: {why}. Record with ProfilerActivity.CPU and .CUDA")
        self._backward_starts = sorted(zip(*self.backward, strict=True))
        if is_gpu:
            self._of_gpu(found)
        else:
            self._of_cpu(found)
        self._steps(found, is_gpu)
        if base > 0:
            _shift(found, base / 1e9)
        found.is_unix_clock = base > 0 or (len(found.steps) > 0 and found.steps[0].start_s > 1e9)
        if rank is None:
            found.limits.append("the file doesn't say which rank it is of")
        return found

    def _groups(self, about: dict) -> dict[str, tuple[int, ...]]:
        groups: dict[str, tuple[int, ...]] = {}
        config = about.get("pg_config", [])
        for one in config if isinstance(config, list) else []:
            if isinstance(one, dict) and isinstance(one.get("ranks"), list):
                ranks = one["ranks"]
                if all(type(rank) is int for rank in ranks):
                    groups[str(one.get("pg_name"))] = tuple(ranks)
        return groups

    def _steps(self, found: RankTrace, is_gpu: bool) -> None:
        steps = sorted(self.steps, key=lambda step: step.start_s)
        if len({step.number for step in steps}) != len(steps):
            by_number: dict[int, Step] = {}
            for step in steps:
                by_number.setdefault(step.number, step)
            steps = list(by_number.values())
        if is_gpu and steps:
            steps = self._moved_to_gpu(steps)
        lasts = [part.end_s or part.start_s for part in found.parts]
        first = min([*found.busy_start_s[:1], *(part.posted_s for part in found.parts)], default=0.0)
        last = max([*found.busy_end_s[-1:], *lasts], default=first)
        if not steps:
            found.limits.append("no steps are marked (profiler.step() was not called): all of the trace counts as one")
            steps = [Step(0, first, last)]
        if first < steps[0].start_s - FAR_S or last > steps[-1].end_s + FAR_S:
            raise damaged(self.path, "it has events more than an hour away from its steps")
        for before, after in pairwise(steps):
            before.end_s = after.start_s  # what stands between two steps belongs to the first
        found.steps = steps

    def _moved_to_gpu(self, steps: list[Step]) -> list[Step]:
        """Return steps by when their kernels ran: what the host launched within a step is of that step."""
        by_number = {step.number: step for step in self.steps_on_gpu}
        if len(by_number) == len(steps) and all(step.number in by_number for step in steps):
            return sorted(by_number.values(), key=lambda step: step.start_s)
        launches = sorted(zip(*self.launches, strict=True))
        exchanges = ((arguments.get("correlation"), start, end) for _, start, end, arguments in self.exchanges_on_gpu)
        kernels = sorted(
            [
                *zip(self.kernels[2], self.kernels[0], self.kernels[1], strict=True),
                *(one for one in exchanges if type(one[0]) is int),
            ]
        )
        if not launches or not kernels or kernels[-1][0] < 0:
            return steps
        correlations = [correlation for correlation, _, _ in kernels]
        times = [time for time, _ in launches]
        moved = []
        for step in steps:
            low, high = bisect_left(times, step.start_s), bisect_right(times, step.end_s)
            own = [correlation for _, correlation in launches[low:high]]
            if own:
                of_step = kernels[bisect_left(correlations, min(own)) : bisect_right(correlations, max(own))]
                if of_step:
                    moved.append(Step(step.number, min(one[1] for one in of_step), max(one[2] for one in of_step)))
        return sorted(moved, key=lambda step: step.start_s) or steps

    def _is_backward(self, moment_s: float) -> bool:
        place = bisect_right(self._backward_starts, (moment_s, float("inf")))
        return any(end >= moment_s for _, end in self._backward_starts[max(0, place - 4) : place])

    def _phase(self, moment_s: float | None) -> str:
        if moment_s is None or not self._backward_starts:
            return ""
        return "backward" if self._is_backward(moment_s) else "forward"

    def _of_gpu(self, found: RankTrace) -> None:
        found.busy_start_s, found.busy_end_s = union(self.kernels[0], self.kernels[1])
        launched: dict[int, float] = {}
        wanted = {arguments.get("correlation") for _, _, _, arguments in self.exchanges_on_gpu}
        for time, correlation in zip(*self.launches, strict=True):
            if correlation in wanted:
                launched[correlation] = time
        before = sorted(zip(self.kernels[2], self.kernels[1], strict=True))
        correlations = [correlation for correlation, _ in before]
        latest = _running_maximum([end for _, end in before])
        cut = False
        for kind, start_s, end_s, arguments in sorted(self.exchanges_on_gpu, key=lambda one: one[1]):
            correlation = arguments.get("correlation")
            posted_s = start_s
            place = bisect_right(found.busy_start_s, start_s) - 1
            if place >= 0 and found.busy_end_s[place] > start_s and type(correlation) is int and correlations:
                # The lane computes on: the exchange was only behind what had been launched before it.
                launched_before = bisect_left(correlations, correlation) - 1
                if launched_before >= 0:
                    posted_s = min(start_s, latest[launched_before])
            stream = arguments.get("stream", 0)
            part = Part(kind, posted_s, start_s, end_s, stream if type(stream) is int else 0)
            part.phase = self._phase(launched.get(correlation) if type(correlation) is int else None)
            cut |= from_nccl(part, arguments)
            found.parts.append(part)
        if cut:
            found.limits.append(
                "the file cuts lists of split sizes: of its larger groups it is not known who sent what"
            )
        if any(part.kind in ("dispatch", "combine", "notify") for part in found.parts):
            found.limits.append(
                "kernels of DeepEP and its kin carry no group and no sizes: they are matched by their order"
            )

    def _of_cpu(self, found: RankTrace) -> None:
        self.posts.sort(key=lambda post: post[1])
        by_thread: dict[object, list[float]] = defaultdict(list)
        for _, start_s, _, thread, _ in self.posts:
            by_thread[thread].append(start_s)
        holding = {thread: list(own) for thread, own in by_thread.items()}
        for thread, start_s in self.waits:
            holding.setdefault(thread, []).append(start_s)
        starts, ends = array("d"), array("d")
        workers = {thread for _, _, _, thread in self.by_workers} - set(by_thread)
        for thread, (own_starts, own_ends) in self.operators.items():
            if thread in workers:
                continue  # what they compute is a part of the exchange
            posted = sorted(holding.get(thread, []))
            for start_s, end_s in zip(own_starts, own_ends, strict=True):
                at = bisect_left(posted, start_s)
                if at == len(posted) or posted[at] >= end_s:  # what holds an exchange waits in it
                    starts.append(start_s)
                    ends.append(end_s)
        found.busy_start_s, found.busy_end_s = union(starts, ends)
        waiting: dict[str, list[Part]] = defaultdict(list)
        for kind, start_s, _, _, arguments in self.posts:
            part = Part(kind, start_s, start_s, None, phase=self._phase(start_s))
            from_operator(part, arguments)
            part.start_s = start_s
            found.parts.append(part)
            waiting[as_run(kind)].append(part)
        lanes: dict[object, int] = {}
        alone = count(MOST_LANES)
        for name, start_s, end_s, thread in sorted(self.by_workers, key=lambda one: one[1]):
            of_kind = waiting.get(as_run(kind_of_name(name) or ""), [])
            if of_kind and of_kind[0].posted_s <= start_s:
                part = of_kind.pop(0)
                part.start_s, part.end_s, part.is_noticed = start_s, end_s, thread in by_thread
            else:
                part = Part(kind_of_name(name) or "exchange", start_s, start_s, end_s, phase=self._phase(start_s))
                found.parts.append(part)  # handed over before the trace began, or by what it doesn't show
            # what ends when it is noticed didn't hold up what was handed over after it
            part.lane = next(alone) if part.is_noticed else lanes.setdefault(thread, len(lanes))
        unknown = [part for part in found.parts if part.end_s is None]
        if unknown:
            found.limits.append(
                f"of {len(unknown)} of {len(found.parts)} exchanges the file doesn't say when they ended"
            )
        ends_of_posts = {start_s: end_s for _, start_s, end_s, _, _ in self.posts}
        for part in unknown:
            part.end_s = ends_of_posts[part.posted_s]


def _is_number(value: object) -> TypeGuard[float]:
    kind = type(value)  # faster than isinstance, which takes True for a number
    return kind is float or kind is int


def _running_maximum(values: Sequence[float]) -> list[float]:
    found, most = [], float("-inf")
    for value in values:
        most = max(most, value)
        found.append(most)
    return found


def _shift(found: RankTrace, by_s: float) -> None:
    found.busy_start_s = array("d", [time + by_s for time in found.busy_start_s])
    found.busy_end_s = array("d", [time + by_s for time in found.busy_end_s])
    for part in found.parts:
        part.posted_s += by_s
        part.start_s += by_s
        part.end_s = None if part.end_s is None else part.end_s + by_s
    for step in found.steps:
        step.start_s += by_s
        step.end_s += by_s


def union(starts: Sequence[float], ends: Sequence[float]) -> tuple[array, array]:
    """Return the intervals in order in which at least one of these lasts."""
    found_starts, found_ends = array("d"), array("d")
    last = float("-inf")
    for start, end in sorted(zip(starts, ends, strict=True)):
        if start > last:
            found_starts.append(start)
            found_ends.append(end)
            last = end
        elif end > last:
            found_ends[-1] = last = end
    return found_starts, found_ends
