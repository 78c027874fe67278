"""What a layer call did: the time of every step of a pass, what travelled, and the plan that ran."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Step
from tritonmoe.runtime.host_device import is_captured

__all__ = ["LayerReport", "PassReport", "StepTiming", "mark"]


def mark(device: torch.device) -> "float | torch.cuda.Event | None":
    """A moment on the lane that computes: the host's clock, or an event of its stream; None in a CUDA graph."""
    if is_captured(device):
        return None
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))  # which need not be the current device
        return event
    return time.perf_counter()


@dataclass(frozen=True)
class StepTiming:
    """When one step ran, in seconds from the start of its pass."""

    step: Step
    start_s: float
    end_s: float
    """For an exchange: when its rows had arrived, as far as known (else when it was waited for)."""
    wait_s: float
    """For an exchange: how long the compute lane stood still for it."""
    post_s: float = 0.0
    """For an exchange: how long packing and posting it took, on the compute lane."""


class PassReport:
    """The timings of one pass over a layer; read lazily, since on CUDA that waits until the device has ended it."""

    def __init__(self, device: torch.device) -> None:
        self._origin = mark(device)
        self._end = self._origin
        self._compute: list[tuple[Step, object, object]] = []
        self._exchanges: list[tuple[Step, object, object, object, object, float | None]] = []
        self._steps: list[StepTiming] | None = None
        self.inside: list[tuple[Step, PassReport]] = []
        """On two levels: what steps did inside the node, with times from the start of each."""

    def _seconds(self, mark: object) -> float:
        if self._origin is None:
            raise RuntimeError("a CUDA graph captured this call, and replays are not timed: time them as a whole")
        if isinstance(mark, float):
            assert isinstance(self._origin, float)
            return mark - self._origin
        return self._origin.elapsed_time(mark) / 1e3  # type: ignore[union-attr, arg-type]

    @property
    def steps(self) -> list[StepTiming]:
        """Every step, by the time at which it started or was posted."""
        if self._steps is None:
            self._wait_until_over()
            steps = [
                StepTiming(step, self._seconds(first), self._seconds(last), 0.0) for step, first, last in self._compute
            ]
            for step, started, posted, before, after, finished in self._exchanges:
                waited = self._seconds(after) - self._seconds(before)
                posting = self._seconds(posted) - self._seconds(started)
                end = self._seconds(after if finished is None else finished)
                steps.append(StepTiming(step, self._seconds(started), end, waited, posting))
            self._steps = sorted(steps, key=lambda timing: timing.start_s)
        return self._steps

    @property
    def steps_inside(self) -> list[StepTiming]:
        """On two levels: what steps did inside the node, with times from the start of this pass."""
        offsets_s = [self._seconds(report._origin) for _, report in self.inside]
        return [
            replace(timing, start_s=timing.start_s + offset_s, end_s=timing.end_s + offset_s)
            for (_, report), offset_s in zip(self.inside, offsets_s, strict=True)
            for timing in report.steps
        ]

    @property
    def is_over(self) -> bool:
        """Whether the pass has ended, so that reading it waits for nothing."""
        return not isinstance(self._end, torch.cuda.Event) or self._end.query()

    def _wait_until_over(self) -> None:
        """Wait for this pass, whose marks stand on one stream, and not for what is enqueued behind it."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()

    @property
    def total_s(self) -> float:
        self._wait_until_over()
        return self._seconds(self._end)

    @property
    def exposed_communication_s(self) -> float:
        """How long the compute lane stood still for exchanges."""
        return sum(timing.wait_s for timing in self.steps)

    def lane_s(self, *kinds: str) -> float:
        """Give the summed duration of the steps of these kinds."""
        return sum(timing.end_s - timing.start_s for timing in self.steps if timing.step.kind in kinds)

    @property
    def compute_s(self) -> float:
        return sum(t.end_s - t.start_s for t in self.steps if t.step.lane == "compute")

    @property
    def communication_s(self) -> float:
        """Give the time during which at least one exchange was under way."""
        spans = sorted((t.start_s, t.end_s) for t in self.steps if t.step.lane == "comm")
        busy, reached = 0.0, 0.0
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return busy


@dataclass
class LayerReport:
    """What the last call of a layer did: traffic, and the time of every step."""

    rank: int
    traffic_rows: Tensor
    """(W, W) int64: the size of S_ik, the tokens of rank i (row) that need an expert of rank k (column); with a
    capacity the room for them, which is what travels."""
    traffic_pairs: Tensor
    """The same for the pairs of rank i that rank k computes."""
    row_bytes: int
    """Bytes of one row of the forward's dispatch (D columns of the layer's dtype, or of its wire format)."""
    overlap: OverlapPlan
    """What ran; give it as a layer's `overlap` to run the same again."""
    top_k: int
    home_offsets: tuple[int, ...]
    """Where this rank's rows for each segment (local rows, then chunks) start when sent, and the end."""
    receive_offsets: tuple[int, ...]
    """The same for the rows that came here, when they return."""
    pair_offsets: tuple[int, ...]
    """The same for their routed pairs."""
    forward: PassReport
    backward: PassReport | None = None
    other_row_bytes: int | None = None
    """Bytes of one row of the other exchanges of rows; None where it is row_bytes."""
    choice: str = "as given"
    """Why this plan was chosen, in one sentence."""
    wire_squares: Tensor | None = None
    """(2,) fp32: summed squares of what the wire format changed in the dispatched rows, and of the rows."""
    first_run: "LayerReport | None" = None
    """Where rows of some rank didn't fit into the capacity, so that the call ran again without one: the report of the
    run before. All else here is of the second run, whose results are the call's."""
    rows_between_nodes: int | None = None
    """On a TwoLevelTransport: the rows that this rank sends to other nodes in the forward's dispatch."""

    @property
    def overflowed(self) -> bool:
        """Whether rows of some rank didn't fit into the capacity."""
        return self.first_run is not None

    @property
    def wire_error(self) -> float:
        """Give the relative error (root mean square) that the wire format made in the dispatched rows; 0 without one.

        Reads the device.
        """
        if self.wire_squares is None:
            return 0.0
        changed, total = self.wire_squares.tolist()
        return (changed / total) ** 0.5 if total else 0.0

    @property
    def num_chunks(self) -> int:
        return self.overlap.num_chunks

    @property
    def traffic_bytes(self) -> Tensor:
        """(W, W) int64: bytes that rank i sends to rank k in the forward's dispatch; own rows: 0."""
        off_diagonal = 1 - torch.eye(self.traffic_rows.shape[0], dtype=torch.int64, device="cpu")
        return self.traffic_rows * off_diagonal * self.row_bytes
