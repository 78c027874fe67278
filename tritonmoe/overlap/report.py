"""What a layer call did: the time of every step of a pass, what travelled, and the plan that ran."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.count_exchange import CallMarks
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.runtime.expert_blocks import Span, seconds_of
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.runtime.streamed import PassLoads

__all__ = [
    "CopiesReport",
    "Keeps",
    "LayerReport",
    "Mark",
    "PassReport",
    "StepMarks",
    "StepTiming",
    "clock_of",
    "covered_s",
]

SHORTEST_WAIT_S = 2e-5
"""Between the two marks around a wait that is over already less passes on a device."""

Keeps = Literal["hidden", "rows", "nothing"]
"""What stays of a call from the forward to the backward: see LayerReport.keeps."""
Mark = float | torch.cuda.Event | None
"""A moment on the lane that computes: the host's clock, or an event of the device's stream; None in a CUDA graph."""


def clock_of(device: torch.device) -> Callable[[], Mark]:
    """Return what takes the present moment, in a pass that begins now."""
    if is_captured(device):
        return _no_mark
    return partial(_event, device) if device.type == "cuda" else time.perf_counter


def _no_mark() -> None:
    return None


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))  # which need not be the current device
    return event


class StepMarks(NamedTuple):
    """When a step ran, as the compute lane sees it."""

    step: Step
    started: Mark
    """Of an exchange: before its rows were packed."""
    ended: Mark
    """Of an exchange: when the wait for it was over."""
    posted: Mark = None
    """This and the next ones are an exchange's."""
    wait_started: Mark = None
    finished: float | None = None
    """When its rows had arrived, by the host's clock, as far as the transport knows."""
    arrivals: tuple[float | None, ...] | None = None
    """The same for the rows of every rank; see PendingExchange.arrivals."""
    load_s: float = 0.0
    """Of a step that computes on a CPU: as in StepTiming."""
    loads: tuple[Span, ...] = ()
    """Of a step that computes on a GPU: where its stream waited for experts."""


@dataclass(frozen=True)
class StepTiming:
    """When one step ran, in seconds from the start of its pass."""

    step: Step
    start_s: float
    end_s: float
    """When it ended; an exchange ends when its rows have arrived, or where that is not known, when the wait for it is
    over."""
    wait_s: float
    """How long the compute lane stood still for an exchange."""
    post_s: float = 0.0
    """How long packing and posting an exchange took, on the compute lane."""
    arrivals_s: tuple[float | None, ...] | None = None
    """When the rows of every rank had arrived; None where that is not known, and for this rank's own."""
    is_end_known: bool = True
    """False for an exchange of which it is only known that it had ended when it was waited for (NCCL)."""
    load_s: float = 0.0
    """For how long of it products waited for experts that are read from a file, or copied from host memory."""

    @property
    def held_s(self) -> float:
        """How long the step held the compute lane, but for a wait: an exchange while it was packed and posted."""
        return self.post_s if self.step.lane == "comm" else self.end_s - self.start_s

    def shifted(self, offset_s: float) -> "StepTiming":
        """Return it so much later."""
        arrivals = self.arrivals_s and tuple(None if at is None else at + offset_s for at in self.arrivals_s)
        return replace(self, start_s=self.start_s + offset_s, end_s=self.end_s + offset_s, arrivals_s=arrivals)


def covered_s(spans: Iterable[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Return for how long of the time from start_s to end_s any of the spans lasts.

    Example:
        covered_s([(0, 2), (1, 3), (4, 9)], 1, 5) gives 3.
    """
    total_s, reached_s = 0.0, start_s
    for begin_s, over_s in sorted(spans):
        total_s += max(0.0, min(over_s, end_s) - max(begin_s, reached_s))
        reached_s = max(reached_s, over_s)
    return total_s


class PassReport:
    """The timings of one pass over a layer; read lazily, since on CUDA that waits until the device has ended it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ran: list[StepMarks] = []
        """The steps that have ended, in the order in which they did on the compute lane."""
        self.inside: list[tuple[Step, PassReport]] = []
        """On two levels: what steps did inside the node, with times from the start of each."""
        self.marks: CallMarks | None = None
        """When the rank came to the pass and had heard from all ranks; None if they exchanged no headers before it."""
        self.loads: PassLoads | None = None
        """What was read of experts that stay elsewhere; waits for them are part of compute_s, and `steps` say of which
        step (load_s). None where experts are in memory."""
        self._steps: list[StepTiming] | None = None
        self.now = clock_of(device)
        self._origin = self.now()
        self._end = self._origin
        self.started_at = self._origin if isinstance(self._origin, float) else time.perf_counter()
        """The start of the pass, by the host's clock."""

    def __repr__(self) -> str:
        return f"PassReport({self})"

    def __str__(self) -> str:
        """Return the times of the pass, without waiting for a pass that is not over."""
        if not self.is_over:
            return "not over"
        try:
            times = self.total_s, self.compute_s, self.communication_s, self.exposed_communication_s
        except RuntimeError:  # a CUDA graph captured the call
            return "not timed"
        total, compute, communication, exposed = (f"{1e3 * seconds:.2f} ms" for seconds in times)
        said = f"{total}: {compute} of compute, {communication} of exchanges, {exposed} of them exposed"
        return said if self.loads is None else f"{said}; {self.loads.words(self.total_s)}"

    @classmethod
    def joined(cls, passes: "Sequence[PassReport]") -> "PassReport":
        """Return one report of passes that ran on one device, the earliest first."""
        report = copy.copy(passes[0])
        report.ran, report._steps, report._end = [marks for of in passes for marks in of.ran], None, passes[-1]._end
        loads = [of.loads for of in passes if of.loads is not None]
        if loads:
            waits_s, spans, read, used = zip(*loads, strict=True)
            report.loads = PassLoads(sum(waits_s), sum(spans, ()), sum(read), max(used))
        return report

    def end(self) -> None:
        """Note that the pass ends now."""
        self._end = self.now()

    def _seconds(self, moment: Mark) -> float:
        """Return the seconds from the start of the pass."""
        if isinstance(moment, float) and isinstance(self._origin, float):
            return moment - self._origin
        if isinstance(moment, torch.cuda.Event) and isinstance(self._origin, torch.cuda.Event):
            return self._origin.elapsed_time(moment) / 1e3
        raise RuntimeError(
            "a CUDA graph captured this call, and its steps are not timed in a replay: time whole replays"
        )

    @property
    def steps(self) -> list[StepTiming]:
        """Every step, by the time at which it started or was posted."""
        if self._steps is None:
            self._wait_until_over()
            self._steps = sorted(map(self._timing, self.ran), key=lambda timing: timing.start_s)
        return self._steps

    def _timing(self, marks: StepMarks) -> StepTiming:
        started_s, ended_s = self._seconds(marks.started), self._seconds(marks.ended)
        if marks.step.lane == "compute":
            load_s = marks.load_s + seconds_of(marks.loads)
            return StepTiming(marks.step, started_s, ended_s, 0.0, load_s=load_s)
        wait_s = ended_s - self._seconds(marks.wait_started)
        return StepTiming(
            marks.step,
            started_s,
            ended_s if marks.finished is None else self._seconds(marks.finished),
            wait_s=wait_s,
            post_s=self._seconds(marks.posted) - started_s,
            arrivals_s=None if marks.arrivals is None else tuple(map(self._seconds_if_known, marks.arrivals)),
            is_end_known=marks.finished is not None or wait_s > SHORTEST_WAIT_S,
        )

    def _seconds_if_known(self, moment: float | None) -> float | None:
        return None if moment is None else self._seconds(moment)

    @property
    def steps_inside(self) -> list[StepTiming]:
        """On two levels: what steps did inside the node, with times from the start of this pass."""
        offsets_s = [self._seconds(report._origin) for _, report in self.inside]
        return [
            timing.shifted(offset_s)
            for (_, report), offset_s in zip(self.inside, offsets_s, strict=True)
            for timing in report.steps
        ]

    @property
    def is_over(self) -> bool:
        """Whether the pass has ended, so that reading it waits for nothing."""
        return not isinstance(self._end, torch.cuda.Event) or self._end.query()

    def seconds_behind(self, other: "PassReport") -> float:
        """Return how long after another pass on this device this one started."""
        other._wait_until_over()
        self._wait_until_over()
        return other._seconds(self._origin)

    def _wait_until_over(self) -> None:
        """Wait for this pass, whose marks stand on one stream, and not for what is enqueued behind it."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()

    @property
    def total_s(self) -> float:
        """Return the time from the start of the pass to its end."""
        self._wait_until_over()
        return self._seconds(self._end)

    @property
    def exposed_communication_s(self) -> float:
        """How long the compute lane stood still for exchanges."""
        return sum(timing.wait_s for timing in self.steps)

    def lane_s(self, *kinds: StepKind | str) -> float:
        """Return the summed duration of the steps of these kinds."""
        return sum(timing.end_s - timing.start_s for timing in self.steps if timing.step.kind in kinds)

    @property
    def compute_s(self) -> float:
        """Return the summed duration of the steps on the compute lane."""
        return sum(t.end_s - t.start_s for t in self.steps if t.step.lane == "compute")

    @property
    def communication_s(self) -> float:
        """Return the time during which at least one exchange was under way."""
        return covered_s(((t.start_s, t.end_s) for t in self.steps if t.step.lane == "comm"), 0.0, math.inf)


@dataclass
class CopiesReport:
    """The copies of experts that a call had, or why it had none."""

    planned: ExpertCopies | None
    """Which experts, and where; None where there are none."""
    reason: str
    """How many there are and what they are expected to gain, or why there are none."""
    expert_bytes: int = 0
    """The bytes of one expert's weights, which travel for each copy."""
    gradient_bytes: tuple[int, int] = (0, 0)
    """The bytes of one copy's gradients that go back to the owner: of gate_up_proj and its bias, then of down_proj."""
    pair_offsets: tuple[int, ...] = ()
    """As LayerReport.pair_offsets, of this rank's copies."""
    are_kept: bool = True
    """Whether these weights are kept until the backward, instead of sent once more."""
    pairs_without: Tensor | None = None
    """(W, W) int64: what traffic_pairs would be without copies; None where nothing was counted without."""


def _imbalance(pairs: Tensor) -> float:
    of_rank = pairs.sum(0)
    return float(of_rank.max() * len(of_rank)) / max(1, int(of_rank.sum()))


@dataclass
class LayerReport:
    """What the last call of a layer did: traffic, and the time of every step."""

    rank: int
    traffic_rows: Tensor
    """(W, W) int64: the size of S_ik, the tokens of rank i (row) that need an expert of rank k (column); with a
    capacity the room for them, which is what travels."""
    traffic_pairs: Tensor
    """(W, W) int64: the pairs of rank i that rank k computes; with a capacity the room for them."""
    row_bytes: int
    """The bytes of one row in the forward's dispatch (D columns of the layer's dtype, or of its wire format)."""
    overlap: OverlapPlan
    """The plan that ran; give it as a layer's `overlap` to run the same again."""
    top_k: int
    send_offsets: tuple[int, ...]
    """Where the rows of each segment (local rows, then chunks) start among those that this rank sends, and the end."""
    return_offsets: tuple[int, ...]
    """Where the rows of each segment start among those that came to this rank, in the order of return, and the end."""
    pair_offsets: tuple[int, ...]
    """Where the pairs of each segment start among those that this rank computes, and the end."""
    forward: PassReport
    backward: PassReport | None = None
    other_row_bytes: int | None = None
    """The bytes of one row in the other exchanges of rows; None stands for row_bytes."""
    gradient_row_bytes: int | None = None
    """The bytes of one row in the adjoint of combine; None stands for other_row_bytes."""
    choice: str = "as given"
    """The reason for this plan, in one sentence."""
    wire_sums: Tensor | None = None
    """What the wire format changed in the dispatched rows: rounding_sums() of transports/wire.py."""
    first_run: "LayerReport | None" = None
    """The report of the first run, where rows didn't fit into the capacity; all else is of the second, without one."""
    rows_to_nodes: tuple[int, ...] | None = None
    """On a TwoLevelTransport: how many tokens of this rank need an expert of each node, its own included."""
    copies: "CopiesReport | None" = None
    """With OverlapConfig.balance: which experts had copies; traffic_rows and traffic_pairs count with them."""
    half: int = 0
    """Which half of a batch in two_batches the call is of, 1 or 2; 0 for a whole batch. The times of a half's pass hold
    what the other half did in between."""
    first_half: "LayerReport | None" = None
    """For a second half: the report of the first half's call of this layer."""
    keeps: Keeps = "hidden"
    """With OverlapConfig.memory_budget_bytes: what stayed from the forward to the backward. "hidden": the received rows
    and h, with save="input" the rows. "rows": the rows, and the backward computes h again. "nothing": the backward also
    sends the rows once more."""
    parts: "tuple[LayerReport, ...]" = ()
    """With a memory budget: the reports of the parts of the tokens that ran one after the other, each by its own plan;
    () where the call ran as a whole. `forward` and `backward` have the steps of all parts."""
    part: int = 0
    """Of the report of a part: which one it is, counted from 1; 0: of a call."""
    memory: str = ""
    """With a memory budget: why the call was cut into so many parts, and kept so much, in one sentence."""

    def __str__(self) -> str:
        """Return the times of both passes, and why the call ran by this plan, in a few lines."""
        plan = str(self.overlap)
        lines = [
            f"rank {self.rank} of {len(self.traffic_rows)}: "
            f"{self.choice if self.choice.startswith(plan) else f'{plan}, {self.choice}'}",
            f"forward: {self.forward}",
            *([] if self.backward is None else [f"backward: {self.backward}"]),
            *filter(None, (self.memory, self.balance)),
        ]
        return "\n".join(lines)

    @property
    def rows_between_nodes(self) -> int | None:
        """How many rows this rank sends to other nodes in the forward's dispatch, on a TwoLevelTransport."""
        if self.rows_to_nodes is None:
            return None
        own_node = self.rank * len(self.rows_to_nodes) // len(self.traffic_rows)
        return sum(self.rows_to_nodes) - self.rows_to_nodes[own_node]

    @property
    def imbalance(self) -> float:
        """The pairs that the busiest rank computes over the mean of all ranks."""
        return _imbalance(self.traffic_pairs)

    @property
    def imbalance_without_copies(self) -> float:
        """What `imbalance` would be without copies."""
        without = None if self.copies is None else self.copies.pairs_without
        return _imbalance(self.traffic_pairs if without is None else without)

    @property
    def balance(self) -> str:
        """How many copies OverlapConfig.balance made and their predicted gain, or why none; "" without balance."""
        return "" if self.copies is None else self.copies.reason

    @property
    def overflowed(self) -> bool:
        """Whether rows of some rank didn't fit into the capacity."""
        return self.first_run is not None

    @property
    def wire_error(self) -> float:
        """Return the relative error (root mean square) that the wire format made in the dispatched rows; 0 without one.

        Reads the device.
        """
        if self.wire_sums is None:
            return 0.0
        changed, total, *_ = self.wire_sums.tolist()
        return (changed / total) ** 0.5 if total else 0.0

    @property
    def wire_zeroed(self) -> float:
        """Return the share of the dispatched rows' numbers that the wire format made zeros. Reads the device."""
        return self._wire_share(2)

    @property
    def wire_overflowed(self) -> float:
        """Return the share that was finite and became infinite or NaN, being too large. Reads the device."""
        return self._wire_share(3)

    def _wire_share(self, index: int) -> float:
        if self.wire_sums is None:
            return 0.0
        *sums, count = self.wire_sums.tolist()
        return sums[index] / count if count else 0.0

    @property
    def num_chunks(self) -> int:
        return self.overlap.num_chunks

    @property
    def traffic_bytes(self) -> Tensor:
        """(W, W) int64: bytes that rank i sends to rank k in the forward's dispatch; own rows: 0."""
        off_diagonal = 1 - torch.eye(self.traffic_rows.shape[0], dtype=torch.int64, device="cpu")
        return self.traffic_rows * off_diagonal * self.row_bytes
