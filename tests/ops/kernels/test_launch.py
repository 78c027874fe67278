"""How kernels are launched: caught instead of run, and compiled once however many threads start together."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from tritonmoe.ops import aot
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.kernels import compiled as compiled_kernels_module
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.compiled import compiled_kernels
from tritonmoe.ops.kernels.tiles import tma

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
    """What `JITFunction.run` asks of the driver of a GPU; each time that it asks for the target it gets it later."""

    def __init__(self, target="sm_90"):
        self.asked = itertools.count(1)
        self.target = aot.TARGETS[target]

    def get_current_target(self):
        time.sleep(0.05 * next(self.asked))
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Program:
    """What was compiled; Triton launches it by `run`, and so do we."""

    function = packed_metadata = 0

    def __init__(self, launched):
        self.launched = launched

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        self.launched.append((args[:3], args[9:]))  # the stream, the function and hooks stand between


@pytest.fixture
def compiled(monkeypatch):
    """Collect what Triton would compile; each takes long enough for all threads to reach it."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    monkeypatch.setattr(driver, "_active", Device())
    state = SimpleNamespace(found=[], failures=0, launched=[])

    def compile_slowly(source, target, options):
        state.found.append(source.signature)
        time.sleep(0.2)
        if len(state.found) <= state.failures:
            raise RuntimeError("out of registers")
        return Program(state.launched)

    monkeypatch.setattr(triton.compiler, "compile", compile_slowly)
    return state


def launch_together(kernel, *arguments):
    """Let every thread launch `kernel` once; give the errors."""
    errors, barrier = [], threading.Barrier(NUM_THREADS)

    def run():
        barrier.wait()
        try:
            compiled_kernels(kernel).launch(0, (1,), arguments, {"BLOCK": 16}, {"num_warps": 4})
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


def many(out, x, index, size, rows, scale, bias, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    pass


def test_a_kept_kernel_gets_the_same_arguments(compiled):
    kernel = compiled_kernels(triton.JITFunction(many))
    arguments = torch.empty(64), torch.empty(8), torch.empty(4, dtype=torch.int32), 48, 7, 0.5, None
    for _ in range(2):
        kernel.launch(0, (3, 2), arguments, {"BLOCK": 16, "ORDER": "rows"}, {"num_warps": 4})
    first, second = compiled.launched
    assert len(compiled.found) == 1
    assert first == second == ((3, 2, 1), (*arguments, "rows", 16))


@pytest.mark.parametrize("when", ["enter", "exit"])
def test_a_profiler_s_hooks_are_handed_on_and_empty_chains_are_not(compiled, when):
    """Triton would make the metadata of each launch for a chain of no hooks, and call the chain."""
    handed = []

    def run(*args):
        handed.append(args[6:9])  # metadata and both hooks

    kernel, arguments = compiled_kernels(triton.JITFunction(fill)), (torch.empty(64), 2.0)
    kernel.launch(0, (1,), arguments, {"BLOCK": 16}, {"num_warps": 4})
    ((key, (program, _, *others)),) = kernel.found.items()
    kernel.found[key] = program, run, *others
    program.launch_metadata = lambda grid, stream: ("metadata", grid, stream)
    kernel.launch(0, (1,), arguments, {"BLOCK": 16}, {"num_warps": 4})
    assert handed == [(None, None, None)]
    chains = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    chain = chains[when == "exit"]
    chain.add(print)
    try:
        kernel.launch(0, (1,), arguments, {"BLOCK": 16}, {"num_warps": 4})
    finally:
        chain.remove(print)
    assert handed[1:] == [(("metadata", (1, 1, 1), 0), *chains)]


MEMORY = torch.empty(4096, dtype=torch.uint8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
TENSORS = [MEMORY[start:][:1024].view(dtype) for dtype in DTYPES for start in (0, 4, 8, 16)]
TENSORS += [torch.empty(size, dtype=torch.uint8, device="meta") for size in (2**31 - 1, 2**31)]
INTEGERS = (0, 1, 2, 7, 8, 16, 48, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, -1, -16, -(2**31) - 1)
DESCRIPTORS = [
    tma.describe(torch.empty(rows, 64, dtype=dtype), box)
    for dtype in (torch.float32, torch.bfloat16)
    for rows in (8, 32)
    for box in ((16, 16), (16, 32), (32, 16))
]
VALUES = {
    "out": [*TENSORS, *DESCRIPTORS],
    "x": [*TENSORS, None],
    "index": TENSORS,
    "size": INTEGERS,
    "rows": INTEGERS,
    "scale": (0.0, 1.0, 0.5, 3e38, 0, 1),
    "bias": [None, *TENSORS],
    "ORDER": ("rows", "columns"),
    "BLOCK": (16, 32),
    "num_warps": (4, 8),
    "maxnreg": (128, 168),
}


@pytest.mark.parametrize(
    ("varied", "target"),
    [
        *itertools.product(VALUES, ["sm_90"]),
        *itertools.product([name for name in VALUES if name != "maxnreg"], ["gfx942"]),
    ],  # AMD has none
)
def test_what_has_one_key_is_one_kernel_in_triton_too(varied, target, compiled, monkeypatch):
    """Triton's binder says what it compiles in, whatever was launched before."""
    if target == "gfx942":
        pytest.importorskip("triton.backends.amd.compiler")
        monkeypatch.setattr(driver, "_active", Device(target))
        monkeypatch.setattr(compiled_kernels_module, "HAS_32_BIT_OFFSETS", True)
    function = triton.JITFunction(many, do_not_specialize=["rows"], do_not_specialize_on_alignment=["index"])
    kernel = compiled_kernels(function)
    *_, binder = function.device_caches[0]
    compiled_in = {}
    for value in VALUES[varied]:
        given = {name: values[0] for name, values in VALUES.items()} | {varied: value}
        arguments = [given[name] for name in ("out", "x", "index", "size", "rows", "scale", "bias")]
        constexprs, options = ({name: given[name] for name in names} for names in (NAMES[:2], NAMES[2:]))
        _, *found = binder(*arguments, **constexprs, **options, debug=False)
        key = kernel.key(0, arguments, constexprs, options)
        assert compiled_in.setdefault(key, found) == found
    assert len(compiled_in) > 1


NAMES = ("BLOCK", "ORDER", "num_warps", "maxnreg")


@triton.jit
def _sum_kernel(x, out, SIZE: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, SIZE)), 0))


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
def test_the_interpreter_leaves_the_language_as_it_was():
    """A kernel could be compiled behind it: sums stand in a module of the language of their own."""
    before, x, out = dict(vars(tl.core)), torch.arange(16.0), torch.empty(1)
    launch.launch(_sum_kernel, (1,), x, out, SIZE=16)
    assert out == 120
    assert [name for name, value in vars(tl.core).items() if value is not before[name]] == []
