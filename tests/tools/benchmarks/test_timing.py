"""Variants in turn: who leaves early, by a clock that passes only where a variant says so."""

from collections.abc import Callable

import pytest

from tritonmoe.tools.benchmarks import timing
from tritonmoe.tools.benchmarks.timing import OUTSIDER_ROUNDS, interleave


def test_a_variant_that_is_only_a_bound_makes_none_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def lasting(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    variants = {"ours": lasting(0.5), "slow": lasting(1.5), "bound": lasting(0.1)}
    rounds = OUTSIDER_ROUNDS + 4
    found = interleave(variants, rounds, bounds=["bound"])
    assert {name: len(seconds) for name, seconds in found.items()} == {
        "ours": rounds,
        "slow": OUTSIDER_ROUNDS,
        "bound": rounds,
    }
    assert found["ours"] == pytest.approx([0.5] * rounds)
    assert len(interleave(variants, rounds)["ours"]) == OUTSIDER_ROUNDS
