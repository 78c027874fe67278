"""Cubins of another Triton in bench.gpu: what a launch gives the driver, what is refused, and the cases of a day."""

import base64
import ctypes
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import beside_cubins, cubins, plan
from bench.gpu.children import ROOT
from bench.gpu.cubin_drivers import CudaDriver
from bench.gpu.cubins import Cubin
from bench.gpu.setting import DAY, REHEARSAL
from tritonmoe.ops.aot import TARGETS
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.tiles.tma import describe

OPERATIONS = {
    "up": ["_up_kernel"],
    "down": ["_grouped_matmul_kernel"],
    "down_grad": ["_down_grad_kernel", "_sum_partials_kernel"],
    "up_grad": ["_grouped_matmul_kernel"],
    "weight_grad W1": ["_outer_sums_kernel"],
    "gather_sum": ["_gather_sum_kernel"],
}
ELF = base64.b64encode(b"\x7fELF and a program").decode()
MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64, 64]}
CUBIN = Cubin(
    kernel="_scale",
    image=ELF,
    ptx="",
    shared_bytes=100_000,
    num_threads=128,
    parameters=[
        ["x", "", "pointer"],
        ["weight", "", "map"],
        *(["weight", f"shape {axis}", "i32"] for axis in range(3)),
        *(["weight", f"strides {axis}", "i64"] for axis in range(3)),
        ["count", "", "i32"],
        ["scale", "", "fp32"],
        ["", "", "pointer"],
    ],
    maps={"weight": MAP},
    constants={"bias": "None", "stride": "1", "BLOCK": "64"},
    multiples_of_16=["x", "width"],
    options={"num_warps": 4},
)
STREAM = 0x70
AMD = TARGETS["gfx942"]
X, WEIGHT = torch.zeros(32), torch.zeros(5, 128, 192, dtype=torch.bfloat16)


def launched(**changes):
    """Return a launch of CUBIN's kernel, with these arguments, constants or options changed."""
    arguments = {"x": X, "weight": describe(WEIGHT, (1, 64, 64)), "bias": None, "width": 48, "stride": 1}
    arguments |= {"count": -7, "scale": 0.5}
    constants, options = {"BLOCK": 64}, {"num_warps": 4}
    for name, value in changes.items():
        next(of for of in (arguments, constants, options) if name in of)[name] = value
    kernel = SimpleNamespace(
        __name__="_scale", params=[SimpleNamespace(name=name) for name in (*arguments, *constants)]
    )
    return launch.Launch(kernel, (3, 2), tuple(arguments.values()), constants, options)


class Described:
    """A driver whose descriptors are what it was given."""

    def tensor_map(self, tensor, shape, strides, box):
        assert box == MAP
        return json.dumps([tensor.data_ptr(), *shape, *strides]).encode()


def test_parameters_are_packed_in_order():
    *found, scratch = beside_cubins.packed(CUBIN, launched(), Described())
    x, weight, *numbers = found
    assert int.from_bytes(x, "little") == X.data_ptr()
    assert json.loads(weight) == [WEIGHT.data_ptr(), 5, 128, 192, 128 * 192, 192, 1]
    sizes = [5, 128, 192, 128 * 192, 192, 1]
    assert [int.from_bytes(one, "little") for one in numbers[:6]] == sizes
    assert [len(one) for one in numbers] == [4, 4, 4, 8, 8, 8, 4, 4]
    assert numbers[6:] == [b"\xf9\xff\xff\xff", b"\x00\x00\x00\x3f"]
    assert scratch == bytes(8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bias": X}, "bias None"),
        ({"stride": 2}, r"stride 1 \(here 2\)"),
        ({"BLOCK": 128}, r"BLOCK 64 \(here 128\)"),
        ({"num_warps": 8}, r"num_warps 4 \(here 8\)"),
        ({"x": None}, "a pointer as x, the launch has None"),
        ({"x": X[1:]}, "a multiple of 16 as x"),
        ({"width": 40}, "a multiple of 16 as width, the launch has 40"),
        ({"weight": WEIGHT}, "a map as weight"),
    ],
)
def test_what_was_compiled_in_must_be_so(change, said):
    with pytest.raises(beside_cubins.Unfit, match=said):
        beside_cubins.packed(CUBIN, launched(**change), Described())


def test_a_kernel_without_a_cubin_is_named():
    operation = cubins.Operation("up", "sm_90", "3.9.0", "", {})
    with pytest.raises(beside_cubins.Unfit, match="up launches _scale, of which there is no cubin"):
        beside_cubins.ByCubins(operation, Described())(launched())


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The path of a driver that runs nothing."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    path = tmp_path / "driver.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", path, ROOT / "bench/stand_in_driver.c"], check=True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    return str(path)


def test_a_launch_through_the_driver(library):
    driver, kept = CudaDriver(library), ctypes.CDLL(library)
    words, sizes = [(1).to_bytes(4, "little"), (2).to_bytes(8, "little")], (ctypes.c_uint * 64)(4, 8)
    ctypes.c_uint.in_dll(kept, "num_parameters").value = 2
    ctypes.memmove(ctypes.addressof(ctypes.c_uint.in_dll(kept, "parameter_bytes")), sizes, 256)
    attributes = (ctypes.c_int * 32).in_dll(kept, "attributes")
    driver.launch(replace(CUBIN, image=base64.b64encode(b"\x7fELF").decode(), shared_bytes=1000), (1, 1, 1), words, [X])
    assert attributes[8] == 0, "48 KB a kernel may have as it is"
    for _ in range(2):
        driver.launch(CUBIN, (3, 2, 1), words, [X])
    assert attributes[8] == 100_000
    assert ctypes.c_int.in_dll(kept, "num_modules").value == 2, "each cubin is loaded once"
    assert ctypes.c_ulonglong.in_dll(kept, "num_launches").value == 3
    assert ctypes.c_void_p.in_dll(kept, "launch_stream").value == STREAM
    assert list((ctypes.c_uint * 7).in_dll(kept, "launch_sizes")) == [3, 2, 1, 128, 1, 1, 100_000]
    assert bytes((ctypes.c_ubyte * 12).in_dll(kept, "parameters")) == b"".join(words)


def test_an_error_of_the_driver_has_its_words(library):
    with pytest.raises(RuntimeError, match="cuModuleLoadData gives 200: an error of the driver that runs nothing"):
        CudaDriver(library).launch(replace(CUBIN, image=""), (1, 1, 1), [], [X])


def of_small_layer(*arguments):
    """Return the lines of cubin_launches.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/support/cubin_launches.py"), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_driver_is_given_what_tritons_own_launcher_gives(tmp_path):
    pytest.importorskip("triton.backends.nvidia.compiler")
    lines = [line.rsplit(maxsplit=2) for line in of_small_layer("bytes", str(tmp_path))]
    assert [launch for launch, *_ in lines] == [
        f"{name} {kernel}" for name, all in OPERATIONS.items() for kernel in all
    ]
    assert {launch: int(num_maps) for launch, _, num_maps in lines if num_maps != "0"} == {
        "up _up_kernel": 1,
        "down _grouped_matmul_kernel": 3,
        "down_grad _down_grad_kernel": 1,
        "up_grad _grouped_matmul_kernel": 3,
        "weight_grad W1 _outer_sums_kernel": 1,
    }


@pytest.mark.thorough
def test_cubins_give_the_bits_of_launches():
    pytest.importorskip("triton.backends.nvidia.compiler")
    assert of_small_layer("values") == [f"{name} {' '.join(kernels)}" for name, kernels in OPERATIONS.items()]


@pytest.mark.thorough
def test_the_rehearsal_of_a_case():
    pytest.importorskip("triton.backends.nvidia.compiler")
    bench = SimpleNamespace(setting=REHEARSAL, forget=lambda: None)
    found = beside_cubins.measure_cubin(bench, "", REHEARSAL.headline_tokens)
    assert found["passed"], found
    assert found["has_equal_bits"]
    assert len(found["times"]) == 2
    assert found["ratio"] > 0


def cases_of_day():
    return [case for case in plan.cases(DAY, "sm_90") if case.measure == "measure_cubin"]


def test_each_file_is_a_case(monkeypatch, tmp_path):
    monkeypatch.setattr(cubins, "ROOT", tmp_path)
    monkeypatch.setattr(cubins, "FOLDER", tmp_path / "cubins")
    (none,) = cases_of_day()
    assert (none.name, none.arguments["file"]) == ("E cubins", "")
    day = SimpleNamespace(setting=DAY, forget=lambda: None)
    for target, said in (
        (TARGETS["sm_90"], "python -m bench.gpu.cubins --targets sm_90 makes"),
        (AMD, "runs no cubins"),
    ):
        monkeypatch.setattr(launch, "target_of", lambda device, target=target: target)
        assert said in beside_cubins.measure_cubin(day, **none.arguments)["left_out"]
    (tmp_path / "cubins").mkdir()
    for name in ("sm_90 up", "sm_90 down", "sm_100 up"):
        (tmp_path / "cubins" / f"{name} triton 3.9.0.json").write_text("{}")
    before = cases_of_day()
    assert [case.arguments["file"] for case in before] == [
        f"cubins/sm_90 {name} triton 3.9.0.json" for name in ("down", "up")
    ]
    (tmp_path / "cubins" / "sm_90 up triton 3.9.0.json").write_text("{ }")
    after = cases_of_day()
    assert after[0].name == before[0].name
    assert after[1].name != before[1].name, "other cubins are measured again"


@pytest.mark.parametrize(("target", "said"), [("gfx942", "gfx942 runs no cubins"), ("nope", "got 'nope'")])
def test_gpus_without_cubins_are_refused(target, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert cubins.main(["--out", str(tmp_path), "--targets", target]) == 2
    assert said in capsys.readouterr().err


def test_cubins_of_other_sources_are_left_out(tmp_path, capsys):
    file = tmp_path / "up.json"
    file.write_text(json.dumps(asdict(cubins.Operation("up", "sm_90", "3.9.0", "another hash", {"_scale": CUBIN}))))
    assert cubins.read(file).cubins == {"_scale": CUBIN}
    assert beside_cubins.main([str(file), "12", "--rehearse"]) == 0
    assert "run python -m bench.gpu.cubins again" in json.loads(capsys.readouterr().out)["left_out"]
