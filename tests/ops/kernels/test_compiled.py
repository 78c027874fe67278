"""What was compiled for each GPU gives the right values, and waits for all that is asynchronous: on a virtual GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from virtual_gpu import VIRTUAL_GPUS

TESTS = ("test_missing_waits.py", "test_several_steps.py")


def run(gpu, tmp_path, *arguments, tests=TESTS):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    files = [str(Path(__file__).parent / name) for name in tests]
    command = [sys.executable, "-m", "pytest", "-n", "0", f"--virtual-gpu={gpu}", *files, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)


SLOW_GPUS_WITH_CODES = [pytest.param(gpu, marks=pytest.mark.slow) for gpu in ("sm_100", "sm_120", "gfx950")]
ONE_OF_EACH_MAKER = ("sm_90", "gfx942")


def gpus(*in_the_second_tier):
    """Return the virtual GPUs as parameters of a test: all but these are slow."""
    return [
        pytest.param(gpu, marks=pytest.mark.thorough if gpu in in_the_second_tier else pytest.mark.slow)
        for gpu in VIRTUAL_GPUS
    ]


@pytest.mark.parametrize("gpu", gpus("sm_90", "sm_100", "gfx942"))
def test_one_layer_missing_waits_and_routers(gpu, tmp_path):
    """Routers on one GPU of each maker: tokens that are no numbers, odd rows, groups, ties."""
    chosen, tests, num_tests = "noticed or silu", TESTS, 2
    if gpu in ONE_OF_EACH_MAKER:
        chosen, tests, num_tests = f"{chosen} or fp16-odd or deepseek or ties", (*TESTS, "test_router_kernels.py"), 6
    result = run(gpu, tmp_path, "-k", chosen, tests=tests)
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(rf"\b{num_tests} passed", result.stdout), result.stdout[-3000:]


@pytest.mark.parametrize("gpu", gpus(*ONE_OF_EACH_MAKER))
def test_packed_weights(gpu, tmp_path):
    """Every code and scale of every format, along both axes, and all four products."""
    chosen = "-m", "not slow", "-k", "every_code or two_formats"
    result = run(gpu, tmp_path, *chosen, tests=("test_packed_tiles.py",))
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"\b8 passed", result.stdout), result.stdout[-3000:]


@pytest.mark.parametrize("gpu", [pytest.param("sm_90", marks=pytest.mark.thorough), *SLOW_GPUS_WITH_CODES])
def test_products_of_codes(gpu, tmp_path):
    """Every number's code, and sums of all four products with scales as different as they can be."""
    chosen = "-m", "not slow", "-k", "(every_number or rows or weights or sums or different or finite) and not layouts"
    result = run(gpu, tmp_path, *chosen, tests=("test_encode.py", "test_scaled_products.py"))
    assert result.returncode == 0, result.stdout[-3000:]
    num_tests = 9 + 5 if gpu == "sm_90" else 9 + 10  # sm_90 has no instruction for mxfp8
    assert re.search(rf"\b{num_tests} passed", result.stdout), result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["sm_90", "sm_100"])
def test_runs_of_tiles(gpu, tmp_path):
    result = run(gpu, tmp_path, tests=("test_tile_runs.py",))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", VIRTUAL_GPUS)
def test_all_packed_weights(gpu, tmp_path):
    """Every layout, height of tile and group of scales; whole layers too, with the gradients of adapters."""
    result = run(gpu, tmp_path, "-m", "not slow", tests=("test_packed_tiles.py",))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", VIRTUAL_GPUS)
def test_all_layers(gpu, tmp_path):
    result = run(gpu, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", VIRTUAL_GPUS)
def test_all_routers(gpu, tmp_path):
    result = run(gpu, tmp_path, tests=("test_router_kernels.py",))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.thorough
def test_unknown_gpu(tmp_path):
    result = run("sm_70", tmp_path)
    assert result.returncode == 4
    assert "invalid choice: 'sm_70'" in result.stderr
