"""The executor waits where the schedule says: with exchanges that come late, and with experts of fixed duration."""

import threading
import time

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.overlap import OverlapPlan, equal_sizes
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.ops.backends.ops import WeightGrads
from tritonmoe.overlap import report as report_module
from tritonmoe.overlap.executor import Execution
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.tools.benchmarks.stand_ins import run_passes
from tritonmoe.transports import PendingExchange, Transport

CPU = torch.device("cpu")


class LateExchange(PendingExchange):
    """An exchange whose rows are there only once somebody has waited for it."""

    def __init__(self, out: Tensor, value: float, log: list[str], name: str) -> None:
        self.out, self.value, self.log, self.name = out, value, log, name
        log.append(f"post {name}")

    def wait(self) -> Tensor:
        self.log.append(f"wait {self.name}")
        return self.out.fill_(self.value)


def run_late(plan: OverlapPlan, num_steps: int = 3) -> list[str]:
    """A forward of `num_steps` steps over the same buffers; stale or missing rows come out as wrong sums."""
    log: list[str] = []
    num_chunks = plan.num_chunks
    received, home = torch.full((num_chunks,), torch.nan), torch.full((num_chunks,), torch.nan)
    for step in range(num_steps):
        partials: dict[int, float] = {}
        results: dict[int, float] = {}
        received.fill_(torch.nan)
        home.fill_(torch.nan)

        def dispatch(chunk, step=step):
            return LateExchange(received[chunk : chunk + 1], 10.0 * step + chunk, log, f"dispatch {chunk}")

        def experts(chunk, partials=partials):
            if chunk >= 0:
                log.append(f"experts {chunk}")
                partials[chunk] = received[chunk].item() * 2

        def combine_(chunk, partials=partials):
            return LateExchange(home[chunk : chunk + 1], partials[chunk], log, f"combine {chunk}")

        def reduce(chunk, results=results):
            log.append(f"reduce {chunk}")
            results[chunk] = home[chunk].item()

        actions = {
            StepKind.METADATA: lambda: LateExchange(torch.zeros(1), 1.0, log, "metadata"),
            StepKind.GROUP: lambda: None,
            StepKind.DISPATCH: dispatch,
            StepKind.EXPERTS: experts,
            StepKind.COMBINE: combine_,
            StepKind.REDUCE: reduce,
        }
        Execution(build_forward(plan), actions, CPU).run()
        assert results == {c: 2 * (10.0 * step + c) for c in range(num_chunks)}
    return log


@pytest.mark.parametrize("num_chunks", [1, 2, 5], ids="C{}".format)
@pytest.mark.parametrize("serial", [False, True], ids=["overlapped", "serial"])
def test_late_rows_are_waited_for(serial: bool, num_chunks: int) -> None:
    log = run_late(OverlapPlan(equal_sizes(num_chunks), serial=serial))
    for name in {entry.split(" ", 1)[1] for entry in log if entry.startswith("post")}:
        posts, waits = ([n for n, e in enumerate(log) if e == f"{word} {name}"] for word in ("post", "wait"))
        assert len(posts) == len(waits) == 3
        assert all(post < wait for post, wait in zip(posts, waits, strict=True))
    if not serial and num_chunks > 1:
        assert log.index("post dispatch 1") < log.index("wait dispatch 0")


def test_a_window_holds_back_exchanges() -> None:
    log = run_late(OverlapPlan(equal_sizes(4), window=2), num_steps=1)
    posts_and_waits = [entry for entry in log if entry.split()[1] == "dispatch"]
    assert posts_and_waits == [
        *("post dispatch 0", "post dispatch 1", "wait dispatch 0", "post dispatch 2"),
        *("wait dispatch 1", "post dispatch 3", "wait dispatch 2", "wait dispatch 3"),
    ]
    assert log.index("post dispatch 2") < log.index("experts 0")
    assert log.index("wait combine 0") < log.index("post combine 2") < log.index("wait combine 1")


def test_every_exchange_is_waited_for_once_even_if_two_steps_need_it() -> None:
    log: list[str] = []
    a, b, c = StepKind.DISPATCH, StepKind.EXPERTS, StepKind.REDUCE
    schedule = (Step(a, 0), Step(b, 0, (0,)), Step(c, 0, (0, 1)))
    actions = {
        a: lambda _: LateExchange(torch.zeros(1), 1.0, log, "a"),
        b: lambda _: log.append("b"),
        c: lambda _: log.append("c"),
    }
    Execution(schedule, actions, CPU).run()
    assert log == ["post a", "wait a", "b", "c"]


def test_an_error_of_a_step_comes_out() -> None:
    def fails(_):
        raise ZeroDivisionError("in the experts")

    with pytest.raises(ZeroDivisionError, match="in the experts"):
        Execution((Step(StepKind.EXPERTS, 0),), {StepKind.EXPERTS: fails}, CPU).run()


class SleepingExperts:
    """Stands in for the experts of one call: every pass of a chunk takes as long as told, and doubles its rows."""

    def __init__(self, rows: Tensor, slices: list[slice], seconds: float) -> None:
        self.rows, self.slices, self.seconds = rows, slices, seconds

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        time.sleep(self.seconds / len(self.slices))
        result = 2 * self.rows[self.slices[chunk]]
        return result if out is None else out.copy_(result)

    def backward(self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds / len(self.slices))
        result = 2 * dout[self.slices[chunk]]
        return (result if out is None else out.copy_(result)), torch.ones(len(result), 1)

    def weight_grad(self, dout: Tensor, needs: tuple[bool, bool, bool, bool]) -> WeightGrads:
        return WeightGrads(None, None, None, None)


def run_sleeping(
    num_chunks: int, serial: bool, seconds: float = 0.0, link: tm.LinkModel | None = None, num_steps: int = 1
) -> list[tuple[Tensor, Tensor, PassReport, PassReport]]:
    """Two ranks, all of whose tokens go to the other one: no local rows fill the pipeline's ends."""
    num_tokens, width = 256, 64

    def on_rank(transport: Transport):
        ids = torch.full((num_tokens, 1), 1 - transport.rank)
        for step in range(num_steps):
            generator = torch.Generator().manual_seed(10 * step + transport.rank)
            x, dout = (torch.randn(num_tokens, width, generator=generator) for _ in range(2))
            overlap = OverlapPlan(equal_sizes(num_chunks), local_first=False, serial=serial)

            def make(rows: Tensor, plan: DispatchPlan) -> SleepingExperts:
                return SleepingExperts(rows, [plan.receive_slice(c) for c in range(num_chunks)], seconds)

            with torch.no_grad():
                y, grads, (forward, backward) = run_passes(
                    transport, overlap, x, ids, torch.ones(num_tokens, 1), 2, make, dout
                )
            assert torch.equal(y, 2 * x)
            assert torch.equal(grads.x, 2 * dout)
            assert torch.equal(grads.topk_weights, torch.ones(num_tokens, 1))
        return y, grads.x, forward, backward

    return tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20, link=link)


@pytest.mark.parametrize("serial", [False, True], ids=["overlapped", "serial"])
def test_experts_of_fixed_duration_over_several_steps(serial: bool) -> None:
    """Buffers are used again, rows come 2 ms late on a link of 5 MB/s."""
    run_sleeping(4, serial, 0.004, tm.LinkModel(0.005, latency_us=2000), num_steps=4)


def test_overlap_hides_communication() -> None:
    """Dispatch and combine take 2 x 0.1 s, the experts 0.2 s: serial 0.4 s, overlapped 0.25 s at best."""
    num_bytes = 256 * 64 * 4
    link = tm.LinkModel(num_bytes / 0.1 / 1e9)
    run_sleeping(4, False)  # warm
    overlapped, serial = (run_sleeping(4, is_serial, 0.2, link) for is_serial in (False, True))
    for rank in range(2):
        _, _, fast, fast_backward = overlapped[rank]
        _, _, slow, slow_backward = serial[rank]
        assert slow.total_s > 0.39
        assert fast.total_s < 0.85 * slow.total_s
        assert fast_backward.total_s < 0.85 * slow_backward.total_s
        assert fast.exposed_communication_s < slow.exposed_communication_s
        assert fast.communication_s == pytest.approx(0.2, rel=0.5)
        assert fast.compute_s == pytest.approx(0.2, rel=0.5)
        assert fast.lane_s("experts") > 0.19


def test_report_of_a_pass() -> None:
    plan = OverlapPlan(equal_sizes(3), local_first=False)
    _, _, forward, backward = run_sleeping(3, False, 0.003)[0]
    for report, schedule in (
        (forward, build_forward(plan)),
        (backward, build_backward(plan, needs_x=True, needs_topk_weights=True)),
    ):
        steps = report.steps
        assert sorted(str(t.step) for t in steps) == sorted(map(str, schedule))
        for lane in ("compute", "comm"):
            assert {str(t.step) for t in steps if t.step.lane == lane} == {str(s) for s in schedule if s.lane == lane}
        for timing in steps:
            assert 0 <= timing.start_s <= timing.end_s <= report.total_s
            assert 0 <= timing.wait_s <= report.total_s
            assert timing.step.lane == "comm" or timing.wait_s == 0
        assert 0 <= report.exposed_communication_s <= report.total_s
        assert 0 < report.compute_s <= report.total_s
        assert report.compute_s + report.exposed_communication_s <= report.total_s + 1e-6
        assert report.steps is steps


def test_times_on_a_device_wait_for_the_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner reads them when the next call's work, or other ranks', is enqueued already."""
    waited_for = []

    class Event:
        numbers = iter(range(100))

        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            self.number: int | None = None

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:3"
            self.number = next(self.numbers)

        def synchronize(self) -> None:
            waited_for.append(self.number)

        def elapsed_time(self, end: "Event") -> float:
            assert waited_for, "the device may not be there yet"
            return float(end.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the whole device"))
    monkeypatch.setattr(report_module, "is_captured", lambda device: False)
    pending = LateExchange(torch.zeros(1), 1.0, [], "dispatch")
    schedule = (Step(StepKind.DISPATCH, 0), Step(StepKind.EXPERTS, 0, (0,)))
    actions = {StepKind.DISPATCH: lambda _: pending, StepKind.EXPERTS: lambda _: None}
    report = Execution(schedule, actions, torch.device("cuda", 3)).run()
    assert report.total_s == pytest.approx(7e-3)
    times = [t for timing in report.steps for t in (timing.start_s, timing.post_s, timing.wait_s)]
    assert times == pytest.approx([1e-3, 1e-3, 1e-3, 5e-3, 0, 0])
    assert set(waited_for) == {report._end.number}


def test_a_peer_that_never_comes_is_an_error_of_the_step() -> None:
    """The executor adds no waiting of its own: the transport's timeout is what a caller sees."""
    arrived = threading.Event()

    def on_rank(transport: Transport) -> str:
        if transport.rank == 1:
            arrived.wait(5)
            return ""
        splits = [1, 1]
        schedule = (Step(StepKind.DISPATCH, 0), Step(StepKind.EXPERTS, 0, (0,)))
        actions = {
            StepKind.DISPATCH: lambda _: transport.exchange(torch.zeros(2, 1), splits, splits),
            StepKind.EXPERTS: lambda _: None,
        }
        try:
            Execution(schedule, actions, CPU).run()
        except tm.TransportError as error:
            arrived.set()
            return str(error)
        return ""

    before = time.perf_counter()
    said, _ = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=0.3)
    assert "has not heard from ranks [1]" in said
    assert time.perf_counter() - before < 3
