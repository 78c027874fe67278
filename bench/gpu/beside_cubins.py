"""`python -m bench.gpu.beside_cubins FILE TOKENS`: an operation by a cubin of another Triton, and by the one here.

Both get the same arguments. It prints a line of JSON when the results are compared, and one with the times; it runs in
a process of its own, since a kernel that is wrong may end all that its process does on a GPU.
"""

import argparse
import contextlib
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu.children import run_program, tail
from bench.gpu.cubin_drivers import CudaDriver, Driver, VirtualDriver
from bench.gpu.cubins import FOLDER, Cubin, Operation, kernels_hash, read, text_of
from bench.gpu.programs import PROGRAM_LIMIT_S, run_in_repository
from bench.gpu.setting import DAY, HEADLINE, REHEARSAL
from bench.gpu.workbench import Call, Workbench, with_entries
from tritonmoe.ops.aot import architecture_named
from tritonmoe.ops.backends import backend_choice
from tritonmoe.ops.kernels import launch
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.tuning import agree, tensors_in
from virtual_gpu.launcher import run_launch

__all__ = ["ByCubins", "Unfit", "compare", "main", "measure_cubin", "packed"]

FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}


class Unfit(ValueError):
    """A cubin was compiled for another launch than the one that is made here."""


def packed(cubin: Cubin, item: launch.Launch, driver: Driver) -> list[bytes]:
    """Return the bytes of a kernel's parameters for a launch.

    Raises:
        Unfit: the code knows something of an argument, or of the options, that is not so.
    """
    names = [parameter.name for parameter in item.kernel.params]
    values = {**dict(zip(names, item.args, strict=False)), **item.constexprs, "": None}
    _check(cubin, item, values)
    found = []
    for name, part, kind in cubin.parameters:
        value = values[name]
        if kind == "map":
            found.append(driver.tensor_map(value.base, value.shape, value.strides, cubin.maps[name]))
        elif kind == "pointer":
            found.append((value.data_ptr() if name else 0).to_bytes(8, "little"))
        else:
            field, _, axis = part.partition(" ")
            number = getattr(value, field)[int(axis)] if field else value
            try:
                found.append(struct.pack(FORMATS[kind], number))
            except struct.error:
                raise Unfit(f"{cubin.kernel} was compiled for {kind} as {name}, the launch has {number}") from None
    return found


def _check(cubin: Cubin, item: launch.Launch, values: Json) -> None:
    here = {name: text_of(values[name]) for name in cubin.constants} | {str(k): str(v) for k, v in item.options.items()}
    compiled = cubin.constants | {name: str(value) for name, value in cubin.options.items()}
    if different := sorted(name for name in here.keys() | compiled.keys() if here.get(name) != compiled.get(name)):
        both = ", ".join(f"{name} {compiled.get(name)} (here {here.get(name)})" for name in different)
        raise Unfit(f"{cubin.kernel} was compiled with {both}: take cubins of a release that has the same tiles")
    for name, _, kind in cubin.parameters:
        is_there = isinstance(values[name], {"pointer": Tensor, "map": TensorDescriptor}.get(kind, object))
        if name and not is_there:
            raise Unfit(f"{cubin.kernel} was compiled for a {kind} as {name}, the launch has {values[name]!r}")
    for name in cubin.multiples_of_16:
        number = values[name].data_ptr() if isinstance(values[name], Tensor) else values[name]
        if number % 16:
            raise Unfit(f"{cubin.kernel} was compiled for a multiple of 16 as {name}, the launch has {number}")


class ByCubins:
    """Launches through the cubins of an operation what `launch.recording` catches."""

    def __init__(self, operation: Operation, driver: Driver) -> None:
        self.operation, self.driver = operation, driver

    def __call__(self, item: launch.Launch) -> None:
        name = item.kernel.__name__
        if name not in self.operation.cubins:
            raise Unfit(f"{self.operation.operation} launches {name}, of which there is no cubin")
        cubin = self.operation.cubins[name]
        bases = [value.base if isinstance(value, TensorDescriptor) else value for value in item.args]
        tensors = [value for value in bases if isinstance(value, Tensor)]
        x, y, z = (*item.grid, 1, 1)[:3]
        self.driver.launch(cubin, (x, y, z), packed(cubin, item, self.driver), tensors)


def _caught(call: Call, target: GPUTarget, run: Callable[[launch.Launch], None]) -> Call:
    """Return a call whose launches are run by `run`."""

    def caught() -> object:
        with launch.recording(target, run):
            return call()

    return caught


@contextlib.contextmanager
def _nan_filled_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare(operation: Operation, num_tokens: int, bench: Workbench) -> Iterator[Json]:
    """Yield how the results of both compare, and then their times too.

    Raises:
        Unfit: see `packed`.
    """
    if operation.kernels_hash != kernels_hash():
        raise Unfit("tritonmoe/ops/kernels has changed since they were compiled: run python -m bench.gpu.cubins again")
    target = architecture_named(operation.target).target
    inputs = bench.inputs(HEADLINE, num_tokens, "uniform")
    if bench.setting.is_rehearsal:
        driver: Driver = VirtualDriver(target.arch, operation.triton)
        with _virtual_launches(target):
            call = with_entries(bench.operations(inputs)[operation.operation], {})
        here = _caught(call, target, lambda item: run_launch(item, target))
    else:
        driver = CudaDriver()
        here = call = with_entries(bench.operations(inputs)[operation.operation], {})
    theirs = _caught(call, target, ByCubins(operation, driver))
    with _nan_filled_memory():
        expected, found = tensors_in(here()), tensors_in(theirs())
    assert expected, f"{operation.operation} returns no numbers"
    result: Json = {
        "installed": triton.__version__,
        "cubin": operation.triton,
        "passed": all(agree(*pair) for pair in zip(found, expected, strict=True)),
        "has_equal_bits": all(map(torch.equal, found, expected)),
    }
    yield result
    names = [f"Triton {triton.__version__} here", f"cubin of {operation.triton}"]
    timed = bench.time(dict(zip(names, (here, theirs), strict=True)), names[0])
    own, other = (timed["times"].get(name) for name in names)
    if own and other and own["timed_by"] == other["timed_by"]:  # events have Python between them
        result["ratio"] = round(other["us"] / own["us"], 4)
    yield {**result, **timed}


@contextlib.contextmanager
def _virtual_launches(target: GPUTarget) -> Iterator[None]:
    """Run launches on the virtual GPU, of which the choice of a backend knows nothing."""
    with (
        mock.patch.object(backend_choice, "_triton_unusable_reason", return_value=None),
        launch.recording(target, lambda item: run_launch(item, target)),
    ):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print what is known after each step as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.beside_cubins", description=__doc__)
    parser.add_argument("file", type=Path, help="what python -m bench.gpu.cubins wrote")
    parser.add_argument("num_tokens", type=int)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the virtual GPU")
    arguments = parser.parse_args(argv)
    setting = replace(REHEARSAL, dtype_name=DAY.dtype_name) if arguments.rehearse else DAY
    bench = Workbench(setting)
    try:
        for found in compare(read(arguments.file), arguments.num_tokens, bench):
            print(json.dumps(found), flush=True)  # the GPU may end the process in the next step
    except Unfit as error:
        print(json.dumps({"left_out": str(error)}))
    bench.clocks.close()
    return 0


def measure_cubin(bench: Workbench, file: str, num_tokens: int) -> Json:
    """Launch a file's cubins beside what Triton compiles here, in a process of its own; a rehearsal makes its file."""
    if not bench.setting.is_rehearsal:
        target = launch.target_of(bench.setting.device)
        if target is None or target.backend != "cuda":
            return {"left_out": "this GPU runs no cubins"}
        if not file:
            maker = f"python -m bench.gpu.cubins --targets sm_{target.arch}"
            return {"left_out": f"there are no cubins for this GPU in {FOLDER}: {maker} makes them"}
        return run_in_repository(bench, ["-m", "bench.gpu.beside_cubins", file, str(num_tokens)], {})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.gpu.cubins", "--rehearse", "--out", folder]
        made = run_program(command, PROGRAM_LIMIT_S, {"TRITON_INTERPRET": None})
        if made["status"] != 0:
            return {**made, "failed": tail(made["output"])}
        (path,) = Path(folder).iterdir()
        arguments = ["-m", "bench.gpu.beside_cubins", str(path), str(num_tokens), "--rehearse"]
        return run_in_repository(bench, arguments, {"TRITON_INTERPRET": None})


if __name__ == "__main__":
    sys.exit(main())
