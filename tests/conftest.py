"""Test set-up: Triton's interpreter is on before anything imports triton; Ctrl-C works; tiers; who runs alone.

torch reads no compiled graph of an earlier state of this code back: its cache doesn't know the operators' schemas.
"""

import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ or any(argument.startswith("--virtual-gpu") for argument in sys.argv):
    # Read when torch and NumPy are imported. Every worker has one core, and a virtual GPU's matrices are small.
    os.environ["OMP_NUM_THREADS"] = "1"

import cpu_seconds
import pytest
import tiers
import torch
import turns
import uninitialised

from virtual_gpu import VIRTUAL_GPUS

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background; processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    help_text = "compile kernels for a GPU that isn't there, and run what was compiled in NumPy (tests/ops/kernels)"
    parser.addoption("--virtual-gpu", choices=VIRTUAL_GPUS, help=help_text)
    help_text = "write what each test file costs, in CPU seconds with its processes', into this JSON file"
    parser.addoption("--cpu-seconds", type=Path, help=help_text)


def pytest_configure(config):
    # Where it is set, each worker and each of the hundreds of processes of the tests compiles all modules again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    gc.disable()  # until everything is collected: what is imported stays
    if table := config.getoption("--cpu-seconds"):
        config.pluginmanager.register(cpu_seconds.CpuSeconds(table), "cpu_seconds")
    if not torch.cuda.is_available() and not config.getoption("--virtual-gpu"):
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") and "TRITON_INTERPRET" in os.environ:
        import interpreter

        interpreter.install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what the first tier leaves out of sweeps, before pytest looks at marks; begin with what takes longest."""
    for item, tier in tiers.left_out(items):
        item.add_marker(tier)
    items.sort(key=tiers.place)


def pytest_collection_finish():
    """Keep the garbage collector out of what collection has made: looking through it takes half a second."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let tests with real timeouts have all cores.

    A pytest that a test starts takes no turn: it is part of its test's, and would wait for itself.
    """
    run = getattr(item.config, "workerinput", {}).get("testrunuid")
    if run is None:
        return (yield)
    with turns.turn(run, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    turns.remove(node.workerinput["testrunuid"])


@pytest.fixture(scope="module")
def few_objects():
    """Freeze what tests before have left: each look for what lives goes through all objects that are not frozen."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nan_filled_memory():
    with uninitialised.nan_filled_memory():
        yield
