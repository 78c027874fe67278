"""Reader of a pipeline's timeline: a Chrome trace of whole forwards, backwards and transfers, as of StragglerAnalysis.

Each event says its step and micro-batch; names of processes and threads say which data- and pipeline-parallel rank it
is of. So every dependence is known: which transfer a forward needs, which end it meets, and which went as one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.pipeline_graph import PipelineEvent, pipeline_graph
from tritonmoe.tools.doctor.trace_files import damaged, number

__all__ = ["is_timeline", "read_timeline"]

NAMES = {
    "forward-compute", "backward-compute", "forward-send", "forward-recv", "backward-send", "backward-recv",
    "params-all-gather", "grads-reduce-scatter", "layernorm-grads-all-reduce", "embedding-grads-all-reduce",
    "optimizer-clip-main-grad", "optimizer", "gc",
}  # fmt: skip


def is_timeline(event: object) -> bool:
    """Say whether this event is one of a pipeline's timeline."""
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
        step, sequence, chunk = (
            int(number(path, f"event {count}", arguments, key, default))
            for key, default in (("step", None), ("seq_id", None), ("model_chunk", -1))
        )
        steps[step].append(PipelineEvent(event["name"], worker, start_s, start_s + seconds, sequence, chunk))
    return pipeline_graph(path, list(workers), dict(sorted(steps.items())))


def _hashable(path: Path, count: int, value: object) -> int | str:
    if not isinstance(value, int | str):
        raise damaged(path, f"event {count} has a process or thread that is neither a number nor a text")
    return value
