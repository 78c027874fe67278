"""Schedules are data: what any of them must hold, and one written out."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from tritonmoe.config.overlap import LOCAL_PARTS, OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward, build_inside, check_schedule, phase_ends
from tritonmoe.overlap.steps import LOCAL_END, LOCAL_START, Step, StepKind, Way

CHUNKS = (1, 2, 3, 32)
LOCAL_STARTS = {"travel": None, "start": LOCAL_PARTS, "end": 0, "both": LOCAL_PARTS // 2}
WINDOWS = (1, 2, 32)


def plans() -> dict[str, OverlapPlan]:
    found = {}
    for num_chunks, (name, local_start) in itertools.product(CHUNKS, LOCAL_STARTS.items()):
        local = {"local_first": False} if local_start is None else {"local_start": local_start}
        for window in WINDOWS:
            plan = OverlapPlan(equal_sizes(num_chunks), **local, window=window, backward_window=window)
            found[f"C{num_chunks}-{name}-window{window}"] = plan
        found[f"C{num_chunks}-{name}-serial"] = OverlapPlan(equal_sizes(num_chunks), **local, serial=True)
    return found


PLANS = plans()


@cache
def forwards(plan: str) -> dict[str, Schedule]:
    copies = {
        f"forward-copies-{relayed:d}": build_forward(PLANS[plan], has_copies=True, relays_copies=relayed)
        for relayed in (False, True)
    }
    return {"forward": build_forward(PLANS[plan]), **copies}


@cache
def backwards(plan: str) -> dict[str, Schedule]:
    found = {
        f"backward-x{x:d}-w{w:d}": build_backward(PLANS[plan], needs_x=x, needs_topk_weights=w)
        for x, w in itertools.product((True, False), (True, False))
    }
    for (sent, relayed), home in itertools.product(((True, False), (True, True), (False, False)), ((0, 1), (1,), ())):
        found[f"backward-copies-sent{sent:d}-relayed{relayed:d}-home{''.join(map(str, home))}"] = build_backward(
            PLANS[plan],
            needs_x=True,
            needs_topk_weights=True,
            has_copies=True,
            sends_copies=sent,
            relays_copies=relayed,
            returned_copies=home,
        )
    return found


def check_each(check: Callable[[Schedule, OverlapPlan], None], schedules: dict[str, Schedule], plan: str) -> None:
    """Raise AssertionError, which names the schedule, where a check of one fails."""
    for name, schedule in schedules.items():
        try:
            check(schedule, PLANS[plan])
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


def kinds(schedule: Schedule, lane: str | None = None) -> list[str]:
    return [str(step) for step in schedule if lane in (None, step.lane)]


def finished(schedule: Schedule, kind: StepKind, chunk: int) -> int:
    """Return the position of the step that computes a chunk to its end: that of copies, where there are any."""
    has_copies = any(step.kind is kind.copy_kind for step in schedule)
    return position(schedule, kind.copy_kind if has_copies else kind, chunk)


def position(schedule: Schedule, kind: str, chunk: int | None) -> int:
    return next(n for n, step in enumerate(schedule) if (step.kind, step.chunk) == (kind, chunk))


def test_two_chunks_written_out() -> None:
    plan = OverlapPlan((1, 2))
    schedule = build_forward(plan)
    assert kinds(schedule, "comm") == ["metadata", "dispatch 0", "dispatch 1", "combine 0", "combine 1"]
    assert kinds(schedule, "compute") == [
        "group",
        "experts local",
        "experts 0",
        "experts 1",
        "experts local end",
        "reduce 0",
        "reduce 1",
    ]
    backward = build_backward(plan, needs_x=True, needs_topk_weights=True)
    assert kinds(backward, "comm") == [
        "combine_backward 0",
        "combine_backward 1",
        "dispatch_backward 0",
        "dispatch_backward 1",
        "routing_backward",
    ]
    assert kinds(backward, "compute") == [
        "experts_backward local",
        "experts_backward local end",
        "experts_backward 0",
        "experts_backward 1",
        "weight_grad",
        "reduce_backward 0",
        "reduce_backward 1",
        "reduce_routing_backward",
    ]


@pytest.mark.parametrize("serial", [False, True])
def test_fillers(serial: bool) -> None:
    """The first needs no rows at all, not even the metadata; the second hides the last combine."""
    schedule = build_forward(OverlapPlan((1, 1), serial=serial), num_fillers=2)
    first, second = position(schedule, "filler", 0), position(schedule, "filler", 1)
    assert schedule[first].after == schedule[second].after == ()
    assert first < position(schedule, "group", None)
    assert position(schedule, "combine", 1) < second
    if not serial:
        assert position(schedule, "dispatch", 1) < first
        assert second < position(schedule, "reduce", 0)
    assert kinds(build_forward(OverlapPlan((1, 1), serial=serial), num_fillers=1)) == [
        name for name in kinds(schedule) if name != "filler 1"
    ]


def test_a_window_of_one_written_out() -> None:
    """Dispatch 1 goes out when dispatch 0 has arrived, and combine 1 when combine 0 has."""
    schedule = build_forward(OverlapPlan((1, 1), local_start=LOCAL_PARTS, window=1))
    assert [(str(step), [str(schedule[n]) for n in step.after]) for step in schedule] == [
        ("metadata", []),
        ("dispatch 0", []),
        ("group", ["metadata"]),
        ("experts local", ["group"]),
        ("dispatch 1", ["dispatch 0"]),
        ("experts 0", ["dispatch 0", "group"]),
        ("combine 0", ["experts 0"]),
        ("experts 1", ["dispatch 1", "group"]),
        ("combine 1", ["experts 1", "combine 0"]),
        ("reduce 0", ["combine 0", "experts local"]),
        ("reduce 1", ["combine 1", "experts local"]),
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_every_exchange_is_posted_once_and_waited_for(plan: str) -> None:
    check_each(check_posted_once, {**forwards(plan), **backwards(plan)}, plan)


def check_posted_once(schedule: Schedule, plan: OverlapPlan) -> None:
    check_schedule(schedule)
    assert len(set(kinds(schedule))) == len(schedule)
    for n, step in enumerate(schedule):
        if step.lane == "comm":
            assert any(n in later.after for later in schedule[n + 1 :]), step
    for kind in {step.kind for step in schedule if step.chunk is not None and not step.kind.is_of_gradient_part}:
        chunks = [step.chunk for step in schedule if step.kind == kind and step.chunk >= 0]
        assert chunks == list(range(plan.num_chunks)), kind


@pytest.mark.parametrize("plan", PLANS)
def test_exchanges_under_way(plan: str) -> None:
    """A serial schedule has one; a window bounds the dispatches and the combines, and is used up."""
    check_each(check_under_way, {**forwards(plan), **backwards(plan)}, plan)


def check_under_way(schedule: Schedule, plan: OverlapPlan) -> None:
    under_way: dict[int, str] = {}
    most = {"any": 0}
    for n, step in enumerate(schedule):
        for earlier in step.after:
            under_way.pop(earlier, None)
        if step.lane == "comm":
            under_way[n] = step.kind
            most["any"] = max(most["any"], len(under_way))
            kind_count = sum(kind == step.kind for kind in under_way.values())
            most[step.kind] = max(most.get(step.kind, 0), kind_count)
    assert not under_way
    if plan.serial:
        assert most["any"] == 1
        return
    is_forward = "dispatch" in most
    window = min(plan.window if is_forward else plan.backward_window, plan.num_chunks)
    assert most["dispatch" if is_forward else "combine_backward"] == window
    assert most["combine" if is_forward else "combine_backward"] == window
    assert most.get("dispatch_backward", window) == window


@pytest.mark.parametrize("plan", PLANS)
def test_data_flow_of_forward(plan: str) -> None:
    check_each(check_forward, forwards(plan), plan)


def check_forward(schedule: Schedule, plan: OverlapPlan) -> None:
    group = position(schedule, "group", None)
    assert position(schedule, "metadata", None) in schedule[group].after
    local = [n for n, step in enumerate(schedule) if step.kind == "experts" and step.chunk < 0]
    expected = [LOCAL_START] * (plan.local_start > 0) + [LOCAL_END] * (plan.local_start < LOCAL_PARTS)
    assert [schedule[n].chunk for n in local] == (expected if plan.local_first else [])
    assert all(group in schedule[n].after for n in local)
    for c in range(plan.num_chunks):
        experts = position(schedule, "experts", c)
        assert {position(schedule, "dispatch", c), group} <= set(schedule[experts].after)
        combine = position(schedule, "combine", c)
        assert finished(schedule, StepKind.EXPERTS, c) in schedule[combine].after
        ends = {finished(schedule, StepKind.EXPERTS, schedule[n].chunk) for n in local}
        assert {combine, *ends} <= set(schedule[position(schedule, "reduce", c)].after)
        if not plan.serial:
            for n in local:
                # The first slice hides the first dispatch, the last one the last combine.
                first = position(schedule, "dispatch", 0) < n < position(schedule, "experts", 0)
                last = combine < n < position(schedule, "reduce", c)
                assert first if schedule[n].chunk == LOCAL_START else last


@pytest.mark.parametrize("plan", PLANS)
def test_data_flow_of_backward(plan: str) -> None:
    check_each(check_backward, backwards(plan), plan)


def check_backward(schedule: Schedule, plan: OverlapPlan) -> None:
    present = {(s.kind, s.chunk) for s in schedule}
    weight_grad = position(schedule, "weight_grad", None)
    own_experts = [step.chunk for step in schedule if step.kind == "experts_backward"]
    experts = [finished(schedule, StepKind.EXPERTS_BACKWARD, chunk) for chunk in own_experts]
    assert weight_grad > max(experts)
    assert set(experts) <= set(schedule[weight_grad].after)
    for c in range(plan.num_chunks):
        own = position(schedule, "experts_backward", c)
        assert position(schedule, "combine_backward", c) in schedule[own].after
        if ("dispatch_backward", c) in present:
            home = position(schedule, "dispatch_backward", c)
            assert finished(schedule, StepKind.EXPERTS_BACKWARD, c) in schedule[home].after
            assert home in schedule[position(schedule, "reduce_backward", c)].after
            if not plan.serial:
                # The last exchanges go home behind the weight gradients.
                assert home < weight_grad < position(schedule, "reduce_backward", c)
    if ("routing_backward", None) in present:
        routing = position(schedule, "routing_backward", None)
        assert set(experts) <= set(schedule[routing].after)
        assert routing in schedule[position(schedule, "reduce_routing_backward", None)].after


@pytest.mark.parametrize("plan", PLANS)
def test_copies_are_there_before_what_needs_them(plan: str) -> None:
    """Weights travel behind the first rows; gradients go home under the gradients of own pairs, and are added last."""
    check_each(check_copies, {**forwards(plan), **backwards(plan)}, plan)


def check_copies(schedule: Schedule, plan: OverlapPlan) -> None:
    of_copies = [step for step in schedule if step.kind in ("copy_experts", "copy_experts_backward")]
    for kind in ("copies", "spread_copies"):
        if any(step.kind == kind for step in schedule):
            assert all(position(schedule, kind, None) in step.after for step in of_copies)
    for step in of_copies:
        own = next(kind for kind in StepKind if kind.copy_kind is step.kind)
        assert position(schedule, own, step.chunk) in step.after
    is_forward = schedule[0].kind is StepKind.METADATA
    if any(step.kind == "copies" for step in schedule) and not plan.serial:
        copies = position(schedule, "copies", None)
        assert position(schedule, "dispatch" if is_forward else "combine_backward", 0) < copies
        for step in schedule:
            if step.kind in ("experts", "experts_backward"):  # own experts wait for no copies
                assert copies not in step.after
    if any(step.kind == "spread_copies" for step in schedule):
        assert position(schedule, "copies", None) in schedule[position(schedule, "spread_copies", None)].after
    own = None if is_forward else position(schedule, "weight_grad", None)
    for step in schedule:
        if step.kind is StepKind.REDUCE_COPIES_BACKWARD:
            home = position(schedule, "copies_backward", step.chunk)
            assert set(step.after) == {home, own}
            assert schedule[home].after == (position(schedule, "copy_weight_grad", step.chunk),)
            assert plan.serial or home < own
    parts = [step.chunk for step in schedule if step.kind is StepKind.COPIES_BACKWARD]
    if len(parts) > 1 and not plan.serial:  # the first part travels while the second one is computed
        assert position(schedule, "copies_backward", 0) < position(schedule, "copy_weight_grad", 1)


def test_gradients_that_no_rank_needs_are_left_out() -> None:
    plan = OverlapPlan(equal_sizes(3))
    schedule = build_backward(plan, needs_x=False, needs_topk_weights=False)
    assert {s.kind for s in schedule} == {"combine_backward", "experts_backward", "weight_grad"}
    only_x = build_backward(plan, needs_x=True, needs_topk_weights=False)
    assert not any("routing" in s.kind for s in only_x)
    only_weights = build_backward(plan, needs_x=False, needs_topk_weights=True)
    assert not any(s.kind in ("dispatch_backward", "reduce_backward") for s in only_weights)


@pytest.mark.parametrize("local_start", [0, 5, LOCAL_PARTS, None])
def test_overlap_and_serial_hold_the_same_steps(local_start: int | None) -> None:
    """The exchanges are the same ones; only when each is waited for differs."""
    local = {"local_first": False} if local_start is None else {"local_start": local_start}
    overlapped = [OverlapPlan((1, 2, 1), **local, window=w, backward_window=w) for w in (1, 2, 3)]
    serial = OverlapPlan((1, 2, 1), **local, serial=True)
    for plan in overlapped:
        assert sorted(kinds(build_forward(plan))) == sorted(kinds(build_forward(serial)))
        backwards = [build_backward(p, needs_x=True, needs_topk_weights=True) for p in (plan, serial)]
        assert sorted(kinds(backwards[0])) == sorted(kinds(backwards[1]))


def test_sizes() -> None:
    assert [ramp_sizes(c) for c in (1, 2, 3, 5, 6)] == [(1,), (1, 1), (1, 2, 1), (1, 2, 4, 2, 1), (1, 2, 4, 4, 2, 1)]
    assert ramp_sizes(4, 5) == (1, 5, 5, 1)
    assert ramp_sizes(3, 1) == equal_sizes(3)
    assert max(ramp_sizes(32)) == 16
    assert OverlapPlan((1, 2)).bounds(9) == (0, 3, 9)
    assert OverlapPlan((1, 2, 4, 2, 1)).bounds(10) == (0, 1, 3, 7, 9, 10)
    assert OverlapPlan(equal_sizes(3)).bounds(2) == (0, 0, 1, 2)
    assert [OverlapPlan((1,), local_start=n).local_bound(9) for n in (0, 8, 16)] == [0, 4, 9]


@pytest.mark.parametrize("sizes", [(), (0,), (1, -1), (1.0, 2), (True,), (1001,), (1,) * 33], ids=str)
def test_sizes_that_are_refused(sizes: tuple) -> None:
    with pytest.raises(ValueError, match="chunk sizes must be"):
        OverlapPlan(sizes)


@pytest.mark.parametrize("field", ["window", "backward_window", "local_start"])
def test_numbers_that_are_refused(field: str) -> None:
    for value in (-1, 33):
        with pytest.raises(ValueError, match=f"{field} must be"):
            OverlapPlan((1,), **{field: value})


def test_a_plan_prints_itself() -> None:
    assert str(OverlapPlan((1, 1, 1))) == "3 equal chunks, 8/16 of the local pairs first"
    plan = OverlapPlan((1, 2, 1), local_first=False, window=2, backward_window=1)
    assert str(plan) == (
        "3 chunks of relative sizes 1, 2, 1, 2 exchanges of a kind under way in forward, "
        "1 exchanges of a kind under way in backward"
    )
    assert str(OverlapPlan(local_first=False, serial=True)) == "1 chunk, not overlapped"
    by_expert = OverlapPlan((1, 1), local_first=False, chunk_by="experts")
    assert str(by_expert) == "2 equal chunks of experts"


def test_wrong_schedules_are_refused() -> None:
    post, use = Step(StepKind.DISPATCH, 0), Step(StepKind.EXPERTS, 0, (0,))
    check_schedule((post, use))
    with pytest.raises(ValueError, match=r"no step waits for the exchange of step 0 \(dispatch 0\)"):
        check_schedule((post, Step(StepKind.EXPERTS, 0)))
    with pytest.raises(ValueError, match=r"step 0 \(experts 0\) needs step 0"):
        check_schedule((use, post))
    with pytest.raises(ValueError, match="needs step 5"):
        check_schedule((post, Step(StepKind.EXPERTS, 0, (0, 5))))


def schedule_of(*lines: tuple[str, ...]) -> Schedule:
    """Write a schedule out: each line is a step and the steps that it waits for, all by name, "dispatch 0"."""
    names = [name for name, *_ in lines]
    chunks = {"local": LOCAL_START, "end": LOCAL_END}

    def step(name: str, *after: str) -> Step:
        kind, _, chunk = name.partition(" ")
        number = None if not chunk else chunks[chunk] if chunk in chunks else int(chunk)
        return Step(StepKind.named(kind), number, tuple(map(names.index, after)))

    return tuple(step(*line) for line in lines)


FORWARD = (
    ("metadata",),
    ("dispatch 0",),
    ("dispatch 1",),
    ("group", "metadata"),
    ("experts local", "group"),
    ("experts 0", "dispatch 0", "group"),
    ("combine 0", "experts 0"),
    ("experts 1", "dispatch 1", "group"),
    ("combine 1", "experts 1"),
    ("experts end", "group"),
    ("reduce 0", "combine 0"),
    ("reduce 1", "combine 1"),
)
BACKWARD = (
    ("combine_backward 0",),
    ("combine_backward 1",),
    ("experts_backward local",),
    ("experts_backward 0", "combine_backward 0"),
    ("dispatch_backward 0", "experts_backward 0"),
    ("experts_backward 1", "combine_backward 1"),
    ("dispatch_backward 1", "experts_backward 1"),
    ("routing_backward",),
    ("weight_grad",),
    ("replica_backward", "weight_grad"),
    ("reduce_backward 0", "dispatch_backward 0"),
    ("reduce_backward 1", "dispatch_backward 1"),
    ("reduce_routing_backward", "routing_backward"),
    ("reduce_replica_backward", "replica_backward"),
)


def test_the_orders_that_others_are_made_from_are_good() -> None:
    check_schedule(schedule_of(*FORWARD))
    check_schedule(schedule_of(*BACKWARD))


TOO_LATE = {
    "experts before their dispatch": (FORWARD, "experts 0", "dispatch 0"),
    "experts before the pairs are grouped": (FORWARD, "experts local", "group"),
    "expert chunks out of order": (FORWARD, "experts 1", "experts 0", "combine 0"),
    "combine before its experts": (FORWARD, "combine 1", "experts 1"),
    "reduce before its combine": (FORWARD, "reduce 0", "combine 0"),
    "reduce before an earlier combine": (FORWARD, "reduce 1", "combine 0", "reduce 0"),
    "local experts after a reduce that reads them": (FORWARD, "reduce 0", "experts end"),
    "gradients of experts before their rows": (BACKWARD, "experts_backward 1", "combine_backward 1"),
    "gradients of expert chunks out of order": (
        *(BACKWARD, "experts_backward 1", "experts_backward 0"),
        "dispatch_backward 0",
    ),
    "dispatch_backward before its gradients": (BACKWARD, "dispatch_backward 1", "experts_backward 1"),
    "reduce_backward before its exchange": (BACKWARD, "reduce_backward 0", "dispatch_backward 0"),
    "reduce_backward before an earlier exchange": (
        *(BACKWARD, "reduce_backward 1", "dispatch_backward 0"),
        "reduce_backward 0",
    ),
    "local gradients after a reduce that reads them": (
        *(BACKWARD, "reduce_backward 0", "experts_backward local"),
        *("routing_backward", "weight_grad", "replica_backward"),
    ),
    "weight_grad before the last data gradient": (
        *(BACKWARD, "weight_grad", "experts_backward 1"),
        *("dispatch_backward 1", "routing_backward"),
    ),
    "routing_backward before the last data gradient": (
        *(BACKWARD, "routing_backward", "experts_backward 1"),
        "dispatch_backward 1",
    ),
    "replica_backward before the weight gradients": (BACKWARD, "replica_backward", "weight_grad"),
}
"""The order, a step, a step that it reads, and others that must stand behind that one."""


@pytest.mark.parametrize("case", TOO_LATE)
def test_orders_that_read_what_is_not_there_are_refused(case: str) -> None:
    """What a step reads is moved behind it; the step itself waits for all exchanges before it, and so does the last."""
    lines, reader, *moved = TOO_LATE[case]
    waits = {name: after for name, *after in lines}
    names = [name for name in waits if name not in moved]
    place = names.index(reader) + 1
    names[place:place] = moved
    exchanges = [name for name in names[:-1] if StepKind.named(name.split()[0]).lane == "comm"]
    waits[reader] = waits[names[-1]] = exchanges
    kept = [(name, *(other for other in waits[name] if other in names[:n])) for n, name in enumerate(names)]
    reads = rf"step \d+ \({reader}\) reads what step \d+ \({moved[0].replace('end', 'local end')}\) gives"
    with pytest.raises(ValueError, match=reads):
        check_schedule(schedule_of(*kept))


WITHOUT = {
    "reduce": (FORWARD, "combine 1"),
    "group": (FORWARD, "metadata"),
    "experts": (FORWARD, "dispatch 0"),
    "combine": (FORWARD, "experts 1"),
    "experts_backward": (BACKWARD, "combine_backward 1"),
    "reduce_backward": (BACKWARD, "dispatch_backward 0"),
    "reduce_routing_backward": (BACKWARD, "routing_backward"),
    "reduce_replica_backward": (BACKWARD, "replica_backward"),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_step_whose_input_nobody_brings_is_refused(kind: str) -> None:
    lines, missing = WITHOUT[kind]
    kept = [tuple(name for name in line if name != missing) for line in lines if line[0] != missing]
    kept.append(("filler 0", *(name for name, *_ in kept)))
    with pytest.raises(ValueError, match=rf"{kind}( \d)? reads what {missing} gives, which is not in the schedule"):
        check_schedule(schedule_of(*kept))


def test_an_exchange_that_only_a_later_step_waits_for_is_refused() -> None:
    lines = [line for line in FORWARD if line[0] != "reduce 0"]
    lines[lines.index(("experts 0", "dispatch 0", "group"))] = ("experts 0", "group")
    lines[-1] = (*lines[-1], "combine 0", "dispatch 0")
    message = r"step 5 \(experts 0\) reads what step 1 \(dispatch 0\) brings, and does not wait for it"
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule_of(*lines))


def test_a_step_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a step stands twice in .*combine 1"):
        check_schedule(schedule_of(*FORWARD, ("reduce 1",)))


@pytest.mark.parametrize("step", [Step(StepKind.EXPERTS, 3), Step(StepKind.EXPERTS_BACKWARD, LOCAL_END)], ids=str)
def test_orders_inside_a_node_are_checked_too(step: Step) -> None:
    inside = build_inside(step, needs_x=True)
    check_schedule(inside)
    for position in range(len(inside) - 1):
        if inside[position].kind is StepKind.NODE_REDUCE_BACKWARD:
            continue  # the exchange of routing gradients may go before the sums
        swapped = [replace(one, after=()) for one in inside]
        swapped[position : position + 2] = swapped[position + 1], swapped[position]
        swapped.append(Step(StepKind.FILLER, 0, tuple(range(len(inside)))))
        with pytest.raises(ValueError, match="reads what"):
            check_schedule(tuple(swapped))


def test_the_adjoint_of_an_exchange_goes_the_other_way() -> None:
    for kind in StepKind:
        assert str(kind) == f"{kind}" == kind.value
        assert kind.twin.lane == kind.lane
        assert kind.twin.unit == kind.unit
        assert kind.twin.way == kind.way
        if kind.adjoint is not None:
            assert kind.adjoint.adjoint is kind
            assert kind.adjoint.lane == kind.lane
            assert {kind.way, kind.adjoint.way} in (
                {Way.TO_EXPERTS, Way.HOME},
                {Way.TO_COPIES, Way.TO_OWNERS},
                {None},
            )
    exchanges = [kind for kind in StepKind if kind.way not in (None, Way.AMONG_COPIES)]
    assert all(kind.adjoint is not None for kind in exchanges)
    assert StepKind.NODE_COMBINE.adjoint is StepKind.NODE_COMBINE_BACKWARD


def test_a_kind_is_equal_to_its_name() -> None:
    """Reports are read by name, timing.step.kind == "experts", say, and so are tables of costs."""
    assert StepKind.EXPERTS == "experts"
    assert {StepKind.EXPERTS: 1}["experts"] == {"experts": 1}[StepKind.EXPERTS]
    assert json.dumps({StepKind.EXPERTS: StepKind.WEIGHT_GRAD}) == '{"experts": "weight_grad"}'
    with pytest.raises(ValueError, match="expert"):
        StepKind.named("expert")


@pytest.mark.parametrize("plan", [OverlapPlan(), OverlapPlan((1, 2, 1), window=1), OverlapPlan((1, 1), serial=True)])
def test_phases_of_a_pass(plan: OverlapPlan) -> None:
    """Between them another half of a batch runs: exchanges are posted before it, and waited for behind it."""
    passes = [build_forward(plan, num_fillers=2)]
    passes += [build_backward(plan, needs_x=x, needs_topk_weights=w) for x in (True, False) for w in (True, False)]
    for schedule in passes:
        first, second = phase_ends(schedule)
        posts, computes, sums = schedule[:first], schedule[first:second], schedule[second:]
        assert all(step.lane == "comm" or step.kind is StepKind.FILLER for step in posts)
        assert not any(step.after for step in posts)
        assert all(step.kind.is_sum_of_returned for step in sums)
        assert any(step.lane == "compute" for step in computes)
    assert passes[0][0].kind is StepKind.METADATA
