"""With --virtual-gpu the kernels are compiled for that GPU, and what was compiled runs in NumPy."""

import pytest
import torch

NEEDS_COMPILED_KERNELS = ("test_several_steps.py", "test_missing_waits.py")
"""test_compiled.py runs them: in the interpreter large tiles take minutes, and nothing is asynchronous."""


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--virtual-gpu"):
        return None
    on_gpu = torch.cuda.is_available() and collection_path.name != "test_missing_waits.py"
    return True if collection_path.name in NEEDS_COMPILED_KERNELS and not on_gpu else None


@pytest.fixture(autouse=True)
def virtual_gpu(request):
    """Return what changes the assembly of kernels before they run: a list of functions, empty at first."""
    name = request.config.getoption("--virtual-gpu")
    edits = []
    if not name:
        yield edits
        return
    from tritonmoe.ops import aot
    from tritonmoe.ops.kernels import launch
    from virtual_gpu.launcher import run_launch

    def run(caught):
        launches.clear()
        run_launch(caught, aot.TARGETS[name], *edits)

    with launch.recording(aot.TARGETS[name], run) as launches:
        yield edits


@pytest.fixture
def reads_by_tma(request):
    """Skip where the virtual GPU has no TMA, or none that gathers rows: others, and the interpreter, run the test."""
    name = request.config.getoption("--virtual-gpu") or ""
    gathers = "tma" in request.node.callspec.params.values() if hasattr(request.node, "callspec") else False
    if name == "sm_80" or name.startswith("gfx") or (gathers and name == "sm_90"):
        pytest.skip(f"{name} has no such TMA")
