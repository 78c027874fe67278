"""Links between two ranks, measured alone."""

import pytest

import tritonmoe as tm
from tritonmoe.tools.cli import main
from tritonmoe.tools.cli.doctor import PairTimes, _turns, probe_pairs


def test_a_slow_link_is_found() -> None:
    link = tm.LinkModel(0.2, slow_links={(2, 0): 12.0})
    found = tm.run_on_emulated_ranks(probe_pairs, 3, link=link, timeout_s=60)
    assert found[0] == found[1] == found[2]
    sender, receiver, times = found[0].slow()[0]
    assert (sender, receiver) == (2, 0)
    assert times > 4
    assert "rank 2 to rank 0" in str(found[0])
    assert all(of_other < 3 for *_, of_other in found[0].slow()[1:]), "what a rank receives is not what it sends"


@pytest.mark.parametrize("size", range(2, 9))
def test_a_rank_sends_or_receives(size: int) -> None:
    sent = []
    for distance in range(1, size):
        for turn in _turns(size, distance):
            assert not set(turn) & set(turn.values())
            assert len(set(turn.values())) == len(turn)
            sent += list(turn.items())
    assert sorted(sent) == [(i, k) for i in range(size) for k in range(size) if i != k]


def test_words() -> None:
    alike = PairTimes([[0.0, 1e-5], [1e-5, 0.0]], [[0.0, 1e-9], [1e-9, 0.0]])
    assert str(alike).splitlines()[-1] == "no link is slower than the others by 15 %"
    assert not alike.slow()


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor", "--probe-links"]) == 2
    assert "needs torchrun" in capsys.readouterr().err
    assert main(["doctor"]) == 2
    assert "give the folder of a recording" in capsys.readouterr().err
