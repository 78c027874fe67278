"""`python -m bench.gpu.one_operation NAME TOKENS`: one operation of the headline, alone in a process, for profilers."""

import argparse

import torch

from bench.gpu.operations import OPERATIONS
from bench.gpu.setting import DAY, HEADLINE, REHEARSAL, SMALL
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.tools.benchmarks.operation_calls import operation_calls
from tritonmoe.tools.benchmarks.shapes import draw_inputs

__all__ = ["CALLS", "main"]

CALLS = 3
"""The third launch of a kernel, which profilers look at, is one of these: at most two made the operands."""


def main(argv: list[str] | None = None) -> int:
    """Run it CALLS times and say so."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.one_operation", description=__doc__)
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("num_tokens", type=int)
    parser.add_argument("--small", action="store_true", help="the headline's layer, shrunk to a few whole tiles")
    arguments = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    setting = DAY if on_gpu else REHEARSAL
    shape = SMALL if arguments.small else setting.shapes[HEADLINE]
    with measured_tiles.using({}):
        inputs = draw_inputs(shape, arguments.num_tokens, "uniform", setting.dtype, setting.device)
        call = operation_calls(inputs, "triton")[arguments.operation]
        for _ in range(CALLS):
            call()
    if on_gpu:
        torch.cuda.synchronize()
    print(f"{arguments.operation}: {CALLS} calls")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
