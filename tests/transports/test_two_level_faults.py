"""The same faults on two levels, on emulated ranks and in gloo processes: everybody says rank, step and chunk."""

import re

import pytest
import torch
from fault_cases import (
    DAMAGED,
    NODE_SIZE,
    QUICK_TWO_LEVEL_CASES,
    TIMEOUT_S,
    TWO_LEVEL_EXCHANGES,
    TWO_LEVEL_SIZE,
    corrupted_counts,
    different_chunks,
    different_layer_order,
    fails_in_backward_experts,
    fails_in_experts,
    step,
)
from test_emulated_faults import QUICK_S, Killed, heard_by, interrupts_in
from test_process_faults import LATE_S, SLACK_S, ranks_of

import tritonmoe as tm
from tritonmoe.transports import Death, Delay, TwoLevelTransport

pytestmark = pytest.mark.alone
SIZE, VICTIM = TWO_LEVEL_SIZE, TWO_LEVEL_SIZE - 1
SURVIVORS = range(VICTIM)


def on_two_levels(fn):
    return lambda world: fn(TwoLevelTransport(world, NODE_SIZE))


def heard_on_two_levels(fn, **options) -> list[str]:
    heard = heard_by(on_two_levels(fn), size=SIZE, **options)
    values = tm.run_on_emulated_ranks(on_two_levels(step), SIZE)
    assert all(map(torch.isfinite, map(torch.tensor, values)))
    return heard


HEARD_INSIDE = {
    "dispatch 0": "node_metadata",
    "dispatch 1": "node_metadata",
    "combine 0": "node_dispatch 1",
    "combine 1": "node_dispatch local end",
    "combine_backward 0": "node_combine_backward local",
    "combine_backward 1": "node_combine_backward local",
    "dispatch_backward 0": "node_combine_backward 1",
}
"""Exchanges between nodes during which one inside is waited for, which the killed rank doesn't come to either."""


def where(exchange: str) -> str:
    """Return how the error of an exchange begins."""
    if exchange == "counts":
        return "count exchange of layer call 0, before any chunk: "
    kind, _, chunk = HEARD_INSIDE.get(exchange, exchange).partition(" ")
    words = {"": "all chunks", "local": "local rows", "local end": "local rows"}.get(chunk, f"chunk {chunk}")
    inside = f"step {kind}, {words}: "
    if not kind.startswith("node_"):
        return inside
    outer = "group" if kind == "node_metadata" else "experts_backward" if kind.endswith("backward") else "experts"
    return f"step {outer}, {words}: {inside}"


def on_rank(rank: int, exchange: str) -> str:
    """Return how a rank's whole error begins."""
    if exchange == "counts":
        return f"^TransportError: {where(exchange)}"
    if exchange == "backward counts":
        return f"^TransportError: rank {rank} of {SIZE} on two levels: before the backward of layer 0, call 0: "
    return f"^TransportError: rank {rank} of {SIZE} on two levels: {where(exchange)}"


@pytest.mark.parametrize("exchange", TWO_LEVEL_EXCHANGES)
def test_a_killed_rank(exchange: str) -> None:
    heard = heard_on_two_levels(step, faults=[Death(VICTIM, TWO_LEVEL_EXCHANGES.index(exchange))])
    assert heard[VICTIM].startswith("RankStopped")
    for rank in SURVIVORS:
        assert re.search(f"{on_rank(rank, exchange)}exchange .*rank {VICTIM} failed", heard[rank]), heard


@pytest.mark.parametrize(
    ("fails", "exchange"),
    [(fails_in_experts, "node_combine local"), (fails_in_backward_experts, "node_dispatch_backward local")],
)
def test_a_rank_killed_in_experts(fails, exchange: str) -> None:
    def die() -> None:
        raise Killed

    heard = heard_on_two_levels(fails(die), raised=Killed)
    assert heard[VICTIM] == "Killed: "
    for rank in SURVIVORS:
        assert re.search(f"{on_rank(rank, exchange)}.*rank {VICTIM} failed with Killed", heard[rank]), heard


LATE = [
    ("node_combine 0", 0.6),
    *(pytest.param("node_combine 0", seconds, marks=pytest.mark.slow) for seconds in (1.0, 5.0, 30.0)),
]


@pytest.mark.parametrize(("exchange", "late_s"), LATE)
def test_late_ranks(exchange: str, late_s: float) -> None:
    expected = tm.run_on_emulated_ranks(on_two_levels(step), SIZE)
    options = {"faults": [Delay(VICTIM, TWO_LEVEL_EXCHANGES.index(exchange), late_s)]}
    assert tm.run_on_emulated_ranks(on_two_levels(step), SIZE, timeout_s=late_s + QUICK_S, **options) == expected
    heard = heard_on_two_levels(step, timeout_s=late_s / 3, quick_s=late_s + QUICK_S, **options)
    for rank in SURVIVORS:
        assert re.search(rf"{on_rank(rank, exchange)}.*has not heard from ranks \[{VICTIM}\]", heard[rank]), heard
    assert re.search(f"^TransportError: rank {VICTIM} of {SIZE} on two levels: step .*, .*: ", heard[VICTIM]), heard


def test_corrupted_counts() -> None:
    heard = heard_on_two_levels(corrupted_counts)
    assert heard[VICTIM].startswith(f"CountMismatch: rank {VICTIM} got counts of rank {DAMAGED} that contradict each")
    for rank in SURVIVORS:
        assert re.search(f"{on_rank(rank, 'metadata')}.*rank {VICTIM} failed with CountMismatch", heard[rank]), heard


DISAGREEMENTS = [
    (different_chunks, "the ranks disagree on num_chunks .*rank 0: 2, rank 1: 2, rank 2: 2, rank 3: 3"),
    (
        different_layer_order,
        "the ranks disagree on which call this is .*rank 2: forward of layer 0, .*rank 3: forward of layer 1,",
    ),
]


@pytest.mark.parametrize(("fn", "words"), DISAGREEMENTS)
def test_ranks_that_disagree(fn, words: str) -> None:
    for heard in heard_on_two_levels(fn):
        assert re.search(f"^CountMismatch: {words}", heard), heard


def test_control_c() -> None:
    heard = heard_on_two_levels(interrupts_in("node_dispatch 0"), raised=KeyboardInterrupt)
    for rank in SURVIVORS:
        words = f"exchange .* was cut off: .* interrupted by KeyboardInterrupt .rank {rank} of {SIZE}"
        assert re.search(on_rank(rank, "node_dispatch 0") + words, heard[rank]), heard


# gloo processes


def ranks_on_two_levels(name: str, *late_s: str):
    """Return what the ranks heard, from the run of all cases where the short one leaves this one out."""
    return ranks_of(name, "quick two" if name in QUICK_TWO_LEVEL_CASES and not late_s else "two", *late_s)


def cases(*names_and_more: tuple):
    """Leave them to later tiers."""
    return [
        pytest.param(*case, marks=pytest.mark.thorough if case[0] in QUICK_TWO_LEVEL_CASES else pytest.mark.slow)
        for case in names_and_more
    ]


@pytest.mark.parametrize(
    ("name", "neighbour", "words"),
    cases(
        # Rank 1 has the victim's place in the other node, rank 2 is in its node.
        ("killed_in_dispatch", 1, "step dispatch, chunk [01]: exchange"),
        ("killed_in_node_dispatch", 2, "step experts, chunk ([01]): step node_dispatch, chunk \\1: exchange"),
        ("killed_in_experts", 2, "step experts, local rows: step node_combine, local rows: exchange"),
        ("killed_in_node_combine", 2, "step experts, chunk ([01]): step node_combine, chunk \\1: exchange"),
        ("killed_in_combine", 1, "step combine, chunk [01]: exchange"),
        ("killed_in_backward", 1, "step combine_backward, chunk [01]: exchange"),
        ("killed_in_node_backward", 2, "step experts_backward, chunk 0: step node_combine_backward, chunk 0: exchange"),
        ("killed_in_backward_experts", 2, "step experts_backward, local rows: step node_dispatch_backward, local rows"),
        (
            "killed_in_node_dispatch_backward",
            2,
            "step experts_backward, chunk ([01]): step node_dispatch_backward, chunk \\1: exchange",
        ),
    ),
)
def test_a_killed_process(name: str, neighbour: int, words: str) -> None:
    """The others hear of it from the rank itself, or from one that has ended because of it."""
    ranks = ranks_on_two_levels(name)
    assert ranks[VICTIM] is None
    for rank in SURVIVORS:
        assert ranks[rank]["error"] == "TransportError", ranks
        begins = f"^rank {rank} of {SIZE} on two levels: "
        anywhere = "step [a-z_]+, (chunk [01]|local rows|all chunks): .*rank [01] of 2"
        assert re.search(begins + anywhere, ranks[rank]["words"]), ranks
        assert ranks[rank]["seconds"] < 0.5 + TIMEOUT_S + SLACK_S
        if rank == neighbour:
            assert re.search(begins + words, ranks[rank]["words"]), ranks


SLOWLY_LATE = [pytest.param((seconds,), marks=pytest.mark.slow, id=f"{seconds} s") for seconds in ("1", "5", "30")]


@pytest.mark.parametrize("late_s", [pytest.param((), marks=pytest.mark.thorough), *SLOWLY_LATE])
def test_a_late_process_changes_nothing(late_s: tuple[str, ...]) -> None:
    healthy, late = (ranks_on_two_levels(name, *late_s) for name in ("healthy", "late"))
    for rank in range(SIZE):
        assert "error" not in healthy[rank], healthy
        assert late[rank]["value"] == healthy[rank]["value"]
    assert max(late[rank]["seconds"] for rank in SURVIVORS) > 0.9 * (float(*late_s) or LATE_S)


@pytest.mark.parametrize("late_s", [pytest.param((), marks=pytest.mark.slow), *SLOWLY_LATE])
def test_a_process_that_is_later_than_the_timeout(late_s: tuple[str, ...]) -> None:
    ranks, timeout_s = ranks_on_two_levels("too_late", *late_s), float(*late_s) / 2 or TIMEOUT_S
    for rank in range(SIZE):
        assert re.search(f"^rank {rank} of {SIZE} on two levels: step [a-z]+, .*: ", ranks[rank]["words"]), ranks
    for rank in SURVIVORS:
        assert 0.9 * timeout_s < ranks[rank]["seconds"] < timeout_s + SLACK_S


@pytest.mark.thorough
def test_corrupted_counts_of_a_process() -> None:
    ranks = ranks_on_two_levels("corrupted_counts")
    assert ranks[VICTIM]["error"] == "CountMismatch"
    words = f"^rank {VICTIM} got counts of rank {DAMAGED} that contradict each other: by segment .* rows to relay"
    assert re.search(words, ranks[VICTIM]["words"]), ranks
    for rank in SURVIVORS:
        begins = f"^rank {rank} of {SIZE} on two levels: step (metadata|group), all chunks: "
        assert re.search(begins, ranks[rank]["words"]), ranks
        assert ranks[rank]["seconds"] < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize(("name", "words"), cases(*((fn.__name__, words) for fn, words in DISAGREEMENTS)))
def test_processes_that_disagree(name: str, words: str) -> None:
    for result in ranks_on_two_levels(name):
        assert result["error"] == "CountMismatch"
        assert re.search(words, result["words"]), result


@pytest.mark.thorough
def test_control_c_in_processes() -> None:
    for result in ranks_on_two_levels("interrupted"):
        assert result["error"] == "KeyboardInterrupt", result
        assert result["seconds"] < LATE_S + SLACK_S


@pytest.mark.parametrize(("name", "error"), cases(("full_disk", "OSError"), ("one_interrupted", "KeyboardInterrupt")))
def test_one_process_that_ends(name: str, error: str) -> None:
    ranks = ranks_on_two_levels(name)
    assert ranks[VICTIM]["error"] == error
    for rank in SURVIVORS:
        in_call_1 = f"count exchange of layer call 1, before any chunk: .*rank {rank} of {SIZE}"
        in_call_0 = f"rank {rank} of {SIZE} on two levels: step [a-z]+, (chunk [01]|all chunks): "
        assert re.search("^" + (in_call_1 if name == "full_disk" else in_call_0), ranks[rank]["words"]), ranks
        assert ranks[rank]["seconds"] < LATE_S + TIMEOUT_S + SLACK_S
