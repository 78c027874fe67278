"""Test set-up: Triton's interpreter is switched on before anything imports triton; Ctrl-C works.

In the interpreter the sums of a tile's product are rounded from fp64. Some of OpenBLAS's fp32 kernels (the CPU chooses)
round a row differently at another place of the tile, which no tensor core does: bits would depend on the neighbours.
torch reads no compiled graph of an earlier state of this code back: its cache doesn't know the operators' schemas.
"""

import importlib.util
import os
import signal
import sys

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch
import uninitialised

from virtual_gpu import VIRTUAL_GPUS

if not torch.cuda.is_available() and not any(argument.startswith("--virtual-gpu") for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("triton") and "TRITON_INTERPRET" in os.environ:
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
        product = numpy.matmul(a.data, b.data, dtype=numpy.float64).astype(accumulator.data.dtype)
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background; processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    help_text = "compile kernels for a GPU that isn't there, and run what was compiled in NumPy (tests/kernels)"
    parser.addoption("--virtual-gpu", choices=VIRTUAL_GPUS, help=help_text)


@pytest.fixture
def nan_filled_memory():
    with uninitialised.nan_filled_memory():
        yield
