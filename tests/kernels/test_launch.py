"""How kernels are launched: caught instead of run, and compiled once however many threads start together."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime.driver import driver

from tritonmoe import aot
from tritonmoe.backends import triton as kernels
from tritonmoe.kernels import launch

NUM_THREADS = 6


def test_a_caught_launch_runs_in_another_way_before_the_operation_goes_on():
    y, index = torch.randn(6, 16), torch.tensor([[0, 5], [2, 1], [3, 3]], dtype=torch.int32)
    ran = []

    def run(item):
        ran.append(item)
        out = next(arg for arg in item.args if isinstance(arg, torch.Tensor) and arg.shape == (3, 16))
        out.copy_(y[index].sum(1))

    with launch.recording(aot.TARGETS["sm_90"], run) as launches:
        assert torch.equal(kernels.gather_sum(y, index), y[index].sum(1))
    assert ran == launches
    assert len(ran) == 1


def fill(out, value, BLOCK):
    pass


class Device:
    """What `JITFunction.run` asks of the driver of a GPU."""

    def get_current_target(self):
        return aot.TARGETS["sm_90"]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """Collect what Triton would compile; each takes long enough for all threads to reach it."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    monkeypatch.setattr(driver, "_active", Device())
    state = SimpleNamespace(found=[], failures=0)
    program = SimpleNamespace(launch_metadata=lambda *args: None, run=lambda *args: None, function=0, packed_metadata=0)

    def compile_slowly(source, target, options):
        state.found.append(source.signature)
        time.sleep(0.2)
        if len(state.found) <= state.failures:
            raise RuntimeError("out of registers")
        return program

    monkeypatch.setattr(triton.compiler, "compile", compile_slowly)
    return state


def launch_together(kernel, *arguments):
    """Let every thread launch `kernel` once; give the errors."""
    errors, barrier = [], threading.Barrier(NUM_THREADS)

    def run():
        barrier.wait()
        try:
            launch.compiling_once(kernel)[(1,)](*arguments, BLOCK=16, num_warps=4)
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_that_launch_together_compile_once(compiled):
    kernel = triton.JITFunction(fill)
    out = torch.empty(64)
    assert not launch_together(kernel, out, 2.0)
    assert len(compiled.found) == 1
    launch_together(kernel, out[16:], 3.0)
    assert len(compiled.found) == 1
    launch_together(kernel, out.double(), 2.0)
    launch_together(kernel, out[1:], 2.0)  # another alignment
    assert len(compiled.found) == 3


def test_a_compilation_that_fails_is_tried_by_the_next_thread(compiled):
    compiled.failures = 1
    errors = launch_together(triton.JITFunction(fill), torch.empty(64), 2.0)
    assert [str(error) for error in errors] == ["out of registers"]
    assert len(compiled.found) == 2
