"""The search of `tritonmoe tune`, on a time that is a formula."""

from tritonmoe.benchmarks.tuning import CHOICES, descend

START = {
    "block_m": 128,
    "block_n": 64,
    "block_k": 64,
    "num_warps": 8,
    "num_stages": 3,
    "group_m": 8,
    "subtiles": 1,
    "tma": True,
}


def search(seconds, **keywords):
    tries = list(descend(START, seconds, **keywords))
    return tries, tries[-1][2]


def test_finds_the_fastest_of_independent_fields():
    best = {"block_m": 64, "block_n": 256, "block_k": 32, "num_warps": 4, "num_stages": 5, "group_m": 1, "subtiles": 4}
    best["tma"] = False
    tries, found = search(lambda candidate: 1.0 + sum(candidate[name] != best[name] for name in best))
    assert found == best
    assert tries[0][0] == START
    tried = [tuple(candidate.items()) for candidate, _, _ in tries]
    assert len(set(tried)) == len(tried) <= 2 * sum(map(len, CHOICES.values()))


def test_keeps_the_start_when_nothing_is_faster():
    assert search(lambda candidate: 1.0)[1] == START


def test_what_cannot_run_is_never_chosen():
    def seconds(candidate):
        return None if candidate["block_n"] > 64 else 1.0 / candidate["block_n"]

    assert search(seconds)[1] == START


def test_a_start_that_cannot_run_is_left():
    _, found = search(lambda candidate: None if candidate == START else 1.0)
    assert found != START
