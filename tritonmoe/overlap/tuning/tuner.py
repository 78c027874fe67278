"""num_chunks="auto": measure a few calls, search in the simulator, try the best plans, keep the fastest.

Calls that are alike (of one transport, with the same E, D, F, K, dtypes, gradient mode and OverlapConfig, whatever T)
share a chooser, which goes through three stages. At every call it is in the same stage on every rank.

1. It measures calls with one chunk and with four, each twice, with no local rows first, so that experts and exchanges
   are timed apart. They give the costs of every step and of the link. These are four calls with chunks of tokens, and
   where chunks of experts may be chosen too, four more with those. Then each rank searches the simulator for the plans
   that are best for itself, and votes for two of them; one of the two has chunks of tokens.
2. It tries the votes of the rank that predicts the longest time, and one chunk beside them, in turn: three rounds of
   real calls. A call's time is that of its slowest rank divided by the rows of its busiest rank; of a plan the median
   of the three rounds counts. Calls with over twice or under half the rows of the first one, as decoding has behind a
   prefill, take part without being compared.
3. It keeps the fastest plan if that is at least 3 % faster than one chunk, and one chunk otherwise, also where too few
   whole calls came to compare. Where no backward came at all, though the calls could run one (an evaluation that leaves
   gradients on, say), forwards are compared alone, until one comes. Where calls of the same size later take 10 % longer
   or shorter, it starts again.

Many layers run forward before the first one runs backward, and a forward may get no backward at all: the vote waits
for the measured calls' backwards, and times are told of whichever of the last calls are over.

Everything that ranks must agree on is an integer in the count header, which every rank sees (dispatch/header.py).
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch

from tritonmoe.config.overlap import MAX_CHUNKS, OverlapConfig, OverlapPlan, equal_sizes
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.memory import ALL_AT_ONCE, BufferWidths, WorkingSet
from tritonmoe.overlap.steps import StepKind
from tritonmoe.overlap.tuning.measured_calls import layer_costs, layer_work, link_costs, most_work
from tritonmoe.overlap.tuning.search import (
    budgeted_plan,
    fixed_plan,
    other_chunks_first,
    pack_plan,
    plan_of,
    preferred,
    search,
    takes_chunks_of_experts,
    unpack_plan,
    with_chunk_costs,
)

__all__ = ["SETTLING_CALLS", "PlanChooser"]

TRIAL_ROUNDS = 3
"""How often each plan is tried."""
DRIFT_CALLS = 16
"""Of how many calls the median is compared with that of the trials."""
SIMILAR_SIZE = 2
"""Calls that are tried are compared if the rows of their busiest ranks are within this factor."""
SAME_SIZE = 0.10
"""A call is compared with the tried ones if its busiest rank has as many rows, within this share."""


@dataclass
class TriedCall:
    """A call whose time the other ranks have not heard yet."""

    number: int
    """It counts from when the candidates were known."""
    rows: int
    """How many rows the busiest rank received."""
    report: LayerReport
    has_backward: bool
    """Whether the time of its backward counts too."""

    def nanoseconds(self) -> int | None:
        """Return the time of the whole call on this rank, None as long as the call isn't over."""
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
class Trials:
    """The times of calls since the candidates were known, all ranks' alike but for what `tried` holds."""

    num_candidates: int
    num_calls: int = 0
    """How many calls there were since."""
    num_heard: int = 0
    """Of how many of them all ranks have heard the time."""
    tried: deque[TriedCall] = field(default_factory=lambda: deque(maxlen=DRIFT_CALLS))
    """The last of them whose times the other ranks have not heard yet, the oldest first."""
    times: dict[int, list[float]] = field(default_factory=dict)
    """How long each candidate took: nanoseconds per row of the busiest rank, by the candidate's number."""
    usual: tuple[float, float] | None = None
    """Nanoseconds per row, and rows, of the chosen plan when it was tried, or of its first calls where it was not."""
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=DRIFT_CALLS))
    """Nanoseconds per row, and rows, of the last calls of the chosen plan."""

    def __post_init__(self) -> None:
        self.times = {number: [] for number in range(self.num_candidates)}

    @property
    def candidate(self) -> int:
        """The number of the candidate that the next call runs."""
        return self._candidate_of(self.num_calls)

    def _candidate_of(self, call: int) -> int:
        """Return the number of the candidate that a call runs.

        In each round every candidate runs once, in an order that shifts from round to round.
        """
        return (call + call // self.num_candidates) % self.num_candidates

    def message(self) -> CallHeader:
        """Return the time of the oldest call that is over here and that the other ranks have not heard."""
        for call in self.tried:
            nanoseconds = call.nanoseconds()
            if nanoseconds is not None:
                return CallHeader(measured_call=call.number, measured_ns=nanoseconds)
        return CallHeader()

    def add(self, report: LayerReport, has_backward: bool) -> None:
        """Take in a call that has begun."""
        rows = int(report.traffic_rows.sum(0).max())
        self.tried.append(TriedCall(self.num_calls, rows, report, has_backward))
        self.num_calls += 1

    def record(self, headers: Sequence[CallHeader], *, is_chosen: bool) -> bool:
        """Record the time of one call, if all ranks tell their time of the same one; return whether a trial counted.

        Args:
            is_chosen: all calls run the chosen plan now.
        """
        numbers = {header.measured_call for header in headers}
        place = next((place for place, call in enumerate(self.tried) if numbers == {call.number}), None)
        if place is None:
            return False
        call = self.tried[place]
        del self.tried[place]
        self.num_heard += 1
        rows = max(1, call.rows)
        per_row = max(header.measured_ns for header in headers) / rows
        if is_chosen:
            if self.usual is None or abs(rows - self.usual[1]) <= SAME_SIZE * self.usual[1]:
                self.recent.append((per_row, rows))
            return False
        self.usual = (per_row, rows) if self.usual is None else self.usual
        is_similar = self.usual[1] / SIMILAR_SIZE <= rows <= self.usual[1] * SIMILAR_SIZE
        if is_similar:
            self.times[self._candidate_of(call.number)].append(per_row)
        return is_similar

    @property
    def is_enough(self) -> bool:
        """Whether every candidate was measured in every round."""
        return all(len(times) >= TRIAL_ROUNDS for times in self.times.values())

    def medians(self) -> dict[int, float]:
        """Return the median time of each candidate."""
        return {number: statistics.median(times) for number, times in self.times.items()}

    def keep(self, per_row: float | None) -> None:
        """Begin to watch the chosen plan, whose trials took so long for a row; None: its first calls will say."""
        self.usual = None if per_row is None or self.usual is None else (per_row, self.usual[1])
        self.tried.clear()

    def drift(self) -> float:
        """Return by which share DRIFT_CALLS calls of the chosen plan took longer or shorter; 0 before so many."""
        if len(self.recent) < DRIFT_CALLS:
            return 0.0
        recent, rows = (statistics.median(values) for values in zip(*self.recent, strict=True))
        self.recent.clear()
        if self.usual is None:
            self.usual = recent, rows
        return abs(recent / self.usual[0] - 1)


MEASURED_NUM_CHUNKS = (1, 4, 1, 4)
"""How many chunks the measured calls have. Two numbers tell apart what a chunk costs and what a pair costs, the better
the further they are from each other; each is measured twice, since the shorter of two times is the less disturbed one.
"""
NUM_VOTES = 2
"""For how many plans a rank votes."""
SETTLING_CALLS = 2 * len(MEASURED_NUM_CHUNKS) + 1 + (1 + NUM_VOTES) * TRIAL_ROUNDS + 1
"""How many calls it takes until the plan is chosen, if the backward of each call comes before the next call. Where
chunks of experts are no choice, it takes four fewer."""
MAX_UNHEARD_CALLS = 128
"""After so many calls in a row whose times were not heard, the choice waits no longer: no backward may ever come, say.
Models have fewer layers with experts than that."""
SMALLEST_GAIN = 0.03
"""A plan is kept if it is faster than one chunk by at least this share."""
TRIED_EXCESS = 0.10
"""A plan is tried if it is predicted to be slower than one chunk by less than this share: predictions are as wrong as
that."""
DRIFT = 0.10
"""The search starts again if calls take longer or shorter by this share than when the plan was tried."""
DETERMINISTIC_NUM_CHUNKS = 4
"""How many chunks there are under torch.use_deterministic_algorithms, where no time may decide."""


@dataclass
class PlanChooser:
    """The state of "auto" for calls of one transport that are alike; it is in the same stage on every rank."""

    config: OverlapConfig
    size: int
    """W."""
    is_shared: bool = False
    """Whether exchanges that are under way together share the transport's link."""
    widths: BufferWidths | None = None
    """The widths of the calls' buffers, whatever a rank's working set; a memory budget needs them."""
    working_set: WorkingSet = ALL_AT_ONCE
    """How much this rank's experts work on at a time in the next call, which the other ranks will hear."""
    can_cut_experts: bool = False
    """Whether the transport takes chunks of experts."""
    choice: str = "nothing is measured yet"
    """Why the present plan was chosen, in one sentence."""
    measured: list[LayerReport] = field(default_factory=list)
    """The reports of the calls that were measured before the search."""
    candidates: list[OverlapPlan] = field(default_factory=list)
    """The plans that are tried, one chunk first; empty before the votes."""
    chosen: OverlapPlan | None = None
    """The plan that is kept, once all candidates are tried."""
    trials: Trials = field(default_factory=lambda: Trials(0))
    """The times of calls since the candidates were known."""
    num_unheard: int = 0
    """How many calls there were since a time was heard that counts, or since all measured calls were made."""
    has_backward: bool = False
    """Whether the calls run backward."""
    are_forwards_alone: bool = False
    """Whether forwards are compared alone, though the calls could run backward: none has for long. All ranks see it
    alike, since headers say which backwards have run."""
    last_report: LayerReport | None = None
    """Of the call before."""
    num_searches: int = 0
    """How often a plan was chosen: the more often, the larger a drift must be to start again."""
    last_work: LayerWork | None = None
    """What the call before sent and computed, where a memory budget asks for it; with a capacity, its room."""
    last_working_sets: set[WorkingSet] = field(default_factory=set)
    """The working sets of all ranks in that call."""
    sides: str = ""
    """How long experts and exchanges take in one chunk, in words for `choice`."""

    @property
    def is_tuned(self) -> bool:
        """Whether there is anything to choose."""
        config = self.config
        return (
            config.memory_budget_bytes is None
            and not config.serial
            and self.size > 1
            and not torch.are_deterministic_algorithms_enabled()
        )

    @property
    def ways_to_cut(self) -> tuple[Literal["tokens", "experts"], ...]:
        """The values of chunk_by that are measured and searched."""
        if self.config.chunk_by != "auto":
            return (self.config.chunk_by,)
        has_several = self.widths is not None and self.widths.num_local_experts > 1
        if self.can_cut_experts and has_several and takes_chunks_of_experts(self.config):
            return "tokens", "experts"
        return ("tokens",)

    @property
    def _measured_plans(self) -> list[OverlapPlan]:
        """The plans of the calls that are measured before the search, in turn."""
        both = []
        for chunk_by in self.ways_to_cut:
            most = MAX_CHUNKS if chunk_by == "tokens" or self.widths is None else self.widths.num_local_experts
            for num_chunks in MEASURED_NUM_CHUNKS[:2]:
                sizes = equal_sizes(min(num_chunks, most))
                both.append(plan_of(replace(self.config, chunk_by=chunk_by), sizes, local_start=0))
        return both + both

    def plan(self) -> OverlapPlan:
        """Return the plan of the next call."""
        config = self.config
        if not self.is_tuned:
            return self._untuned_plan()
        if self.chosen is not None:
            return self.chosen
        if self.candidates:
            return self.candidates[self.trials.candidate]
        number, plans = len(self.measured), self._measured_plans
        if number == len(plans):
            self.choice = "the ranks vote in this call for the plans to try"
            return fixed_plan(config, MEASURED_NUM_CHUNKS[-1], self.size)
        self.choice = f"measuring: call {number + 1} of {len(plans)} before the search"
        return plans[number]

    def _untuned_plan(self) -> OverlapPlan:
        """Return the plan of the next call where no time decides, and note why."""
        config = self.config
        if self.size == 1:
            num_chunks, self.choice = 1, "one rank has no exchange to hide"
        elif config.memory_budget_bytes is not None:
            if self.widths is None:
                raise ValueError("memory_budget_bytes needs the widths of the calls' buffers")
            plan, self.choice = budgeted_plan(config, self.last_work, self.widths, self.last_working_sets)
            return plan
        elif config.serial:
            num_chunks, self.choice = 1, "without overlap, chunks only cost time"
        else:
            num_chunks = DETERMINISTIC_NUM_CHUNKS
            self.choice = "torch.use_deterministic_algorithms: a choice that depends on no time"
        return fixed_plan(config, num_chunks, self.size)

    def message(self) -> CallHeader:
        """Return a header of the next call with what this rank tells the other ranks' choosers, and no more."""
        if not self.is_tuned:
            return CallHeader(working_set=0 if self.config.memory_budget_bytes is None else self.working_set.pack())
        if not self.candidates:
            return self._vote() if self._can_vote() else CallHeader()
        return self.trials.message()

    def _can_vote(self) -> bool:
        """Return whether the measured calls are over, or have been waited for long enough."""
        if len(self.measured) < len(self._measured_plans):
            return False
        are_whole = not self.has_backward or all(report.backward is not None for report in self.measured)
        return are_whole or self.num_unheard >= MAX_UNHEARD_CALLS

    def _vote(self) -> CallHeader:
        """Search in the simulator for the plans that this rank wishes to try."""
        measured = {way: [r for r in self.measured if r.overlap.chunk_by == way] for way in self.ways_to_cut}
        first_way = measured[self.ways_to_cut[0]]
        link = link_costs(first_way, self.is_shared)
        one = first_way[2]  # the second call with one chunk
        work = layer_work(one)
        num_pairs = float(work.pairs.sum(0).max())
        found: list[tuple[float, OverlapPlan]] = []
        for way, reports in measured.items():
            found += search(
                replace(self.config, chunk_by=way),
                work,
                with_chunk_costs(layer_costs(reports), num_pairs),
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
        # How fast chunks of experts are depends on where the routing goes, so the best chunks of tokens are tried too.
        by_tokens = [plan for plan in others if plan.chunk_by == "tokens"]
        if by_tokens and all(plan.chunk_by == "experts" for plan in tried):
            tried[-1] = by_tokens[0]
        votes = [pack_plan(plan) for plan in tried]
        steps = one.forward
        self.sides = (
            f"experts {steps.lane_s(StepKind.EXPERTS) * 1e3:.2f} ms, "
            f"exchanges {steps.lane_s(StepKind.DISPATCH, StepKind.COMBINE) * 1e3:.2f} ms in one chunk"
        )
        votes += [0] * (NUM_VOTES - len(votes))
        fastest_s = min(seconds for seconds, _ in found)
        return CallHeader(vote=votes[0], second_vote=votes[1], predicted_ns=max(1, int(fastest_s * 1e9)))

    def _has_no_empty_chunk(self, plan: OverlapPlan) -> bool:
        """Return whether every chunk of a plan has an expert, where its chunks are of experts."""
        if plan.chunk_by == "tokens" or self.widths is None:
            return True
        return all(first < last for first, last in pairwise(plan.bounds(self.widths.num_local_experts)))

    def observe(self, headers: Sequence[CallHeader], report: LayerReport, has_backward: bool) -> None:
        """Take in one call: what every rank's header said, and what this rank's report says."""
        report.choice = self.choice
        if not self.is_tuned:
            if self.config.memory_budget_bytes is not None:
                self.last_work = most_work(report)
                self.last_working_sets = {WorkingSet.unpack(header.working_set) for header in headers}
            return
        before, self.last_report = self.last_report, report
        if self.are_forwards_alone and before is not None and before.backward is not None:
            self.are_forwards_alone = False
            self._search_again()
            return
        self.has_backward = has_backward and not self.are_forwards_alone
        if not self.candidates:
            if len(self.measured) < len(self._measured_plans):
                self.measured.append(report)
                self.num_unheard = 0
            else:
                self.num_unheard += 1
                self._count_votes(headers)
            return
        has_counted = self.trials.record(headers, is_chosen=self.chosen is not None)
        self.trials.add(report, self.has_backward)
        self.num_unheard = 1 if has_counted else self.num_unheard + 1
        if self.chosen is None:
            self._choose_if_tried()
        else:
            self._search_again_if_drifted()

    def _count_votes(self, headers: Sequence[CallHeader]) -> None:
        """Take the votes of one rank as candidates, once all ranks have voted."""
        if not all(header.predicted_ns for header in headers):
            return
        # The rank that takes longest sets the pace of all; among equals the first one is taken.
        slowest = max(headers, key=lambda header: header.predicted_ns)
        votes = [vote for vote in (slowest.vote, slowest.second_vote) if vote]
        one = fixed_plan(replace(self.config, num_chunks=1, shape="equal"), 1, self.size)
        self.candidates = [one, *(unpack_plan(vote, self.config) for vote in votes)]
        self.trials = Trials(len(self.candidates))
        self.num_unheard = 0
        self.measured.clear()
        self.choice = f"trying {len(self.candidates)} plans in turn"
        if len(self.candidates) == 1:
            self.chosen = one
            self.num_searches += 1
            self.choice = (
                f"{one}: every other plan was predicted to be slower by over {TRIED_EXCESS:.0%} ({self.sides})"
            )

    def _choose_if_tried(self) -> None:
        """Choose a plan once every candidate is measured, or one chunk where no more times come."""
        if not self.trials.is_enough and self.num_unheard < MAX_UNHEARD_CALLS:
            return
        if not self.trials.is_enough and self.has_backward and not self.trials.num_heard:
            self.are_forwards_alone, self.num_unheard = True, 0
            self.trials = Trials(len(self.candidates))
            return
        self.num_searches += 1
        if not self.trials.is_enough:
            self.chosen = self.candidates[0]
            self.trials.keep(None)
            self.choice = f"{self.chosen}: too few whole calls of one size to compare other plans ({self.sides})"
            return
        medians = self.trials.medians()
        best = min(medians, key=lambda n: medians[n])
        gain = 1 - medians[best] / medians[0]
        if gain < SMALLEST_GAIN:
            best = 0
            words = f"{self.candidates[0]}: the fastest other plan gained less than {SMALLEST_GAIN:.0%}"
        else:
            words = f"{self.candidates[best]}: {gain:.0%} faster than one chunk"
        self.chosen = self.candidates[best]
        self.trials.keep(medians[best])
        rounds = f"{TRIAL_ROUNDS} rounds" + " of forwards, since no backward came" * self.are_forwards_alone
        self.choice = f"{words}, median of {rounds} ({self.sides})"

    def _search_again_if_drifted(self) -> None:
        """Start with the first stage again if the chosen plan's calls take another time than they did."""
        if self.trials.drift() > DRIFT * self.num_searches:
            self._search_again()

    def _search_again(self) -> None:
        """Start with the first stage again."""
        self.chosen, self.candidates, self.trials = None, [], Trials(0)
        self.measured.clear()
