"""bench.plan_ourselves counts how many schedules are ranked rightly."""

from bench.plan_ourselves import rank_pairs


def case(rate: str, predicted: float, measured: float) -> dict:
    return {"rate": rate, "predicted_ms": predicted, "measured": {"median_ms": measured}}


def test_pairs_of_one_rate_that_differ_enough_count():
    cases = [case("a", 1, 10), case("a", 2, 20), case("a", 3, 15), case("a", 9, 10.4), case("b", 9, 1)]
    # 10 : 20 right, 10 : 15 right, 20 : 15 wrong, 20 : 10.4 wrong, 15 : 10.4 wrong; 10 : 10.4 too alike.
    assert rank_pairs(cases) == (2, 5)
