"""What a rank is told of another one that leaves no notice where it is waited for."""

import threading
import time

import pytest
import torch.distributed as dist

from tritonmoe.transports import breakdown as breakdowns
from tritonmoe.transports import notices, waiting
from tritonmoe.transports.breakdown import Breakdown
from tritonmoe.transports.notices import Notice, Notices
from tritonmoe.transports.waiting import LongWait, wait_aloud


@pytest.mark.parametrize(
    ("is_earlier", "words"),
    [(True, "rank 1 gave no sign: it is late"), (False, "rank 1 closed its transport in transport 0 of this group")],
)
def test_a_late_rank_is_not_blamed_for_an_earlier_transport(
    is_earlier: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it left of one is told where it had made this transport before: then it makes the calls of the other."""
    for module in (notices, breakdowns):
        monkeypatch.setattr(module, "GRACE_S", 0.1)
    store = dist.HashStore()
    waiting, first = Notices(store, 0, 2, 1), Notices(store, 1, 2, 0)
    if not is_earlier:
        Notices(store, 1, 2, 1)
    first.put_up(Notice(0, 0, "closed its transport"))
    if is_earlier:
        Notices(store, 1, 2, 1)
    breakdown = Breakdown(waiting, 0, 0)
    assert breakdown.claim()
    breakdown.note("has not heard from ranks [1]", [1])
    assert breakdown.explain().startswith(f"rank 0 has not heard from ranks [1]; {words}")


class SilentStore:
    """A store whose host stands still."""

    def __init__(self) -> None:
        self.asked = 0

    def set(self, *_: object) -> None:
        self.asked += 1
        time.sleep(3600)

    get = check = set


def test_a_store_that_stands_still_prolongs_a_wait_once_and_little(monkeypatch, caplog) -> None:
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.2)
    monkeypatch.setattr(waiting, "TIMES_LONGER", 1.5)
    monkeypatch.setattr(notices, "WORDS_S", 0.4)
    store = SilentStore()
    asking = Notices(store, 0, 64, 0)
    for seconds in (1.0, 0.1):
        long = LongWait(
            "rank 0 of 64",
            lambda: asking.whom(range(1, 64), 0, 1),
            "an exchange",
            seconds,
            lambda words: asking.show_wait(0, 1, words),
        )
        started = time.perf_counter()
        assert not wait_aloud(threading.Event().wait, long, seconds)
        assert time.perf_counter() - started < seconds + 1
    assert store.asked == 1
    assert "for ranks [1, 2, 3" in caplog.text


def test_all_ranks_are_asked_for_by_one_question(monkeypatch) -> None:
    store, questions = dist.HashStore(), []
    ranks = [Notices(store, rank, 4, 0) for rank in range(4)]
    ranks[1].show_wait(0, 7, "an exchange")
    ranks[2].show_wait(0, 8, "another one")
    ask = ranks[0]._ask
    monkeypatch.setattr(ranks[0], "_ask", lambda *given: questions.append(given) or ask(*given))
    assert ranks[0].whom([1, 2, 3], 0, 7) == "ranks [2, 3] (rank 2 waits in: another one)"
    assert len(questions) == 1
