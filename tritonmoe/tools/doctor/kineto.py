"""Reader of the traces of torch.profiler (Kineto): of NVIDIA's and AMD's GPUs, and of CPUs with gloo or MPI."""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import accumulate, count, pairwise

from tritonmoe.tools.doctor.exchange_names import as_run, kind_of_name
from tritonmoe.tools.doctor.kineto_events import KinetoEvents, from_label, from_nccl, from_operator
from tritonmoe.tools.doctor.trace import Part, RankTrace, Step, union
from tritonmoe.tools.doctor.trace_files import damaged

__all__ = ["KinetoTrace", "host_in_name"]

MOST_LANES = 1024
OF_TENSORBOARD = re.compile(r"(.+)_(\d+)\.\d+\.pt\.trace\.json(?:\.gz)?")
"""How torch.profiler.tensorboard_trace_handler calls a trace: after host and process."""
MOST_BACKWARD = 0.01
"""Of a file's events at most this share may end before they begin."""
UNORDERED_S = 1e-3
"""Events that begin earlier than the one before in the file by no more than that stand in the order of their times."""
FAR_S = 3600.0
"""No event is further from the steps than that."""


class KinetoTrace(KinetoEvents):
    """Puts a rank's trace together from what stands in it."""

    def trace(self, is_cut: bool = False) -> RankTrace:
        """Return what the trace says of its rank; is_cut: the file ends in the middle of its events.

        Raises:
            ValueError: there is nothing in it that a step could be due to; the message says what is missing.
        """
        self.backward = union(*self.backward)
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
        whole_until_s = self._whole_until_s(is_gpu) if is_cut else float("inf")
        if not is_gpu and (self.comms or not self.operators) and not self.by_workers:
            of_nccl = "the run used NCCL, and the file has no events of a GPU"
            why = of_nccl if self.comms else "the file has no operation that computes"
            raise ValueError(f"{self.path} can't be judged: {why}. Record with ProfilerActivity.CPU and .CUDA")
        if is_gpu:
            self._of_gpu(found)
        else:
            self._of_cpu(found, is_cut)
        self._steps(found, is_gpu, whole_until_s)
        if base > 0:
            found.move(lambda moment_s: moment_s + base / 1e9)
        found.is_unix_clock = base > 0 or (len(found.steps) > 0 and found.steps[0].start_s > 1e9)
        if rank is None:
            found.limits.append("the file doesn't say which rank wrote it")
        if self.num_backward > MOST_BACKWARD * self.num_events:
            raise damaged(self.path, f"{self.num_backward} of {self.num_events} events end before they begin")
        if self.num_backward:
            found.limits.append(
                f"{self.num_backward} of {self.num_events} events end before they begin: their durations count as 0"
            )
        return found

    def _groups(self, about: dict) -> dict[str, tuple[int, ...]]:
        config = about.get("pg_config", [])
        return {
            str(one.get("pg_name")): tuple(one["ranks"])
            for one in (config if isinstance(config, list) else [])
            if isinstance(one, dict) and isinstance(one.get("ranks"), list)
            if all(type(rank) is int for rank in one["ranks"])
        }

    def _whole_until_s(self, is_gpu: bool) -> float:
        """Return up to when a file has all events that ends in the middle of them.

        Raises:
            ValueError: that can't be told, since its events don't stand in the order of their times.
        """
        ends = f"it ends too soon, after {self.num_events} events"
        if not is_gpu and self.top.get("deviceProperties"):
            raise damaged(self.path, f"{ends}, none of which is of the GPU")
        on_gpu, on_cpu = (self.kernels[0], [of[1] for of in self.exchanges_on_gpu]), self.operators.values()
        columns = on_gpu if is_gpu else [starts for starts, _ in on_cpu]
        back = (later - own for of in columns for later, own in zip(accumulate(of, max), of, strict=True))
        if max(back, default=0.0) > UNORDERED_S:
            raise damaged(self.path, f"{ends}, which don't stand in the order of their times")
        return max((of[-1] for of in columns if of), default=0.0)

    def _steps(self, found: RankTrace, is_gpu: bool, whole_until_s: float) -> None:
        by_number: dict[int, Step] = {}
        for step in sorted(self.steps, key=lambda step: step.start_s):
            by_number.setdefault(step.number, step)
        steps = list(by_number.values())
        if is_gpu and steps:
            steps = self._moved_to_gpu(steps)
        lasts = [part.end_s or part.start_s for part in found.parts]
        first = min([*found.busy_start_s[:1], *(part.posted_s for part in found.parts)], default=0.0)
        last = max([*found.busy_end_s[-1:], *lasts], default=first)
        if whole_until_s < float("inf"):
            # A step of a GPU may seem to have ended where only its first kernels are in the file.
            whole = [step for step in (steps[:-1] if is_gpu else steps) if step.end_s <= whole_until_s]
            if not whole:
                raise damaged(self.path, f"it ends too soon, after {self.num_events} events, before a step is whole")
            left = f"{len(steps) - len(whole)} of {len(steps)} steps, which are not whole, are left out"
            found.limits.append(f"the file ends in the middle, after {self.num_events} events: {left}")
            steps = whole
        if not steps:
            found.limits.append(
                "no steps are marked (profiler.step() was not called): the whole trace counts as one step"
            )
            steps = [Step(0, first, last)]
        if first < steps[0].start_s - FAR_S or last > steps[-1].end_s + FAR_S:
            raise damaged(self.path, "the file has events more than an hour away from its steps")
        for before, after in pairwise(steps):
            before.end_s = after.start_s  # what stands between two steps belongs to the first
        found.steps = steps

    def _moved_to_gpu(self, steps: list[Step]) -> list[Step]:
        """Return steps by when their kernels ran: what the host launched within a step is of that step."""
        by_number = {step.number: step for step in self.steps_on_gpu}
        if len(by_number) == len(steps) and all(step.number in by_number for step in steps):
            return sorted(by_number.values(), key=lambda step: step.start_s)
        launches = sorted(zip(*self.launches, strict=True))
        exchanges = ((of.get("correlation"), start, end) for _, start, end, of in self.exchanges_on_gpu)
        others = zip(self.kernels[2], self.kernels[0], self.kernels[1], strict=True)
        kernels = sorted([*others, *(one for one in exchanges if type(one[0]) is int)])
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

    def _phase(self, moment_s: float | None) -> str:
        starts, ends = self.backward
        if moment_s is None or not starts:
            return ""
        place = bisect_right(starts, moment_s) - 1
        return "backward" if place >= 0 and ends[place] >= moment_s else "forward"

    def _of_gpu(self, found: RankTrace) -> None:
        found.busy_start_s, found.busy_end_s = union(self.kernels[0], self.kernels[1])
        wanted = {arguments.get("correlation") for _, _, _, arguments in self.exchanges_on_gpu}
        launched = {number: time for time, number in zip(*self.launches, strict=True) if number in wanted}
        before = sorted(zip(self.kernels[2], self.kernels[1], strict=True))
        correlations = [correlation for correlation, _ in before]
        latest = list(accumulate((end for _, end in before), max))
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
                "the file cuts lists of split sizes: which rank sent how much in its larger groups is not known"
            )
        if any(part.kind in ("dispatch", "combine", "notify") for part in found.parts):
            found.limits.append(
                "kernels of DeepEP and similar libraries carry no group and no sizes: the doctor matches them "
                "by their order"
            )

    def _of_cpu(self, found: RankTrace, is_cut: bool) -> None:
        self.posts.sort(key=lambda post: post[1])
        by_thread: dict[object, list[float]] = defaultdict(list)
        for _, start_s, _, thread, _ in self.posts:
            by_thread[thread].append(start_s)
        labelled = self._labelled()
        holding = {thread: list(own) for thread, own in by_thread.items()}
        for _, start_s, _, thread in self.labels:
            holding.setdefault(thread, []).append(start_s)
        for thread, start_s in self.waits:
            holding.setdefault(thread, []).append(start_s)
        starts, ends = array("d"), array("d")
        waiting_threads = {*by_thread, *(thread for *_, thread in self.labels), *_with_several_at_once(self.by_workers)}
        workers = {thread for _, _, _, thread in self.by_workers} - waiting_threads
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
        found.backward_start_s, found.backward_end_s = self.backward
        waiting: dict[str, list[Part]] = defaultdict(list)
        for kind, start_s, _, _, arguments in self.posts:
            part = Part(kind, start_s, start_s, None, phase=self._phase(start_s))
            from_operator(part, arguments)
            found.parts.append(part)
            waiting[as_run(kind)].append(part)
        lanes: dict[object, int] = {}
        alone, begins = count(MOST_LANES), sorted(step.start_s for step in self.steps)
        for part in labelled:
            part.lane = next(alone)
            found.parts.append(part)
        for name, start_s, end_s, thread in sorted(self.by_workers, key=lambda one: one[1]):
            of_kind = waiting.get(as_run(kind_of_name(name) or ""), [])
            if is_cut:  # threads stand one after the other in a file, and what the last ones ran may be missing
                at = bisect_right(begins, start_s)
                of_kind[:] = [part for part in of_kind if bisect_right(begins, part.posted_s) >= at]
            if of_kind and of_kind[0].posted_s <= start_s:
                part = of_kind.pop(0)
                part.start_s, part.end_s, part.is_noticed = start_s, end_s, thread in waiting_threads
            else:
                part = Part(kind_of_name(name) or "exchange", start_s, start_s, end_s, phase=self._phase(start_s))
                part.is_noticed = thread in waiting_threads
                found.parts.append(part)  # handed over before the trace began, or by what it doesn't show
            # what ends when it is noticed didn't hold up what was handed over after it
            part.lane = next(alone) if part.is_noticed else lanes.setdefault(thread, len(lanes))
        unknown = [part for part in found.parts if part.end_s is None]
        if unknown:
            found.limits.append(
                f"of {len(unknown)} of {len(found.parts)} exchanges the file doesn't say when they ended"
            )
        ends_of_posts = {start_s: end_s for _, start_s, end_s, _, _ in self.posts}
        for part in unknown if not is_cut else ():  # of what was cut off, other ranks' files may tell
            part.end_s = ends_of_posts.get(part.posted_s, part.posted_s)

    def _labelled(self) -> list[Part]:
        """Return this package's exchanges, each of the messages that were posted under its label, and take them out."""
        self.by_workers.sort(key=lambda one: one[1])
        starts = [start_s for _, start_s, _, _ in self.by_workers]
        taken: set[int] = set()
        found = []
        for label, start_s, end_s, thread in self.labels:
            places = range(bisect_left(starts, start_s), bisect_right(starts, end_s))
            own = [place for place in places if self.by_workers[place][3] == thread]
            taken.update(own)
            ends = [self.by_workers[place][2] for place in own]
            part = Part("all_to_all", end_s, end_s, None, phase=self._phase(start_s))
            part.is_noticed = True
            from_label(part, label)
            if ends or not any((*(part.sent or ()), *(part.received or ()))):
                part.end_s = max(ends, default=end_s)
            found.append(part)
        self.by_workers = [one for place, one in enumerate(self.by_workers) if place not in taken]
        return found


def host_in_name(name: str, processes: Collection[object]) -> str:
    """Return the host that the name of a trace has; "" where the process in it is none whose events these are.

    Then the name is one that somebody gave: "rank_3" is of no host.
    """
    found = OF_TENSORBOARD.fullmatch(name)
    return found[1] if found is not None and found[2] in processes else ""


def _with_several_at_once(exchanges: Sequence[tuple[str, float, float, object]]) -> set[object]:
    """Return the threads that have several exchanges under way at once: they hand them over, and run none of them."""
    found: set[object] = set()
    ends: dict[object, float] = {}
    for _, start_s, end_s, thread in sorted(exchanges, key=lambda one: one[1]):
        if start_s < ends.get(thread, float("-inf")):
            found.add(thread)
        ends[thread] = max(end_s, ends.get(thread, end_s))
    return found
