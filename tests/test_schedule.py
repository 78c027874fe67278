"""Schedules are data: what any of them must hold, and one written out."""

import itertools

import pytest

from tritonmoe.overlap.schedule import LOCAL, Schedule, Step, build_backward, build_forward, check_schedule

CHUNKS = (1, 2, 3, 32)
FLAGS = list(itertools.product(CHUNKS, (True, False), (True, False)))


def forwards() -> list:
    return [
        pytest.param(
            build_forward(c, local_first=local, serial=serial),
            c,
            serial,
            id=f"forward-C{c}-{'local' if local else 'travel'}-{'serial' if serial else 'overlap'}",
        )
        for c, local, serial in FLAGS
    ]


def backwards() -> list:
    return [
        pytest.param(
            build_backward(c, local_first=local, serial=serial, needs_x=x, needs_topk_weights=w),
            c,
            serial,
            id=f"backward-C{c}-{'local' if local else 'travel'}-{'serial' if serial else 'overlap'}-x{x:d}-w{w:d}",
        )
        for (c, local, serial), x, w in itertools.product(FLAGS, (True, False), (True, False))
    ]


def kinds(schedule: Schedule, lane: str | None = None) -> list[str]:
    return [str(step) for step in schedule if lane in (None, step.lane)]


def position(schedule: Schedule, kind: str, chunk: int | None) -> int:
    return next(n for n, step in enumerate(schedule) if (step.kind, step.chunk) == (kind, chunk))


def test_two_chunks_written_out() -> None:
    schedule = build_forward(2, local_first=True, serial=False)
    assert kinds(schedule, "comm") == ["metadata", "dispatch 0", "dispatch 1", "combine 0", "combine 1"]
    assert kinds(schedule, "compute") == ["group", "experts local", "experts 0", "experts 1", "reduce 0", "reduce 1"]
    backward = build_backward(2, local_first=True, serial=False, needs_x=True, needs_topk_weights=True)
    assert kinds(backward, "comm") == [
        "combine_backward 0",
        "combine_backward 1",
        "dispatch_backward 0",
        "dispatch_backward 1",
        "routing_backward",
    ]
    assert kinds(backward, "compute") == [
        "experts_backward local",
        "experts_backward 0",
        "experts_backward 1",
        "weight_grad",
        "reduce_backward 0",
        "reduce_backward 1",
        "reduce_routing_backward",
    ]


@pytest.mark.parametrize(("schedule", "num_chunks", "serial"), [*forwards(), *backwards()])
def test_every_exchange_is_posted_once_and_waited_for(schedule: Schedule, num_chunks: int, serial: bool) -> None:
    check_schedule(schedule)
    assert len(set(kinds(schedule))) == len(schedule)
    for n, step in enumerate(schedule):
        if step.lane == "comm":
            assert any(n in later.after for later in schedule[n + 1 :]), step
    for kind in {step.kind for step in schedule if step.chunk is not None}:
        chunks = [step.chunk for step in schedule if step.kind == kind and step.chunk != LOCAL]
        assert chunks == list(range(num_chunks)), kind


@pytest.mark.parametrize(("schedule", "num_chunks", "serial"), [*forwards(), *backwards()])
def test_a_serial_schedule_has_one_exchange_in_flight(schedule: Schedule, num_chunks: int, serial: bool) -> None:
    in_flight: set[int] = set()
    most = 0
    for n, step in enumerate(schedule):
        in_flight -= set(step.after)
        if step.lane == "comm":
            in_flight.add(n)
        most = max(most, len(in_flight))
    assert not in_flight
    if serial:
        assert most == 1
    elif num_chunks > 1:
        assert most >= num_chunks


@pytest.mark.parametrize(("schedule", "num_chunks", "serial"), forwards())
def test_data_flow_of_forward(schedule: Schedule, num_chunks: int, serial: bool) -> None:
    group = position(schedule, "group", None)
    assert position(schedule, "metadata", None) in schedule[group].after
    has_local = ("experts", LOCAL) in {(s.kind, s.chunk) for s in schedule}
    for c in range(num_chunks):
        experts = position(schedule, "experts", c)
        assert {position(schedule, "dispatch", c), group} <= set(schedule[experts].after)
        combine = position(schedule, "combine", c)
        assert experts in schedule[combine].after
        reduce = position(schedule, "reduce", c)
        assert combine in schedule[reduce].after
        if has_local:
            assert position(schedule, "experts", LOCAL) in schedule[reduce].after
            assert group in schedule[position(schedule, "experts", LOCAL)].after


@pytest.mark.parametrize(("schedule", "num_chunks", "serial"), backwards())
def test_data_flow_of_backward(schedule: Schedule, num_chunks: int, serial: bool) -> None:
    present = {(s.kind, s.chunk) for s in schedule}
    weight_grad = position(schedule, "weight_grad", None)
    experts = [position(schedule, "experts_backward", c) for c in range(num_chunks)]
    if ("experts_backward", LOCAL) in present:
        experts.append(position(schedule, "experts_backward", LOCAL))
    assert weight_grad > max(experts)
    assert set(experts) <= set(schedule[weight_grad].after)
    for c in range(num_chunks):
        assert position(schedule, "combine_backward", c) in schedule[experts[c]].after
        if ("dispatch_backward", c) in present:
            home = position(schedule, "dispatch_backward", c)
            assert experts[c] in schedule[home].after
            assert home in schedule[position(schedule, "reduce_backward", c)].after
            if not serial:
                # The last exchanges go home behind the weight gradients.
                assert home < weight_grad < position(schedule, "reduce_backward", c)
    if ("routing_backward", None) in present:
        routing = position(schedule, "routing_backward", None)
        assert set(experts) <= set(schedule[routing].after)
        assert routing in schedule[position(schedule, "reduce_routing_backward", None)].after


def test_gradients_that_no_rank_needs_are_left_out() -> None:
    schedule = build_backward(3, local_first=True, serial=False, needs_x=False, needs_topk_weights=False)
    assert {s.kind for s in schedule} == {"combine_backward", "experts_backward", "weight_grad"}
    only_x = build_backward(3, local_first=True, serial=False, needs_x=True, needs_topk_weights=False)
    assert not any("routing" in s.kind for s in only_x)
    only_weights = build_backward(3, local_first=True, serial=False, needs_x=False, needs_topk_weights=True)
    assert not any(s.kind in ("dispatch_backward", "reduce_backward") for s in only_weights)


@pytest.mark.parametrize("local_first", [True, False])
def test_overlap_and_serial_hold_the_same_steps(local_first: bool) -> None:
    """The exchanges are the same ones; only when each is waited for differs."""
    pairs = [
        [build_forward(3, local_first=local_first, serial=serial) for serial in (True, False)],
        [
            build_backward(3, local_first=local_first, serial=serial, needs_x=True, needs_topk_weights=True)
            for serial in (True, False)
        ],
    ]
    for serial, overlapped in pairs:
        assert sorted(kinds(serial)) == sorted(kinds(overlapped))


def test_wrong_schedules_are_refused() -> None:
    post, use = Step("dispatch", 0, "comm"), Step("experts", 0, "compute", (0,))
    check_schedule((post, use))
    with pytest.raises(ValueError, match=r"no step waits for the exchange of step 0 \(dispatch 0\)"):
        check_schedule((post, Step("experts", 0, "compute")))
    with pytest.raises(ValueError, match=r"step 0 \(experts 0\) needs step 0"):
        check_schedule((use, post))
    with pytest.raises(ValueError, match="needs step 5"):
        check_schedule((post, Step("experts", 0, "compute", (0, 5))))
