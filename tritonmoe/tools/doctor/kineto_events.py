"""KinetoEvents: what stands in one trace of torch.profiler (Kineto), event by event, in columns.

The arguments of an event tell the group of its exchange, its sizes, and who sent what: they are those of NCCL's kernels
and of record_param_comms, or the inputs of a c10d operator.
"""

import math
import re
from array import array
from collections import defaultdict
from pathlib import Path
from typing import TypeGuard

from tritonmoe.runtime.files import Json, num_elements
from tritonmoe.tools.doctor.exchange_names import ELEMENT_BYTES, kind_of_kernel, kind_of_name, kind_of_operator
from tritonmoe.tools.doctor.trace import Part, Step
from tritonmoe.tools.doctor.trace_files import damaged
from tritonmoe.transports.progress_thread import LABEL

__all__ = ["KinetoEvents", "from_label", "from_nccl", "from_operator"]

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"}
OPERATORS = {"cpu_op", "operator"}
RUNTIMES = {"cuda_runtime", "cuda_driver", "hip_runtime", "runtime", "hip_api", "privateuse1_runtime"}
WORKERS = ("gloo:", "mpi:")
"""How the threads call what they do that run exchanges on CPUs."""
NO_WORK = ("autograd::", "c10d::", "record_param_comms", "_c10d_functional::", "profiler::", "torchdynamo::")
STEP = re.compile(r"ProfilerStep\s*#\s*(\d+)")
COMMON = re.compile(
    r'\{\s*"ph": "(?:(?P<arrow>[sft])"[^{}]*\}'
    r'|X",\s*"cat": "(?:cpu_op",\s*"name": "(?P<operator>aten::(?!topk")[^"\\]*)",\s*"pid": \d+,'
    r'\s*"tid": (?P<thread>\d+),\s*"ts": (?P<began>\d+\.?\d*),\s*"dur": (?P<lasts>\d+\.?\d*)[^{}]*\{[^{}]*\}\s*\}'
    r'|(?P<launch>cuda_runtime|hip_runtime)",\s*"name": "[^"]*",\s*"pid": \d+,\s*"tid": \d+,'
    r'\s*"ts": (?P<at>\d+\.?\d*),'
    r'[^{}]*\{[^{}]*?"correlation": (?P<of>\d{1,15})\b[^{}]*\}\s*\}'
    r'|(?P<kernel>kernel)",\s*"name": "(?P<name>[^"\\]*)",\s*"pid": \d+,\s*"tid": \d+,'
    r'\s*"ts": (?P<start>\d+\.?\d*),\s*"dur": (?P<dur>\d+\.?\d*)\s*,\s*"args": \{'
    r'(?P<args>[^{}]*?)"correlation": (?P<id>\d{1,15})\b(?P<more>[^{}]*)\}\s*\}))\s*,\s*(?=\S)'
)
"""What most events of a trace are, as Kineto itself writes them: taken from the text, five times as fast as JSON."""
LAST_S = 1e12
LONGEST_BACKWARD_US = 1e3
"""An event may end so long before it begins: the clocks of a GPU and of its host differ."""
BACKWARD = "autograd::engine::evaluate_function"


class KinetoEvents:
    """Takes the members and events of one trace."""

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
        self.labels: list[tuple[str, float, float, object]] = []
        """Of this package's exchanges, beside the messages that each consists of."""
        self.comms: list[tuple[float, dict]] = []
        """Of record_param_comms, with which NCCL's exchanges are handed over."""
        self.routed: dict[int, tuple[int, int]] = {}
        """The most rows, and choices of each, of operators that choose, by the dimensions of what they choose from."""
        self.num_backward = 0
        """How many events end before they begin; their durations count as 0."""
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
        if not -1e18 < start < 1e19 or not -LONGEST_BACKWARD_US <= seconds < 1e15:
            raise self._wrong(f"({name[:40]}) has impossible times")
        if seconds < 0:
            self.num_backward += 1
            seconds = 0
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
            elif name.startswith(LABEL) and category == "user_annotation":
                self.labels.append((name, start_s, end_s, value.get("tid")))

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


def _is_number(value: object) -> TypeGuard[float]:
    kind = type(value)  # faster than isinstance, which takes True for a number
    return kind is float or kind is int


def from_nccl(part: Part, arguments: dict) -> bool:
    """Add what NCCL's exchange says of itself; give whether a list in it was cut."""
    name = arguments.get("Process Group Name")
    if isinstance(name, str | int):
        part.group = str(name)
    peer = arguments.get("Dst Rank" if part.kind == "send" else "Src Rank")
    if part.kind in ("send", "recv") and re.fullmatch(r"\d{1,7}", str(peer)):
        part.peer = int(str(peer))
    sequence = arguments.get("Seq")
    if type(sequence) is int:
        part.sequence = sequence
    ranks, is_cut = _whole_numbers(arguments.get("Process Group Ranks", ""))
    size = arguments.get("Group size")
    if ranks and not is_cut and (type(size) is not int or size == len(ranks)):
        part.group_ranks = ranks
    element = ELEMENT_BYTES.get(str(arguments.get("dtype", "")).lower(), 0)
    part.element_bytes = element or None
    elements = arguments.get("In msg nelems")
    if element and type(elements) is int and elements >= 0:
        part.num_bytes = element * elements
    sent, sent_cut = _whole_numbers(arguments.get("In split size", ""))
    received, received_cut = _whole_numbers(arguments.get("Out split size", ""))
    is_cut = is_cut or sent_cut or received_cut
    are_whole = sent and received and not (sent_cut or received_cut)
    if are_whole and type(size) is int and len(sent) == len(received) == size:
        part.rows = sum(received)
        row = part.num_bytes / sum(sent) if part.num_bytes and sum(sent) else 0
        if row:
            part.sent = tuple(int(one * row) for one in sent)
            part.received = tuple(int(one * row) for one in received)
    return is_cut


def from_label(part: Part, label: str) -> None:
    """Add what the label of this package's exchange says: its group, its number there, and who sent how much."""
    words = label.split()
    said = dict(zip(words[1::2], words[2::2], strict=False))
    part.group = f"{LABEL} {said.get('group')}"
    ranks, sent, received, (number, *_), (row, *_), (element, *_) = (
        _whole_numbers(said.get(name, "0"))[0]
        for name in ("ranks", "sent", "received", "number", "row_bytes", "element_bytes")
    )
    if len(ranks) == len(sent) == len(received):
        part.group_ranks, part.sequence, part.rows, part.element_bytes = ranks, number, sum(received), element
        part.sent, part.received = tuple(row * one for one in sent), tuple(row * one for one in received)
        part.num_bytes = sum(part.sent)


def from_operator(part: Part, arguments: dict) -> None:
    """Add what an operator's inputs say: sizes, where shapes are recorded, and the splits of an all-to-all."""
    dims, types, inputs = (arguments.get(key) for key in ("Input Dims", "Input type", "Concrete Inputs"))
    if not isinstance(dims, list) or not isinstance(types, list) or len(dims) < 1:
        dims, types = [], []
    tensor = dims[1] if part.kind == "all_to_all" and len(dims) > 1 else dims[0] if dims else None
    while isinstance(tensor, list) and tensor and isinstance(tensor[0], list):
        tensor = tensor[0]
    known = next((ELEMENT_BYTES[str(one).lower()] for one in types if str(one).lower() in ELEMENT_BYTES), None)
    element = 4 if known is None else known
    part.element_bytes = known
    elements = num_elements(tensor)
    if elements is not None:
        part.num_bytes = element * elements
    if part.kind in ("send", "recv") and isinstance(inputs, list) and len(inputs) > 2:
        part.peer = int(inputs[2]) if re.fullmatch(r"\d{1,7}", str(inputs[2])) else None
    if part.kind != "all_to_all" or not isinstance(inputs, list) or len(inputs) < 5:
        return
    received, cut_received = _whole_numbers(inputs[3])
    sent, cut_sent = _whole_numbers(inputs[4])
    if received and len(sent) == len(received) and not (cut_received or cut_sent):
        part.rows = sum(received)
        if isinstance(tensor, list) and tensor and part.num_bytes is not None:
            row = element * math.prod(tensor[1:])
            part.sent, part.received = tuple(one * row for one in sent), tuple(one * row for one in received)


def routed_of(arguments: dict) -> tuple[int, int, int] | None:
    """Return how many dimensions an operator chooses from, how many rows these are, and how many it chooses of each."""
    dims, inputs = arguments.get("Input Dims"), arguments.get("Concrete Inputs")
    sizes = dims[0] if isinstance(dims, list) and dims else None
    chosen = re.fullmatch(r"\d{1,6}", str(inputs[1])) if isinstance(inputs, list) and len(inputs) > 1 else None
    if not isinstance(sizes, list) or len(sizes) < 2 or chosen is None or not num_elements(sizes):
        return None
    return len(sizes), math.prod(sizes[:-1]), int(chosen[0])


def _whole_numbers(text: object) -> tuple[tuple[int, ...], bool]:
    """Return the numbers of a list that was written as text, and whether it was cut."""
    if isinstance(text, list):
        return tuple(one for one in text if type(one) is int), False
    text = str(text)
    return tuple(int(digits) for digits in re.findall(r"\d{1,15}", text)), "..." in text
