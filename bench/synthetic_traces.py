"""Traces as torch.profiler writes them, of a plain MoE with DDP over gloo that never ran: made by a small simulation.

`write_traces(scenario, folder)` writes a file for each rank, and gives what a step takes with and without the faults.
"""

import gzip
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

from bench.faults import Fault
from bench.foreign_scenarios import Scenario, level_on_rank

__all__ = ["write_traces"]

ROWS = 512
WIDTH = 512
RATE = 50e6
"""Bytes a second of a rank's link."""
LATENCY_S = 0.0006
ATTENTION_S, ROW_S = 0.008, 24e-6
"""What a layer's attention takes, and a row in the experts; backward twice as long."""
GRADIENT_BYTES = 1_000_000
BASE_NS = 1_790_857_026_000_000_000
US = 1e6


class _Rank:
    """One rank's clock, and what it has written."""

    def __init__(self, rank: int, seed: int, noise: float) -> None:
        self.rank, self.now_s = rank, 0.001 * rank
        self.draw = random.Random(seed * 101 + rank)
        self.noise = noise
        self.events: list[dict[str, Any]] = []
        self.lanes = [0.0, 0.0]
        self.next_lane = 0

    def event(self, category: str, name: str, start_s: float, end_s: float, thread: int = 1, **arguments: Any) -> None:
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread, "ts": round(start_s * US, 3),
             "dur": round((end_s - start_s) * US, 3), "args": arguments}
        )  # fmt: skip

    def compute(self, seconds: float, in_backward: bool = False) -> None:
        seconds *= math.exp(self.draw.gauss(0, self.noise)) if self.noise else 1.0
        if self.noise and self.draw.random() < 0.02:
            seconds *= 1.5
        begin_s = self.now_s
        for _ in range(3):
            self.event("cpu_op", "aten::mm", self.now_s, self.now_s + seconds / 3)
            self.now_s += seconds / 3 + 30e-6 * math.exp(self.draw.gauss(0, 5 * self.noise))
        if in_backward:
            self.event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", begin_s, self.now_s)


class _Job:
    """All ranks of a run, one step after the other."""

    def __init__(self, scenario: Scenario, faults: tuple[Fault, ...], noise: float) -> None:
        self.scenario, self.faults = scenario, faults
        self.ranks = [_Rank(rank, scenario.seed, noise) for rank in range(scenario.num_ranks)]
        self.routing = random.Random(scenario.seed * 7)
        self.step_s: list[float] = []

    def run(self) -> None:
        before_s = 0.0
        for step in range(self.scenario.num_steps):
            begins = [rank.now_s for rank in self.ranks]
            self._step(step)
            for rank, begin_s in zip(self.ranks, begins, strict=True):
                rank.event("user_annotation", f"ProfilerStep#{step + 1}", begin_s, rank.now_s)
            end_s = max(rank.now_s for rank in self.ranks)
            self.step_s.append(end_s - before_s)
            before_s = end_s

    def _level(self, fault: Fault, step: int, rank: int) -> float:
        return level_on_rank(fault, self.scenario, step, rank)

    def _factor(self, step: int, rank: int, phase: str, layer: int) -> float:
        factor = 1.0
        for fault in self.faults:
            if fault.kind == "slow rank" and fault.phase in ("", phase) and fault.layer in (None, layer):
                factor += (fault.amount - 1) * self._level(fault, step, rank)
        return factor

    def _sleep(self, step: int, phase: str, layer: int) -> None:
        for fault in self.faults:
            if fault.kind == "late rank" and (fault.phase or "forward") == phase and (fault.layer or 0) == layer:
                for rank in self.ranks:
                    rank.now_s += fault.amount * self._level(fault, step, rank.rank)

    def _splits(self, step: int) -> list[list[int]]:
        size = self.scenario.num_ranks
        splits = []
        for source in range(size):
            weights = [self.routing.uniform(0.85, 1.15) for _ in range(size)]
            for fault in self.faults:
                if fault.kind == "imbalance":
                    hot = fault.ranks[0]
                    share = fault.amount * self._level(fault, step, hot)
                    weights = [one * (1 - share) for one in weights]
                    weights[hot] += share * size
            total = sum(weights)
            own = [int(ROWS * one / total) for one in weights]
            own[source] += ROWS - sum(own)
            splits.append(own)
        return splits

    def _step(self, step: int) -> None:
        layers = range(self.scenario.num_layers)
        splits = [self._splits(step) for _ in layers]
        back = [[[one[i][k] for i in range(len(one))] for k in range(len(one))] for one in splits]
        for layer in layers:
            self._sleep(step, "forward", layer)
            for rank in self.ranks:
                rank.compute(ATTENTION_S * self._factor(step, rank.rank, "forward", layer))
            self._exchange([[1] * len(self.ranks)] * len(self.ranks), 8, False, splits_known=False)
            self._exchange(splits[layer], 4 * WIDTH, False)
            self._experts(step, "forward", layer, back[layer], 1.0)
            self._exchange(back[layer], 4 * WIDTH, False)
        buckets = []
        for layer in reversed(layers):
            self._sleep(step, "backward", layer)
            self._exchange(splits[layer], 4 * WIDTH, True)
            self._experts(step, "backward", layer, back[layer], 2.0)
            self._exchange(back[layer], 4 * WIDTH, True)
            for rank in self.ranks:
                rank.compute(2 * ATTENTION_S * self._factor(step, rank.rank, "backward", layer), True)
            buckets.append(self._post_all_reduce())
        for ends in buckets:
            for rank, end_s in zip(self.ranks, ends, strict=True):
                rank.now_s = max(rank.now_s, end_s + 40e-6)
        for rank in self.ranks:
            rank.compute(0.002)

    def _experts(self, step: int, phase: str, layer: int, received: list[list[int]], times: float) -> None:
        for rank in self.ranks:
            rows = sum(received[rank.rank])
            factor = self._factor(step, rank.rank, phase, layer)
            rank.compute(times * (0.001 + ROW_S * rows) * factor, phase == "backward")

    def _rate(self, source: int, target: int) -> float:
        rate = self._network(source)
        for fault in self.faults:
            if fault.kind == "slow link" and fault.ranks == (source, target):
                rate /= 1 + (fault.amount - 1) * self._level(fault, len(self.step_s), source)
        return rate

    def _network(self, rank: int) -> float:
        """Return the rate of a rank's port, as slow as the network is for all."""
        rate = RATE
        for fault in self.faults:
            if fault.kind == "slow network":
                rate /= 1 + (fault.amount - 1) * self._level(fault, len(self.step_s), rank)
        return rate

    def _exchange(self, sent: list[list[int]], row: int, backward: bool, splits_known: bool = True) -> None:
        size = len(self.ranks)
        starts = [rank.now_s + 50e-6 for rank in self.ranks]
        for rank in self.ranks:
            k = rank.rank
            comes = [sent[i][k] * row for i in range(size)]
            goes = [sent[k][i] * row for i in range(size)]
            seconds = max(sum(comes) - comes[k], sum(goes) - goes[k]) / self._network(k)
            links = [comes[i] / self._rate(i, k) for i in range(size) if i != k]
            links += [0.9 * goes[i] / self._rate(k, i) for i in range(size) if i != k]
            seconds = LATENCY_S + max(seconds, *links)
            seconds *= math.exp(rank.draw.gauss(0, rank.noise)) if rank.noise else 1.0
            end_s = max(starts) + seconds
            arguments: dict[str, Any] = {
                "Input Dims": [
                    [sum(sent[i][k] for i in range(size)), WIDTH],
                    [sum(sent[k]), WIDTH],
                    [],
                    [],
                    [],
                    [],
                    [],
                ],
                "Input type": ["float", "float", "", "ScalarList", "ScalarList", "Scalar", "Scalar"],
                "Concrete Inputs": ["", "", "", str([sent[i][k] for i in range(size)]), str(sent[k]), "False", "-1"],
            }
            if not splits_known:
                arguments = {
                    "Input Dims": [[size], [size], [], [], [], [], []],
                    "Input type": ["long int", "long int", "", "ScalarList", "ScalarList", "Scalar", "Scalar"],
                    "Concrete Inputs": ["", "", "", "[]", "[]", "False", "-1"],
                }
            rank.event("cpu_op", "c10d::alltoall_base_", rank.now_s, rank.now_s + 90e-6, **arguments)
            lane = rank.next_lane = 1 - rank.next_lane
            rank.event("user_annotation", "gloo:all_to_all", starts[k], end_s, 10 + lane)
            if backward:
                name = "autograd::engine::evaluate_function: ExchangeBackward"
                rank.event("cpu_op", name, rank.now_s - 10e-6, end_s + 60e-6)
            rank.now_s = end_s + 80e-6

    def _post_all_reduce(self) -> list[float]:
        starts = [rank.now_s + 50e-6 for rank in self.ranks]
        size = len(self.ranks)
        ends = []
        for rank in self.ranks:
            arguments: dict[str, Any] = {
                "Input Dims": [[[GRADIENT_BYTES // 4]], [], [], [], [], []],
                "Input type": ["TensorList", "", "", "", "Scalar", "Scalar"],
                "Concrete Inputs": ["", "", "", "", "True", "-1"],
            }
            rank.event("cpu_op", "c10d::allreduce_", rank.now_s, rank.now_s + 90e-6, **arguments)
            name = "autograd::engine::evaluate_function: AccumulateGrad"
            rank.event("cpu_op", name, rank.now_s - 5e-6, rank.now_s + 95e-6)
            seconds = LATENCY_S + 2 * (size - 1) / size * GRADIENT_BYTES / self._network(rank.rank)
            end_s = max(max(starts), rank.lanes[0]) + seconds
            rank.lanes[0] = end_s
            rank.event("user_annotation", "gloo:all_reduce", starts[rank.rank], end_s, 12)
            rank.now_s += 100e-6
            ends.append(end_s)
        return ends


def write_traces(scenario: Scenario, folder: Path, noise: float = 0.04, packed: bool = False) -> float:
    """Write a trace for each rank; give the share of a step that the faults cost."""
    with_faults, without = _Job(scenario, scenario.faults, noise), _Job(scenario, (), noise)
    with_faults.run()
    without.run()
    folder.mkdir(parents=True, exist_ok=True)
    size = scenario.num_ranks
    for rank in with_faults.ranks:
        group = {"pg_name": "0", "pg_desc": "default_pg", "backend_config": "cpu:gloo", "pg_size": size}
        top = {
            "schemaVersion": 1,
            "distributedInfo": {
                "backend": "gloo", "rank": rank.rank, "world_size": size, "pg_count": 1,
                "pg_config": [{**group, "ranks": list(range(size))}],
            },
            "baseTimeNanoseconds": BASE_NS,
            "traceEvents": rank.events,
        }  # fmt: skip
        text = json.dumps(top)
        if packed:
            (folder / f"rank{rank.rank}.json.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"rank{rank.rank}.json").write_text(text)
    return 1 - statistics.fmean(without.step_s) / statistics.fmean(with_faults.step_s)
