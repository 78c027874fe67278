"""The verdict of `tritonmoe bench overlap`: one sentence, right in every case, the same for the same figures."""

import pytest

from tritonmoe.tools.benchmarks.overlap_report import verdict
from tritonmoe.tools.benchmarks.timing import summarize

NOWHERE = [[9, 0], [0, 9]]


def verdict_of(
    compute: float,
    communication: float,
    serial: float,
    overlapped: float,
    *,
    auto: float | None = None,
    pass_bound: float = 0.0,
    rounds: int = 5,
    spread: float = 0.01,
    emulated: bool = False,
    rows: list[list[int]] | None = None,
) -> dict:
    """Return the verdict of these medians in ms, whose rounds go from 1 - spread to 1 + spread of them."""

    def times(median_ms: float, variant: str = "") -> dict:
        factors = [1 + spread * (2 * n / (rounds - 1) - 1) if rounds > 1 else 1.0 for n in range(rounds)]
        return {"variant": variant, **summarize([median_ms / 1e3 * factor for factor in factors])}

    summary = {
        "T_compute": times(compute),
        "T_communication": times(communication),
        "T_pass_bound": times(max(pass_bound, compute, communication)),
        "T_serial": times(serial, "serial C=2"),
        "overlapped": times(overlapped, "overlapped C=4"),
        "auto": times(overlapped if auto is None else auto, "auto"),
    }
    return verdict({"summary": summary, "traffic_rows": rows or [[9, 4], [4, 9]], "emulated": emulated})


def test_compute_bound() -> None:
    found = verdict_of(408.0, 21.0, 429.0, 416.0, auto=418.0, spread=0.005)
    assert found["text"] == (
        "Exchanges take 21.0 ms beside 408 ms of compute: of the 429 ms in series overlap can gain at most 5 % here; "
        "overlapped C=4 gained 3 %, auto gained 3 %."
    )
    assert found["case"] == "gained"
    assert found["possible_gain"] == pytest.approx(21 / 429, abs=1e-4)
    assert found["gain"] == pytest.approx(13 / 429, abs=1e-4)
    assert found["auto_gain"] == pytest.approx(11 / 429, abs=1e-4)


def test_a_bound_of_parts_that_the_rounds_do_not_tell_says_so() -> None:
    """The table marks their ratios, too. Parts that are shorter together than in series are what it is a share of."""
    text = verdict_of(100.0, 60.0, 170.0, 120.0, spread=0.6)["text"]
    assert (
        "of the 160 ms of both parts together overlap can gain at most 38 % here (too noisy: T_communication took "
        "33.0 ms to 87.0 ms and T_compute took 55.0 ms to 145 ms in the middle half of the rounds); "
    ) in text
    assert "too noisy" not in verdict_of(100.0, 60.0, 160.0, 120.0)["text"]


def test_communication_bound() -> None:
    assert verdict_of(50.0, 400.0, 450.0, 430.0)["text"] == (
        "Compute takes 50.0 ms beside 400 ms of exchanges: of the 450 ms in series overlap can gain at most 11 % here; "
        "overlapped C=4 gained 4 %, auto gained 4 %."
    )


def test_hidden() -> None:
    found = verdict_of(200.0, 50.0, 250.0, 203.0, auto=257.0)
    assert found["case"] == "hidden"
    assert found["text"].endswith(
        "overlapped C=4 gained 19 %, auto lost 3 %: overlapped C=4 gained next to all that overlap can gain."
    )
    # A call at its bound, as well as that can be measured.
    assert verdict_of(200.0, 50.0, 250.0, 199.0)["case"] == "hidden"


def test_a_backward_cannot_hide_what_the_forward_exposes() -> None:
    found = verdict_of(100.0, 100.0, 200.0, 125.0, pass_bound=117.0)
    assert found["possible_gain"] == pytest.approx(0.415)
    assert "can gain at most 42 % here (each pass by itself); overlapped C=4 gained 38 %" in found["text"]


def test_slower_than_in_series() -> None:
    found = verdict_of(400.0, 4.0, 404.0, 440.0, auto=404.0)
    assert (found["case"], found["gain"]) == ("lost", pytest.approx(-0.0891))
    assert found["text"].endswith(
        "at most 1.0 % here; but overlapped C=4 lost 9 %, auto nothing that can be told from the noise: "
        "serial C=2 is the fastest."
    )
    assert found["auto_gain"] is None


def test_auto_alone_is_the_fastest() -> None:
    found = verdict_of(100.0, 50.0, 140.0, 150.0, auto=130.0)
    assert (found["case"], found["auto_gain"]) == ("lost", pytest.approx(0.0714))
    assert found["text"].endswith("but overlapped C=4 lost 7 %, auto gained 7 %: auto is the fastest.")


def test_a_gain_above_what_is_possible_is_all_of_it() -> None:
    found = verdict_of(400.0, 1.0, 401.0, 397.0, spread=0.001)
    assert found["case"] == "hidden"
    assert found["text"].endswith(
        "overlap can gain at most 0.2 % here; overlapped C=4 gained all of it, auto gained all of it: "
        "overlapped C=4 gained next to all that overlap can gain."
    )


def test_an_auto_that_cannot_be_has_no_gain() -> None:
    assert verdict_of(100.0, 50.0, 150.0, 120.0, auto=90.0)["auto_gain"] is None


def test_what_noise_hides_is_not_said() -> None:
    found = verdict_of(408.0, 21.0, 429.0, 416.0, spread=0.1)
    assert (found["case"], found["gain"]) == ("noise", None)
    assert found["possible_gain"] == pytest.approx(21 / 429, abs=1e-4)
    assert (
        "can gain at most 5 % here; what it gained can't be told from the noise, overlapped C=4 took" in found["text"]
    )
    assert found["text"].endswith(
        "of the rounds: measure more rounds (--rounds), on an idle machine, or a larger layer (--tokens, --model)."
    )


def test_faster_than_its_bound() -> None:
    found = verdict_of(408.0, 21.0, 429.0, 350.0)
    assert (found["case"], found["gain"], found["auto_gain"]) == ("too fast", None, None)
    assert "can't be told, for overlapped C=4 took 350 ms, less than the 408 ms of its bound" in found["text"]


def test_a_time_in_series_that_cannot_be() -> None:
    found = verdict_of(408.0, 21.0, 390.0, 380.0)
    assert (found["case"], found["possible_gain"], found["gain"]) == ("no bound", None, None)
    assert "both in turn took 390 ms, which is too short to be true" in found["text"]


def test_a_time_in_series_that_its_parts_do_not_allow() -> None:
    """Two ranks on shared cores: 46 and 58 ms, and 128 in turn. A bound of 55 % is none that the parts allow."""
    found = verdict_of(46.0, 58.0, 128.0, 95.0, spread=0.05, emulated=True)
    assert (found["case"], found["possible_gain"], found["gain"]) == ("series too long", None, None)
    assert found["text"] == (
        "On this emulated link compute takes 46.0 ms beside 58.0 ms of exchanges, but both in turn took 128 ms (123 ms "
        "to 133 ms in the middle half of the rounds), more than the 104 ms of both together. So how much overlap can "
        "gain can't be told: at every exchange the ranks wait for the slowest one, and where ranks share cores, with "
        "each other or with other programs, these waits are in neither part; measure more rounds (--rounds), on an "
        "idle machine, or a larger layer (--tokens, --model)."
    )


def test_no_bound_is_above_what_the_parts_allow() -> None:
    """Within the noise, but longer than the parts: what can be gained is said of the parts."""
    found = verdict_of(46.0, 58.0, 128.0, 95.0, spread=0.3, pass_bound=60.0)
    assert found["possible_gain"] == pytest.approx(1 - 60 / 104, abs=1e-4)
    assert "can gain at most 42 % here" in found["text"]
    # A time in series that is shorter has what both parts do once only.
    assert verdict_of(46.0, 58.0, 100.0, 80.0)["possible_gain"] == pytest.approx(0.42)


@pytest.mark.parametrize(("rounds", "words"), [(1, "1 round can't tell"), (2, "2 rounds can't tell")])
def test_few_rounds(rounds: int, words: str) -> None:
    found = verdict_of(400.0, 200.0, 600.0, 480.0, rounds=rounds)
    assert (found["case"], found["gain"]) == ("few rounds", None)
    assert words in found["text"]
    assert verdict_of(400.0, 200.0, 600.0, 480.0, rounds=3)["case"] == "gained"


def test_nothing_travels() -> None:
    assert verdict_of(400.0, 2.0, 402.0, 401.0, rows=NOWHERE) == {
        "case": "no exchange",
        "text": "No rows travel between the ranks with this routing: there is nothing to hide.",
        "possible_gain": None,
        "gain": None,
        "auto_gain": None,
    }


def test_an_emulated_link_is_named() -> None:
    emulated, real = (verdict_of(408.0, 21.0, 429.0, 416.0, emulated=flag) for flag in (True, False))
    assert emulated["text"].startswith("On this emulated link exchanges take 21.0 ms beside 408 ms of compute: of the")
    assert "emulated" not in real["text"]
    assert emulated | {"text": ""} == real | {"text": ""}
