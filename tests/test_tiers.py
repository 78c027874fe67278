"""The first tier of a sweep shows every value, or every pair of values, in few cases; files that cost much say why."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiers import COSTLY_FILES, MOST_CPU_SECONDS, covering, left_out

SIZES = {"backend": 3, "layout": 4, "dtype": 2}
CASES = [tuple(zip(SIZES, case, strict=True)) for case in itertools.product(*map(range, SIZES.values()))]


@pytest.mark.parametrize(("strength", "most"), [(1, 4), (2, 13), (3, 24)])
def test_every_combination_is_shown(strength: int, most: int) -> None:
    chosen = covering(CASES, strength)
    shown = {combination for number in chosen for combination in itertools.combinations(CASES[number], strength)}
    assert shown == {combination for case in CASES for combination in itertools.combinations(case, strength)}
    assert len(chosen) <= most


def test_a_sweep_of_one_case_has_it() -> None:
    assert covering(CASES[5:6], 2) == {0}
    assert covering([(("backend", 0),), (("backend", 1),)], 2) == {0, 1}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("word", ["one", "two"])
def test_a_sweep_leaves_cases_to_the_second_tier(number: int, word: str, request: pytest.FixtureRequest) -> None:
    cases = [item for item in request.session.items if item.originalname == request.node.originalname]
    assert len(cases) in (3, 6)  # of a tier, or of both
    assert [tier for _, tier in left_out(cases)] == ["thorough"] * (len(cases) - 3)


class Case:
    """A case of a sweep of strength 1, as far as the tiers look at it."""

    nodeid = "test_file.py::test[case]"

    def __init__(self, params: tuple[tuple[str, int], ...], is_slow: bool = False) -> None:
        self.callspec = SimpleNamespace(params=dict(params))
        self.marks = {"sweep": SimpleNamespace(args=(1,))} | ({"slow": None} if is_slow else {})

    def get_closest_marker(self, name: str) -> object:
        return self.marks.get(name) or (name in self.marks)


def test_the_second_tier_shows_combinations_of_one_parameter_more() -> None:
    """What has a slow case of its own is shown by another one, where there is one."""
    cases = [Case(case, is_slow=number < 8) for number, case in enumerate(CASES)]
    tiers = left_out(cases)  # type: ignore[arg-type]
    second = [case.callspec.params for case, tier in tiers if tier == "thorough"]
    assert len(second) <= 12
    pairs = {pair for params in second for pair in itertools.combinations(params.items(), 2)}
    possible = {pair for case in CASES[8:] for pair in itertools.combinations(case, 2)}
    first = covering(CASES, 1)
    assert possible - {pair for number in first for pair in itertools.combinations(CASES[number], 2)} <= pairs
    assert len(cases) - len(first) - len(second) == sum(tier == "slow" for _, tier in left_out(cases))  # type: ignore[arg-type]


def test_a_file_that_costs_much_says_why() -> None:
    table = Path(__file__).with_name("cpu_seconds.json")
    costly = {name for name, seconds in json.loads(table.read_text()).items() if seconds > MOST_CPU_SECONDS}
    again = "`pytest --cpu-seconds tests/cpu_seconds.json FILES` measures files again"
    unsaid, needless = sorted(costly - COSTLY_FILES.keys()), sorted(COSTLY_FILES.keys() - costly)
    assert not unsaid, f"above {MOST_CPU_SECONDS} CPU seconds: thin them, or say why in COSTLY_FILES; {again}"
    assert not needless, f"COSTLY_FILES explains what costs little: take it out; {again}"
