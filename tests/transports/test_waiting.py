"""A rank that waits long says for whom and for what: emulated ranks here, gloo processes in waiting_worker.py."""

import re
import threading
import time
from pathlib import Path

import pytest
import torch
from processes import run_torchrun

import tritonmoe as tm
from tritonmoe.transports import Delay, waiting
from tritonmoe.transports.waiting import Doing, LongWait, wait_aloud, watched

CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=8, num_experts=6, top_k=2)
WORKER = Path(__file__).parent / "waiting_worker.py"
CASES = (
    *("parallelize", "forward", "rows", "backward", "all_reduce", "barrier", "clip_grad_norm_", "torchs_clipping"),
    *("state_dict", "one_state_dict", "replicas", "rebuild"),
)


def step(transport) -> None:
    layer = tm.MoELayer(CONFIG, transport, tm.OverlapConfig(1), generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(transport.rank))
    layer(x).sum().backward()
    transport.barrier()


EXCHANGES = (
    "the count exchange of the forward of layer 0, call 0",
    *("step metadata, all chunks, of layer 0, call 0", "step dispatch, chunk 0, of layer 0, call 0"),
    "step combine, chunk 0, of layer 0, call 0",
    "the agreement on the backward of layer 0, call 0",
    "step combine_backward, chunk 0, of layer 0, call 0",
)


@pytest.mark.parametrize("number", range(len(EXCHANGES)))
def test_it_says_which_exchange(number, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.1)
    tm.run_on_emulated_ranks(step, 3, faults=[Delay(1, number, 0.5)], timeout_s=20)
    said = {re.sub(r"waited \S+ s", "waited S s", text) for text in caplog.messages}
    ending = "It raises after timeout_s = 20. Every rank must make the same calls, in the same order"
    rest = f"of 3 has waited S s in: {EXCHANGES[number]}, for ranks [1]. {ending}"
    assert said >= {f"rank {rank} {rest}" for rank in (0, 2)}


def test_nothing_is_said_of_short_waits(caplog):
    tm.run_on_emulated_ranks(step, 2, faults=[Delay(1, 0, 0.2)])
    assert not caplog.messages


def test_rebuild_says_who_is_absent(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.1)

    def rebuilds(transport):
        time.sleep(0.5 * (transport.rank == 2))
        transport.rebuild()

    tm.run_on_emulated_ranks(rebuilds, 3)
    assert any("in: rebuild(), for ranks [2]" in text for text in caplog.messages)


def test_it_says_so_again_rarely(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.02)
    monkeypatch.setattr(waiting, "TIMES_LONGER", 4.0)
    shown = []
    with Doing(lambda: "a call"), Doing(lambda: "a part of it"):
        long = LongWait("rank 0 of 2", lambda: "ranks [1]", "an exchange", 0.2, shown.append)
        assert not wait_aloud(threading.Event().wait, long, 0.2)
    assert 1 <= len(caplog.messages) <= 2  # after 0.02 and 0.08 s, or once on a busy machine
    assert all("in: a call, a part of it, for ranks [1]. It raises after timeout_s = 0.2" in t for t in caplog.messages)
    assert shown == ["a call, a part of it", ""]
    over = threading.Event()
    over.set()
    assert wait_aloud(over.wait, LongWait("rank 0 of 2", lambda: "ranks [1]", "an exchange"), 0.2)


def test_a_thread_says_it_of_what_cannot(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.05)
    for _ in range(2):
        with watched(LongWait("rank 0 of 2", lambda: "ranks [1]", "a sum")):
            time.sleep(0.25)
    assert ["in: a sum, for ranks [1]. It goes on waiting" in text for text in caplog.messages] == [True, True]
    assert not waiting._watched


@pytest.mark.thorough
def test_processes_say_it():
    run_torchrun(3, WORKER, cases=CASES)
