"""Reader of a pipeline's timeline: a Chrome trace of whole forwards, backwards and transfers, as of StragglerAnalysis.

Each event says its step and micro-batch; names of processes and threads say which data- and pipeline-parallel rank it
is of. So every dependence is known: which transfer a forward needs, which end it meets, and which went as one.
"""

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from tritonmoe.tools.doctor.graph import Graph, Kind, Member, Run, indices
from tritonmoe.tools.doctor.trace_files import damaged, number
from tritonmoe.tools.doctor.walk import walker_of

__all__ = ["is_timeline", "read_timeline", "slowdown_of"]

NAMES = {
    "forward-compute", "backward-compute", "forward-send", "forward-recv", "backward-send", "backward-recv",
    "params-all-gather", "grads-reduce-scatter", "layernorm-grads-all-reduce", "embedding-grads-all-reduce",
    "optimizer-clip-main-grad", "optimizer", "gc",
}  # fmt: skip
BEFORE = ("params-all-gather",)
"""Exchanges that the first forward of a step waits for; others follow its last backward."""
WITH_ALL = ("optimizer-clip-main-grad",)
ALONE = ("layernorm-grads-all-reduce",)
"""Exchanges of tensor-parallel ranks, of which one stands for all."""
SLOWEST = 0.03
SAME_START_US = 1.0
"""Sends and receives that started together went as one batch."""


class PipelineEvent(NamedTuple):
    """One operation; times in seconds."""

    name: str
    worker: int
    start_s: float
    end_s: float
    chunk: int


_OfLinks: TypeAlias = dict[tuple[int, int, str], list[PipelineEvent]]
"""By sender, receiver and way."""


class _Pipeline:
    """Builds the graph of a timeline."""

    def __init__(self, path: Path, workers: list[tuple[int, int]], steps: dict[int, list[PipelineEvent]]) -> None:
        """workers: data- and pipeline-parallel rank of each. steps: the events of every step."""
        self.path, self.workers, self.steps = path, workers, steps
        self.stages = 1 + max(stage for _, stage in workers)
        self.graph_ = Graph(list(range(len(workers))), list(steps))
        self.graph_.programs = [[] for _ in workers]
        self.graph_.begin_s = [0.0] * len(workers)
        self.graph_.names = {index: f"dp {data} pp {stage}" for index, (data, stage) in enumerate(workers)}
        self.graph_.replicas, self.graph_.stages = zip(*workers, strict=True)
        self.worker_at = {place: index for index, place in enumerate(workers)}
        chunks = [of.chunk for events in steps.values() for of in events if of.name == "forward-compute"]
        self.last_chunk = max(chunks, default=-1)

    def graph(self) -> tuple[Graph, list[str]]:
        """Return the graph, and what the file can't tell.

        Raises:
            ValueError: sends and receives don't fit each other.
        """
        for index, (step, events) in enumerate(self.steps.items()):
            self._step(index, step, events)
        limits = [
            "the file has one rank for each group of tensor-parallel ranks: which rank of a group is at fault "
            "is not known"
        ]
        numbers = list(self.steps)
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            limits.append(f"{len(numbers)} steps between {numbers[0]} and {numbers[-1]}, not one after the other")
        return self.graph_, limits

    def _exchange(
        self, step: int, starts: dict[int, float], ends: dict[int, float], key: tuple, lane: int
    ) -> dict[int, int]:
        """Add an exchange between workers; give the member of each."""
        graph, latest = self.graph_, max(starts.values())
        found = {}
        for worker in starts:
            found[worker] = len(graph.members)
            transfer_s = max(0.0, ends[worker] - latest)
            graph.members.append(Member(worker, step, len(graph.exchanges), key, lane, 0.0, transfer_s))
        graph.exchanges.append(list(found.values()))
        return found

    def _step(self, index: int, step: int, events: list[PipelineEvent]) -> None:
        graph = self.graph_
        first_s = min(event.start_s for event in events)
        graph.measured_s.append(max(event.end_s for event in events) - first_s)
        by_worker: dict[int, list[PipelineEvent]] = defaultdict(list)
        for event in sorted(events, key=lambda event: (event.start_s, event.end_s)):
            by_worker[event.worker].append(event)
        if len(by_worker) != len(self.workers):
            raise damaged(self.path, f"step {step} is of {len(by_worker)} of {len(self.workers)} workers")
        batches = self._transfers(index, step, by_worker)
        shared = self._collectives(index, by_worker)
        for worker, own in by_worker.items():
            self._program(index, worker, own, batches[worker], shared)
        ends = self._exchange(index, dict.fromkeys(by_worker, 0.0), dict.fromkeys(by_worker, 0.0), ("step",), -1)
        for worker in by_worker:
            graph.programs[worker] += [(Kind.POST, ends[worker]), (Kind.WAIT, ends[worker]), (Kind.STEP, index)]

    def _collectives(self, index: int, by_worker: dict[int, list[PipelineEvent]]) -> dict[int, int]:
        """Match what is no send and no receive; give the members by the event's id."""
        groups: dict[tuple, list[PipelineEvent]] = defaultdict(list)
        for worker, own in by_worker.items():
            data, stage = self.workers[worker]
            seen: dict[str, int] = defaultdict(int)
            for event in own:
                name = event.name
                if name.endswith(("compute", "send", "recv")) or name in ("optimizer", "gc"):
                    continue
                if name in WITH_ALL:
                    group: tuple = ()
                elif name in ALONE:
                    group = (worker,)
                elif name.startswith("embedding"):
                    group = ("dp", data)
                else:
                    group = ("pp", stage)
                groups[name, group, seen[name]].append(event)
                seen[name] += 1
        members: dict[int, int] = {}
        for (name, group, _), matched in groups.items():
            key = (name, self.workers[matched[0].worker][1]) if group and group[0] == "pp" else (name,)
            starts = {event.worker: event.start_s for event in matched}
            found = self._exchange(index, starts, {event.worker: event.end_s for event in matched}, key, 3)
            members |= {id(event): found[event.worker] for event in matched}
        return members

    def _transfers(
        self, index: int, step: int, by_worker: dict[int, list[PipelineEvent]]
    ) -> dict[int, list[tuple[list[PipelineEvent], int]]]:
        """Match sends with receives; give each worker's batches of them, in order, with their members."""
        batches: list[tuple[int, list[PipelineEvent]]] = []
        batch_of: dict[int, int] = {}
        for worker, own in by_worker.items():
            for event in (event for event in own if event.name.endswith(("send", "recv"))):
                last = batches[-1] if batches else None
                if not last or last[0] != worker or event.start_s - last[1][-1].start_s >= SAME_START_US / 1e6:
                    batches.append((worker, []))
                batches[-1][1].append(event)
                batch_of[id(event)] = len(batches) - 1
        parent = list(range(len(batches)))

        def root(one: int) -> int:
            while parent[one] != one:
                parent[one] = parent[parent[one]]
                one = parent[one]
            return one

        sends, receives = self._by_link(by_worker)
        for link, sent in sends.items():
            received = receives.pop(link, [])
            if len(sent) != len(received):
                raise damaged(self.path, f"step {step}: {len(sent)} sends meet {len(received)} receives")
            for source, target in zip(sent, received, strict=True):
                parent[root(batch_of[id(source)])] = root(batch_of[id(target)])
        if any(receives.values()):
            raise damaged(self.path, f"step {step}: there are receives that nobody sends to")
        together: dict[int, list[tuple[int, list[PipelineEvent]]]] = defaultdict(list)
        for place, one in enumerate(batches):
            together[root(place)].append(one)
        members: dict[int, int] = {}
        for parts in together.values():
            starts = {worker: batch[0].start_s for worker, batch in parts}
            if len(starts) != len(parts):
                raise damaged(self.path, f"step {step}: a worker takes part in one transfer twice")
            ends = {worker: max(event.end_s for event in batch) for worker, batch in parts}
            names = sorted({event.name for _, batch in parts for event in batch})
            found = self._exchange(index, starts, ends, ("transfer", *names), 1)
            members |= {id(batch): found[worker] for worker, batch in parts}
        of_workers: dict[int, list[tuple[list[PipelineEvent], int]]] = {worker: [] for worker in by_worker}
        for worker, batch in batches:
            of_workers[worker].append((batch, members[id(batch)]))
        return of_workers

    def _by_link(self, by_worker: dict[int, list[PipelineEvent]]) -> tuple[_OfLinks, _OfLinks]:
        """Return the sends, and the receives, in the order of their events, by the link that they use."""
        sends: _OfLinks = defaultdict(list)
        receives: _OfLinks = defaultdict(list)
        for worker, own in by_worker.items():
            data, stage = self.workers[worker]
            for event in own:
                way, _, what = event.name.partition("-")
                if what == "send":
                    other = (stage + (1 if way == "forward" else -1)) % self.stages
                    sends[worker, self._at(data, other), way].append(event)
                elif what == "recv":
                    other = (stage - (1 if way == "forward" else -1)) % self.stages
                    receives[self._at(data, other), worker, way].append(event)
        return sends, receives

    def _at(self, data: int, stage: int) -> int:
        worker = self.worker_at.get((data, stage))
        if worker is None:
            raise damaged(self.path, f"there is no worker of data-parallel rank {data} and pipeline stage {stage}")
        return worker

    def _program(
        self,
        index: int,
        worker: int,
        own: list[PipelineEvent],
        batches: list[tuple[list[PipelineEvent], int]],
        shared: dict[int, int],
    ) -> None:
        """Add one worker's step to its program."""
        graph, program = self.graph_, self.graph_.programs[worker]
        stage = self.workers[worker][1]
        computes = [event for event in own if event.name.endswith("compute") or event.name in ("optimizer", "gc")]
        after: dict[int, list[int]] = defaultdict(list)
        needed: dict[str, list[int]] = {"forward-recv": [], "backward-recv": []}
        made = {"forward-send": -1, "backward-send": -1}
        sources: dict[str, list[int]] = {"forward-send": [], "backward-send": []}
        for count, event in enumerate(computes):
            if event.name == "forward-compute" and not self._is_last(stage, event):
                sources["forward-send"].append(count)
            elif event.name == "backward-compute" and not self._is_first(stage, event):
                sources["backward-send"].append(count)
        seen: Counter[tuple[str, int]] = Counter()
        place = -1
        for batch, member in batches:
            for event in batch:
                if event.name in sources:
                    made[event.name] += 1
                    if made[event.name] < len(sources[event.name]):
                        place = max(place, sources[event.name][made[event.name]])
                else:
                    needed[event.name].append(member)
            after[place].append(member)
        waits = {name: iter(of_name) for name, of_name in needed.items()}

        def exchange(events: Iterable[PipelineEvent]) -> None:
            for event in events:
                program.extend([(Kind.POST, shared[id(event)]), (Kind.WAIT, shared[id(event)])])

        exchange(event for event in own if id(event) in shared and event.name in BEFORE)
        program += [(Kind.POST, member) for member in after[-1]]
        rest = [event for event in own if id(event) in shared and event.name not in BEFORE]
        for count, event in enumerate(computes):
            if event.name == "optimizer":
                exchange(rest)
                rest = []
            way, _, what = event.name.partition("-")
            is_end = self._is_first if way == "forward" else self._is_last
            if what == "compute" and not is_end(stage, event):
                program += [(Kind.WAIT, member) for member in islice(waits[f"{way}-recv"], 1)]
            graph.runs.append(Run(worker, index, (event.name,), event.end_s - event.start_s))
            if what == "compute":
                graph.runs[-1].batch = 2 * seen[event.name, event.chunk] + (way == "backward")
                seen[event.name, event.chunk] += 1
            program.append((Kind.RUN, len(graph.runs) - 1))
            program += [(Kind.POST, member) for member in after[count]]
        exchange(rest)

    def _is_first(self, stage: int, event: PipelineEvent) -> bool:
        return stage == 0 and event.chunk <= 0

    def _is_last(self, stage: int, event: PipelineEvent) -> bool:
        return stage == self.stages - 1 and event.chunk == self.last_chunk


def is_timeline(event: object) -> bool:
    """Return whether this event is one of a pipeline's timeline."""
    if not isinstance(event, dict) or not _is_known(event):
        return False
    arguments = event.get("args")
    return isinstance(arguments, dict) and "step" in arguments and "seq_id" in arguments


def _is_known(event: dict) -> bool:
    name = event.get("name")
    return isinstance(name, str) and name in NAMES


def read_timeline(path: Path, events: Iterable[object]) -> tuple[Graph, list[str]]:
    """Read the events of a timeline; give the graph of its steps, and what the file can't tell.

    Raises:
        ValueError: an event is damaged, or sends and receives don't fit each other.
    """
    of_process: dict[object, int] = {}
    of_thread: dict[tuple[object, object], tuple[int, int]] = {}
    found = []
    for count, event in enumerate(events):
        if not isinstance(event, dict):
            raise damaged(path, f"event {count} is {type(event).__name__} and no object")
        arguments = event.get("args")
        if event.get("ph") == "M" and isinstance(arguments, dict):
            numbers = [int(text) for text in re.findall(r"\d+", str(arguments.get("name", "")))][:2]
            if event.get("name") == "process_name" and numbers:
                of_process[_hashable(path, count, event.get("pid"))] = numbers[0]
            elif event.get("name") == "thread_name" and len(numbers) == 2:
                of_thread[_hashable(path, count, event.get("pid")), _hashable(path, count, event.get("tid"))] = (
                    numbers[0], numbers[1],
                )  # fmt: skip
        elif event.get("ph") == "X" and _is_known(event):
            if not isinstance(arguments, dict):
                raise damaged(path, f"event {count} has no args")
            found.append((count, event, arguments))
    if not found:
        raise damaged(path, "there is no event of a pipeline in it")
    steps: dict[int, list[PipelineEvent]] = defaultdict(list)
    workers: dict[tuple[int, int], int] = {}
    for count, event, arguments in found:
        process, thread = _hashable(path, count, event.get("pid")), _hashable(path, count, event.get("tid"))
        if process not in of_process or (process, thread) not in of_thread:
            raise damaged(path, f"event {count} is of a process or thread without a name")
        place = (of_process[process], of_thread[process, thread][0])
        worker = workers.setdefault(place, len(workers))
        start_s, seconds = (number(path, f"event {count}", event, key) / 1e6 for key in ("ts", "dur"))
        if seconds < 0:
            raise damaged(path, f"event {count} ends before it starts")
        step, _, chunk = (
            int(number(path, f"event {count}", arguments, key, default))
            for key, default in (("step", None), ("seq_id", None), ("model_chunk", -1))
        )
        steps[step].append(PipelineEvent(event["name"], worker, start_s, start_s + seconds, chunk))
    return _Pipeline(path, list(workers), dict(sorted(steps.items()))).graph()


def _hashable(path: Path, count: int, value: object) -> int | str:
    if not isinstance(value, int | str):
        raise damaged(path, f"event {count} has a process or thread that is neither a number nor a text")
    return value


class Slowdown(NamedTuple):
    """The figures of one job, as StragglerAnalysis defines them, so that its published figures can be compared.

    S is what the steps took over what they would take with every computation at the mean of its kind and every
    transfer at the median of its kind. M_W is the part of that slowdown that is gone when the slowest workers alone,
    3 %, are so, and M_S the part that is gone when the last stage alone is.
    """

    S: float
    M_W: float
    M_S: float
    slowest: tuple[int, ...]
    """Indices of the slowest workers."""


def slowdown_of(graph: Graph) -> Slowdown:
    """Return S, M_W and M_S of a timeline's graph."""
    walker, tables = walker_of(graph), graph.tables
    ideal_busy_s, ideal_transfer_s = torch.zeros_like(tables.busy_s), torch.zeros_like(tables.transfer_s)
    for key in range(len(tables.keys)):
        runs, members = tables.run_key == key, tables.member_key == key
        if bool(runs.any()):
            ideal_busy_s[runs] = tables.busy_s[runs].mean()
        if bool(members.any()):
            ideal_transfer_s[members] = statistics.median(tables.transfer_s[members].tolist())
    size = len(graph.ranks)
    excess = torch.zeros(size, dtype=torch.float64, device="cpu")
    excess.index_add_(0, tables.run_rank, tables.busy_s - ideal_busy_s)
    slowest = tuple(excess.argsort(descending=True, stable=True)[: max(1, math.floor(SLOWEST * size))].tolist())
    last = [rank for rank, stage in enumerate(graph.stages) if stage == max(graph.stages)]
    busy_s, transfer_s = (
        torch.stack([torch.where(torch.isin(rank, indices(of)), ideal, was) for of in ((), range(size), slowest, last)])
        for was, ideal, rank in (
            (tables.busy_s, ideal_busy_s, tables.run_rank),
            (tables.transfer_s, ideal_transfer_s, tables.member_rank),
        )
    )
    was, ideal, *mended = map(statistics.fmean, walker.all_step_times(busy_s, transfer_s))
    M_W, M_S = ((was - without) / (was - ideal) if was != ideal else 0.0 for without in mended)
    return Slowdown(was / ideal if ideal else 0.0, M_W, M_S, slowest)
