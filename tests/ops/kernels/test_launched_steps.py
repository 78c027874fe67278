"""What whole steps launch: nothing is compiled anew in the middle of training, and warmup compiles it all."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia.compiler")


def launched(what):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "launched_steps.py"), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.thorough
def test_wherever_chunks_are_cut_nothing_is_compiled_anew():
    """Chunks begin at any pair and row: only some of them at multiples of 16 bytes of indices and weights."""
    first, *others = launched("chunks")
    assert all(step == first for step in others)
    kernels = Counter(name.split()[0] for name in first)
    assert kernels.pop("_grouped_matmul_kernel") == 2  # down and up_grad
    assert kernels.pop("_gather_sum_kernel") == 3  # weighted, plain, and of the gradients of the weights
    assert kernels.pop("_outer_sums_kernel") == 2
    assert kernels.pop("_bias_grad_kernel") == 2
    assert set(kernels.values()) == {1}


@pytest.mark.thorough
def test_whatever_the_number_of_tokens_no_router_is_compiled_anew():
    first, *others = launched("router")
    assert len(first) == 6
    assert all(step == first for step in others)


@pytest.mark.thorough
def test_warmup_compiles_all_that_steps_launch():
    """In training and inference, recomputing h or not, adding to main_grad or not, in every class of tiles."""
    for name, found in launched("warmup").items():
        assert len(found["steps"]) > 50
        assert not set(found["steps"]) - set(found["warmup"]), name


@pytest.mark.thorough
def test_launches_find_what_warmup_compiled():
    found = launched("cache_entries")
    assert len(set(found["launch"])) > 10
    assert found["launch"] == found["warmup"]


@pytest.mark.thorough
def test_warmup_on_a_gpu_that_kernels_are_not_checked_for():
    found = launched("warmup_of_an_untested_gpu")
    count = len(found["said"])
    assert count == len(set(found["tried"])) > 20
    assert [line.split("]")[0] for line in found["said"]] == [f"[{n}/{count}" for n in range(1, count + 1)]
    assert [line.split(": ", 1)[1] for line in found["said"][:3]] == [
        "compiled for sm_75",
        "RuntimeError: out of registers",
        "compiled for sm_75",
    ]
    assert found["status"] == 1
