"""Ranks that disagree all raise, in time, and none is aborted; what is legal stays legal. Cases: agreement_cases.py."""

import functools
import json
import re
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import agreement_cases
import pytest
from agreement_cases import (
    CASES,
    DISAGREEMENTS,
    LEGAL,
    SHORT_TIMEOUT_S,
    TIMEOUT_S,
    layer_on,
    losses_of_two_layers,
    outcome,
    timeout_s,
    tokens,
)
from processes import run_processes

import tritonmoe as tm
from tritonmoe.expert_parallel import check as expert_parallel_check
from tritonmoe.expert_parallel import layer_pass
from tritonmoe.transports import Transport, TwoLevelTransport

SLACK_S = 10.0
"""For ranks that have to wait for a core, or import what checkpointing needs."""


@functools.cache
def in_processes() -> dict[str, list[Any]]:
    """Run all cases in one pair of processes; gives by case what each rank met."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended: object = run_processes(2, "gloo", agreement_cases.__file__, folder, timeout_s=120)
        except subprocess.TimeoutExpired as error:
            ended = error
        files = [Path(folder) / f"{rank}.json" for rank in range(2)]
        results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    not_reached = {"raised": f"not reached: {ended}", "seconds": 0.0}
    return {name: [result.get(name, not_reached) for result in results] for name in CASES}


def in_threads(name: str) -> list[Any]:
    return tm.run_on_emulated_ranks(lambda transport: outcome(CASES[name], transport), 2, timeout_s=timeout_s(name))


def heard(name: str, where: str) -> list[Any]:
    return in_processes()[name] if where == "gloo" else in_threads(name)


@pytest.mark.parametrize(
    ("name", "where"), [(name, where) for name in DISAGREEMENTS for where in DISAGREEMENTS[name].where]
)
def test_ranks_that_disagree(name: str, where: str) -> None:
    """Every rank hears the same, or at least why it was not alone to blame."""
    for met, words in zip(heard(name, where), DISAGREEMENTS[name].words, strict=True):
        assert re.search(words, met["raised"] or "nothing"), met
        assert met["seconds"] < 2 * SHORT_TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("where", ["gloo", "emulated"])
@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal(name: str, where: str) -> None:
    assert [met["raised"] for met in heard(name, where)] == [None, None]


def backward_in_another_order(world: Transport) -> None:
    """Rank 3 alone takes its losses in another order."""
    losses = losses_of_two_layers(TwoLevelTransport(world, 2))
    for loss in losses[::-1] if world.rank == 3 else losses:
        loss.backward()


def test_on_two_levels() -> None:
    met = tm.run_on_emulated_ranks(lambda world: outcome(backward_in_another_order, world), 4, timeout_s=TIMEOUT_S)
    for one in met:
        assert re.search("^CountMismatch: .*rank 2: backward of layer 0, .*rank 3: backward of layer 1,", one["raised"])


def test_one_rank_captures_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would exchange its flag on the device, where the other ranks' flags cross the host."""
    of_thread = threading.local()
    monkeypatch.setattr(expert_parallel_check, "is_captured", lambda device: of_thread.is_captured)
    words = r"on whether a CUDA graph captures this layer call \(rank 0: not captured, rank 1: captured\)"

    def on_rank(transport: Transport) -> None:
        of_thread.is_captured = transport.rank == 1
        with pytest.raises(tm.CountMismatch, match=words):
            layer_on(transport, overlap=tm.OverlapConfig(2, capacity=4.0))(tokens(transport))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_forward_tells_which_backwards_have_run(is_same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Had they not been compared themselves. Two layers of equal weights: their rows meet without a word."""
    monkeypatch.setattr(layer_pass, "post_backward", lambda *_: None)

    def fn(transport: Transport) -> None:
        layers, x = [layer_on(transport), layer_on(transport)], tokens(transport)
        losses = [layer(x).sum() for layer in layers]
        for loss in losses if is_same or transport.rank == 0 else losses[::-1]:
            loss.backward()
        layers[0](x)

    met = tm.run_on_emulated_ranks(lambda transport: outcome(fn, transport), 2, timeout_s=TIMEOUT_S)
    words = (
        "CountMismatch: the ranks disagree on the backwards that ran before this layer call, or their order "
        "(rank 0: 2, the latest of call 1, rank 1: 2, the latest of call 0): "
    )
    for one in met:
        assert one["raised"] is None if is_same else one["raised"].startswith(words), one
