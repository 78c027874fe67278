"""num_chunks="auto": measure a few calls, search in the simulator, try the best plans, keep the fastest.

The calls of one kind go through three stages, the same on every rank at every call:
1. Calls with one and two chunks, twice, nothing computed before the first rows arrive, give the costs of every step and
   of the link: four with chunks of tokens, and four with chunks of experts where both may be chosen. Each rank searches
   the simulator for its best plans, one of them in chunks of tokens, and votes for them.
2. The votes of the rank that predicts the longest time are tried in turn, one chunk among them, three rounds of real
   calls. What counts is the slowest rank, per row of the busiest one, the median of the rounds.
3. The fastest plan stays, or one chunk unless that plan is at least 3 % faster. Where calls of the same size later take
   10 % longer or shorter, all starts again.

Everything that ranks must agree on is an integer in the count header that every rank has seen (`Message`).
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.steps import StepKind
from tritonmoe.simulation.cost_model import LayerWork
from tritonmoe.simulation.memory import ALL_AT_ONCE, BufferWidths, WorkingSet
from tritonmoe.tuning.measured import layer_costs, layer_work, link_costs, most_work
from tritonmoe.tuning.search import budgeted_plan, fixed_plan, plan_of, preferred, search, takes_chunks_of_experts

__all__ = ["SETTLING_CALLS", "Message", "PlanChooser"]

MEASURED_NUM_CHUNKS = (1, 2, 1, 2)
"""Chunks of the measured calls: two sizes to tell apart what a chunk and what a pair costs, twice, since the shorter of
two times is the one that nothing disturbed."""
NUM_VOTES = 2
TRIAL_ROUNDS = 3
SETTLING_CALLS = 2 * len(MEASURED_NUM_CHUNKS) + 1 + (1 + NUM_VOTES) * TRIAL_ROUNDS + 1
"""Calls of one kind until the plan is chosen, where each call's backward comes before the next call; without chunks of
experts to choose from four fewer."""
MAX_TRIAL_CALLS = 64
"""After so many calls without enough measured ones (no backward ever comes, say), the first vote is taken."""
SMALLEST_GAIN = 0.03
TRIED_EXCESS = 0.10
"""A plan is tried unless it is predicted to be slower than one chunk by more than this: predictions are no better."""
DRIFT = 0.10
DRIFT_CALLS = 16
SAME_SIZE = 0.10
"""Calls are compared with the tried ones where their busiest rank has as many rows, within this share."""
DETERMINISTIC_NUM_CHUNKS = 4


class Message(NamedTuple):
    """What a rank's count header says to the other ranks' choosers: integers, the same meaning on every rank."""

    vote: int = 0
    """The plan that this rank would try first, of those that it predicts to be fastest, packed; 0 for no wish."""
    second_vote: int = 0
    predicted_ns: int = 0
    """The shortest time that it predicts for any plan."""
    measured_call: int = -1
    """Which of the tried calls `measured_ns` is of; -1 for none."""
    measured_ns: int = 0
    working_set: int = 0
    """With a memory budget: how much this rank's experts work on at a time, packed (memory.WorkingSet)."""

    @classmethod
    def of(cls, header: CallHeader) -> "Message":
        return cls(*(getattr(header, name) for name in cls._fields))

    @property
    def votes(self) -> list[int]:
        return [vote for vote in (self.vote, self.second_vote) if vote]


def pack(plan: OverlapPlan) -> int:
    """Give a searched plan as one positive integer; unpack() reads it."""
    growth = plan.chunk_sizes[1] if plan.num_chunks > 2 else 1
    value = plan.num_chunks
    for part in (growth, int(plan.chunk_by == "experts"), plan.local_start, plan.window, plan.backward_window):
        value = value * 64 + part
    return value


def unpack(value: int, config: OverlapConfig) -> OverlapPlan:
    parts = []
    for _ in range(5):
        value, part = divmod(value, 64)
        parts.append(part)
    backward_window, window, local_start, is_of_experts, growth = parts
    config = replace(config, chunk_by="experts" if is_of_experts else "tokens")
    return plan_of(
        config, ramp_sizes(value, growth), local_start=local_start, window=window, backward_window=backward_window
    )


def other_chunks_first(plans: Sequence[OverlapPlan]) -> list[OverlapPlan]:
    """Give the first plan of each way to cut, then the others: two windows of the same chunks take about as long."""
    firsts = {(plan.chunk_by, plan.chunk_sizes): plan for plan in reversed(plans)}
    return sorted(plans, key=lambda plan: firsts[plan.chunk_by, plan.chunk_sizes] != plan)  # which keeps their order


@dataclass
class _TriedCall:
    number: int
    rows: int
    """Received by the busiest rank."""
    report: LayerReport
    has_backward: bool

    def nanoseconds(self) -> int | None:
        """Give the time of the whole call on this rank, None as long as it isn't over."""
        passes = [self.report.forward]
        if self.report.first_run is not None:
            passes.append(self.report.first_run.forward)
        if self.has_backward:
            if self.report.backward is None:
                return None
            passes.append(self.report.backward)
        if not all(layer_pass.is_over for layer_pass in passes):
            return None
        return max(1, int(sum(layer_pass.total_s for layer_pass in passes) * 1e9))


@dataclass
class PlanChooser:
    """The state of "auto" for one transport and one kind of call; the same on every rank at every call."""

    config: OverlapConfig
    size: int
    is_shared: bool = False
    """Whether the transport's exchanges share the link."""
    widths: BufferWidths | None = None
    """Of the calls, whatever a rank's working set; a memory budget needs them."""
    working_set: WorkingSet = ALL_AT_ONCE
    """This rank's in the next call; the other ranks hear of it."""
    can_cut_experts: bool = False
    """Whether the transport takes chunks of experts."""
    choice: str = "nothing is measured yet"
    """Why the present plan was chosen, in one sentence."""
    measured: list[LayerReport] = field(default_factory=list)
    candidates: list[OverlapPlan] = field(default_factory=list)
    """What is tried, one chunk first; empty before the votes."""
    chosen: OverlapPlan | None = None
    num_tried: int = 0
    """Calls since the candidates were known."""
    tried: deque[_TriedCall] = field(default_factory=deque)
    """Calls whose times have not been told to the other ranks yet."""
    times: dict[int, list[float]] = field(default_factory=dict)
    """By candidate: nanoseconds per row of the busiest rank."""
    usual: tuple[float, float] | None = None
    """Nanoseconds per row, and rows, of the chosen plan when it was tried."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=DRIFT_CALLS))
    num_searches: int = 0
    last_work: LayerWork | None = None
    """Of the call before, where a memory budget asks for it; with a capacity, its room."""
    last_working_sets: set[WorkingSet] = field(default_factory=set)
    """Every rank's in that call."""
    sides: str = ""
    """The predicted experts' and exchanges' times, for `choice`."""

    @property
    def is_tuned(self) -> bool:
        """Whether there is anything to choose."""
        config = self.config
        return (
            config.is_auto
            and config.memory_budget_bytes is None
            and not config.serial
            and self.size > 1
            and not torch.are_deterministic_algorithms_enabled()
        )

    @property
    def kinds(self) -> tuple[Literal["tokens", "experts"], ...]:
        """What the chunks that are measured and searched are of."""
        if self.config.chunk_by != "auto":
            return (self.config.chunk_by,)
        has_several = self.widths is not None and self.widths.num_local_experts > 1
        if self.can_cut_experts and has_several and takes_chunks_of_experts(self.config):
            return "tokens", "experts"
        return ("tokens",)

    @property
    def _measured_plans(self) -> list[OverlapPlan]:
        both = [
            plan_of(replace(self.config, chunk_by=kind), equal_sizes(num_chunks), local_start=0)
            for kind in self.kinds
            for num_chunks in MEASURED_NUM_CHUNKS[:2]
        ]
        return both + both

    def plan(self) -> OverlapPlan:
        """Give the plan of the next call."""
        config = self.config
        if not self.is_tuned:
            return self._untuned_plan()
        if self.chosen is not None:
            return self.chosen
        if self.candidates:
            return self.candidates[self._candidate_of(self.num_tried)]
        number, plans = len(self.measured), self._measured_plans
        if number == len(plans):
            self.choice = "the ranks vote in this call for the plans to try"
            return fixed_plan(config, MEASURED_NUM_CHUNKS[-1], self.size)
        self.choice = f"measuring: call {number + 1} of {len(plans)} before the search"
        return plans[number]

    def _untuned_plan(self) -> OverlapPlan:
        config = self.config
        if not config.is_auto:
            num_chunks, self.choice = config.num_chunks, "as configured"
        elif self.size == 1:
            num_chunks, self.choice = 1, "one rank has no exchange to hide"
        elif config.memory_budget_bytes is not None:
            assert self.widths is not None
            plan, self.choice = budgeted_plan(config, self.last_work, self.widths, self.last_working_sets)
            return plan
        elif config.serial:
            num_chunks, self.choice = 1, "without overlap, chunks only cost time"
        else:
            num_chunks = DETERMINISTIC_NUM_CHUNKS
            self.choice = "torch.use_deterministic_algorithms: a choice that depends on no time"
        return fixed_plan(config, 0 if num_chunks == "auto" else num_chunks, self.size)

    def _candidate_of(self, number: int) -> int:
        """Give which candidate a tried call runs: each once a round, in an order that shifts from round to round."""
        count = len(self.candidates)
        return (number + number // count) % count

    def message(self) -> Message:
        """Give what this rank tells the others in the next call's header."""
        if not self.is_tuned:
            return Message(working_set=0 if self.config.memory_budget_bytes is None else self.working_set.pack())
        if not self.candidates:
            return Message() if len(self.measured) < len(self._measured_plans) else self._vote()
        if not self.tried:
            return Message()
        oldest = self.tried[0]
        nanoseconds = oldest.nanoseconds()
        if nanoseconds is None:
            return Message()
        return Message(measured_call=oldest.number, measured_ns=nanoseconds)

    def _vote(self) -> Message:
        """Search in the simulator for the plans that this rank wishes to try."""
        by_kind = {kind: [r for r in self.measured if r.overlap.chunk_by == kind] for kind in self.kinds}
        link = link_costs(by_kind[self.kinds[0]], self.is_shared)
        one = by_kind[self.kinds[0]][2]
        found: list[tuple[float, OverlapPlan]] = []
        for kind, reports in by_kind.items():
            found += search(
                replace(self.config, chunk_by=kind),
                layer_work(one),
                layer_costs(reports),
                link,
                backward=one.backward is not None,
                fits=self._has_no_empty_chunk,
            )
        one_chunk_s = next(seconds for seconds, plan in found if plan.num_chunks == 1)
        found = preferred(found)
        limit_s = (1 + TRIED_EXCESS) * one_chunk_s
        best = [plan for seconds, plan in found if plan.num_chunks > 1 and seconds < limit_s]
        best = other_chunks_first(best)
        tried, others = best[:NUM_VOTES], best[NUM_VOTES:]
        # The costs of chunks of experts depend on where the routing goes: they never keep the best of tokens out.
        by_tokens = [plan for plan in others if plan.chunk_by == "tokens"]
        if by_tokens and all(plan.chunk_by == "experts" for plan in tried):
            tried[-1] = by_tokens[0]
        votes = [pack(plan) for plan in tried]
        steps = one.forward
        self.sides = (
            f"experts {steps.lane_s(StepKind.EXPERTS) * 1e3:.2f} ms, "
            f"exchanges {steps.lane_s(StepKind.DISPATCH, StepKind.COMBINE) * 1e3:.2f} ms in one chunk"
        )
        votes += [0] * (NUM_VOTES - len(votes))
        fastest_s = min(seconds for seconds, _ in found)
        return Message(votes[0], votes[1], predicted_ns=max(1, int(fastest_s * 1e9)))

    def _has_no_empty_chunk(self, plan: OverlapPlan) -> bool:
        if plan.chunk_by == "tokens" or self.widths is None:
            return True
        return all(first < last for first, last in pairwise(plan.bounds(self.widths.num_local_experts)))

    def observe(self, messages: Sequence[Message], report: LayerReport, has_backward: bool) -> None:
        """Take in one call: what every rank's header said, and this rank's report."""
        report.choice = self.choice
        if not self.is_tuned:
            if self.config.memory_budget_bytes is not None:
                self.last_work = most_work(report)
                self.last_working_sets = {WorkingSet.unpack(message.working_set) for message in messages}
            return
        if not self.candidates:
            if len(self.measured) < len(self._measured_plans):
                self.measured.append(report)
            else:
                self._count_votes(messages)
            return
        self._hear_times(messages)
        if self.chosen is None or len(self.tried) < DRIFT_CALLS:
            rows = int(report.traffic_rows.sum(0).max())
            self.tried.append(_TriedCall(self.num_tried, rows, report, has_backward))
        self.num_tried += 1
        if self.chosen is None:
            self._choose_if_tried()
        else:
            self._search_again_if_drifted()

    def _count_votes(self, messages: Sequence[Message]) -> None:
        if not all(message.predicted_ns for message in messages):
            return
        # The slowest rank sets the pace of all; among equals the first one.
        votes = max(messages, key=lambda message: message.predicted_ns).votes
        one = fixed_plan(replace(self.config, num_chunks=1, shape="equal"), 1, self.size)
        self.candidates = [one, *(unpack(vote, self.config) for vote in votes)]
        self.num_tried, self.times = 0, {n: [] for n in range(len(self.candidates))}
        self.measured.clear()
        self.tried.clear()
        self.choice = f"trying {len(self.candidates)} plans in turn"
        if len(self.candidates) == 1:
            self.chosen = one
            self.choice = (
                f"{one}: every other plan was predicted to be slower by over {TRIED_EXCESS:.0%} ({self.sides})"
            )

    def _hear_times(self, messages: Sequence[Message]) -> None:
        """Take in the time of one call, where all ranks tell that of the same one."""
        numbers = {message.measured_call for message in messages}
        if len(numbers) > 1 or not self.tried or numbers != {self.tried[0].number}:
            return
        call = self.tried.popleft()
        per_row = max(message.measured_ns for message in messages) / max(1, call.rows)
        if self.chosen is None:
            self.times[self._candidate_of(call.number)].append(per_row)
            self.usual = (per_row, call.rows) if self.usual is None else self.usual
        elif self.usual is not None and abs(call.rows - self.usual[1]) <= SAME_SIZE * self.usual[1]:
            self.recent.append(per_row)

    def _choose_if_tried(self) -> None:
        is_enough = all(len(times) >= TRIAL_ROUNDS for times in self.times.values())
        if not is_enough and self.num_tried < MAX_TRIAL_CALLS:
            return
        rows = self.usual[1] if self.usual else 0
        self.tried.clear()
        self.num_searches += 1
        if not is_enough:
            self.chosen, self.usual = self.candidates[1], None
            self.choice = (
                f"{self.chosen}: predicted to be among the fastest; too few whole calls to try it ({self.sides})"
            )
            return
        medians = {n: statistics.median(times) for n, times in self.times.items()}
        best = min(medians, key=lambda n: medians[n])
        gain = 1 - medians[best] / medians[0]
        fastest = self.candidates[best]
        if gain < SMALLEST_GAIN:
            best = 0
            words = f"{self.candidates[0]}: the fastest other plan gained less than {SMALLEST_GAIN:.0%}"
        else:
            words = f"{fastest}: {gain:.0%} faster than one chunk"
        self.chosen, self.usual = self.candidates[best], (medians[best], rows)
        self.choice = f"{words}, median of {TRIAL_ROUNDS} rounds ({self.sides})"

    def _search_again_if_drifted(self) -> None:
        if self.usual is None or len(self.recent) < DRIFT_CALLS:
            return
        recent = statistics.median(self.recent)
        self.recent.clear()
        if abs(recent / self.usual[0] - 1) > DRIFT * self.num_searches:
            self.chosen, self.candidates, self.usual = None, [], None
            self.tried.clear()
