"""Experts that a GPU's stream copies: every copy and product in order, and the bits of experts in memory.

On a CPU that stands in for a GPU whose copies are late (tests/support/late_device.py).
"""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from late_device import LateDevice
from test_offloading import FORMATS, compare, make_layer, step

import tritonmoe as tm
from tritonmoe.config.formats import WeightFormat


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    threads = torch.get_num_threads()
    with monkeypatch.context() as patched:
        late = LateDevice()
        late.install(patched)
        yield late
        gc.collect()
        torch.set_num_threads(threads)


def place_of(kind: str, folder: Path) -> Any:
    return "cpu" if kind == "cpu" else folder


@pytest.mark.sweep(1)
@pytest.mark.parametrize("num_tokens", [1, 40, 900])
@pytest.mark.parametrize("place", ["cpu", "folder"])
@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_bits_are_those_of_experts_in_memory(
    case: tuple[WeightFormat | None, torch.dtype], place: str, num_tokens: int, tmp_path: Path, device: LateDevice
) -> None:
    resident = make_layer(*case, bias=True)
    offloaded = copy.deepcopy(resident)
    done = tm.offload_experts(offloaded, place_of(place, tmp_path), resident_bytes=20_000)
    for seed in range(3):
        expected = step(resident, case[1], num_tokens, seed=seed)
        with device.computing():
            found = step(offloaded, case[1], num_tokens, seed=seed)
        compare(expected, found)
    device.check()
    assert done.reader()._allocated <= done.reader().limit_bytes
    if place == "cpu":
        assert not device.host_waits
