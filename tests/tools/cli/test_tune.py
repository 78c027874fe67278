"""tritonmoe tune and tritonmoe warmup, as far as they go without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton

from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.gpus import architecture_like
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.table import TABLE
from tritonmoe.tools.benchmarks import tuning
from tritonmoe.tools.benchmarks.shapes import LayerShape
from tritonmoe.tools.cli import main, tune
from tritonmoe.tools.cli.layer_arguments import tokens_of_every_class

SHAPE = ["128", "8", "2048", "768", "bfloat16"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONMOE_CACHE_DIR", str(tmp_path))
    measured_tiles.kept.cache_clear()
    yield tmp_path / "tiles.json"
    measured_tiles.kept.cache_clear()


def test_show(capsys, cache):
    key = f"sm_100 bfloat16 up 1024x2048 rows 128 triton {triton.__version__}"
    measured_tiles.write(cache, {key: {"group_m": 4}})
    assert main(["tune", *SHAPE, "--show", "--target", "sm_100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(": ")[0].split()[2] for line in lines} == {"up", "down", "down_grad", "weight_grad"}
    classes = {line.split(": ")[0].partition(" rows ")[2].split()[0] for line in lines}
    assert classes == {"8", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096"}
    (tuned,) = [line for line in lines if line.endswith("(tuned)")]
    assert tuned.startswith(f"{key}: ")
    assert "group_m=4" in tuned
    assert all(line.endswith("(heuristic)") for line in lines if line != tuned)


def test_packed_weights_have_tiles_of_their_own(capsys):
    """They have no gradients, and no tile of theirs walks."""
    packed = ["--weight-format", "mxfp4"]
    assert main(["tune", *SHAPE, *packed, "--show", "--json", "--tokens", "16384"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {tuple(key.split()[2:4]) for key in found} == {(name, "mxfp4") for name in ("up", "down", "down_grad")}
    for of in found.values():
        assert ["weight", "pointers: it is packed"] in of["tile"]["reads"]
        assert not of["tile"]["persistent"]
    for wrong, words in (
        ([*SHAPE[:4], "float16"], "--weight-format mxfp4 is of experts that compute in bfloat16"),
        (["8", "2", "100", "64"], "a scale for 32 values"),
    ):
        assert main(["tune", *wrong, *packed, "--show"]) == 2
        assert words in capsys.readouterr().err


def test_products_of_codes_have_tiles_of_their_own(capsys):
    """Gradients of weights are products in bf16, whose tiles a layer without a precision shows."""
    precision = ["--expert-precision", "fp8_block"]
    assert main(["tune", *SHAPE, *precision, "--show", "--json", "--tokens", "16384"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {tuple(key.split()[1:4]) for key in found} == {
        ("float8_e4m3fn", name, "fp8_block") for name in ("up", "down", "down_grad")
    }
    for wrong, words in (
        ([*SHAPE[:4], "float16"], "--expert-precision fp8_block is of experts in bfloat16, got float16"),
        ([*SHAPE, "--weight-format", "nf4"], "those with --weight-format nf4 are frozen: give one"),
        ([*SHAPE, "--target", "sm_80"], "sm_80 multiplies no fp8_block codes"),
    ):
        assert main(["tune", *wrong, *precision, "--show"]) == 2
        assert words in capsys.readouterr().err


def test_a_gpu_without_the_instruction_is_not_tuned_for_codes(gpu, capsys, monkeypatch):
    monkeypatch.setattr(launch, "gpu_of", lambda device: architecture_like("sm_80"))
    assert main(["tune", *SHAPE, "--expert-precision", "mxfp8"]) == 2
    assert "multiplies no mxfp8 codes: experts in it run the kernels of bfloat16 there" in capsys.readouterr().err
    assert not gpu


def test_show_for_machines(capsys):
    assert main(["tune", *SHAPE, "--show", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key.split()[0] for key in found} == {"sm_90"}
    assert {of["source"] for of in found.values()} == {"heuristic"}
    assert all(of["tile"]["block_m"] >= 1 for of in found.values())
    for wrong, words in ((["--show"], "give E, K, D and F"), (SHAPE, "--json belongs to --show")):
        assert main(["tune", *wrong, "--json"]) == 2
        assert words in capsys.readouterr().err


def test_show_without_a_layer_is_the_table_of_tiles(capsys):
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == TABLE
    for arguments in ([], ["8", "2", "--show"], ["--show", "--target", "sm_90"]):
        assert main(["tune", *arguments]) == 2
        assert "E, K, D and F are required" in capsys.readouterr().err


def test_every_class_of_tiles_has_its_tokens():
    shape = LayerShape("Qwen3-30B-A3B", 128, 8, 2048, 768)
    assert tokens_of_every_class(shape) == [1, 256, 512, 1024, *(2048 << n for n in range(6))]
    assert tokens_of_every_class(LayerShape("one expert", 1, 1, 8, 8)) == [1, 16, 32, 64, *(128 << n for n in range(6))]


def status_of(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as refused:  # argparse
        return refused.code


def test_a_target_is_for_show(capsys):
    assert main(["tune", *SHAPE, "--target", "sm_90"]) == 2
    assert "--target belongs to --show" in capsys.readouterr().err


@pytest.mark.parametrize("is_directory", [False, True])
def test_a_file_of_tiles_that_is_none(is_directory, capsys, cache):
    if is_directory:
        cache.mkdir()
    else:
        cache.write_text("{bad")
    assert main(["tune", *SHAPE, "--show"]) == 2
    said = capsys.readouterr().err
    assert f"tritonmoe tune: {cache} is not a file of tile configurations" in said
    assert ("is a directory" if is_directory else "half written") in said


@pytest.mark.parametrize("command", ["tune", "warmup"])
def test_what_is_missing_is_said(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, *SHAPE]) == 2
    assert "GPU" in capsys.readouterr().err
    for wrong, message in (
        (["2", "4", "8", "8"], "top_k (4) must not exceed num_experts (2)"),
        (["1025", "4", "8", "8"], "num_experts must be at most 1024, got 1025"),
        (["64", "17", "8", "8"], "top_k must be at most 16, got 17"),
        (["8", "2", "8", "8", "--ungated", "--activation", "clamped"], "ClampedSwiGLU needs a gate"),
        (["2", "1", "0", "8"], "argument D: must be a whole number of at least 1, got '0'"),
        (["2", "1", "8", "8", "--tokens", "-4"], "argument --tokens: must be a whole number of at least 1, got '-4'"),
    ):
        assert status_of([command, *wrong]) == 2
        assert message in capsys.readouterr().err
    if command == "warmup":
        assert main([command, "8", "2", "8", "8", "--ranks", "3"]) == 2
        assert "E (8) must be divisible by --ranks (3); choose one of 1, 2, 4, 8" in capsys.readouterr().err
    show = ["--show"] if command == "tune" else []
    assert main([command, *SHAPE, *show, "--target", "sm_70"]) == 2
    assert "a target must be one of sm_80, sm_90" in capsys.readouterr().err


@pytest.mark.slow
def test_warmup_compiles_for_another_machine(tmp_path):
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    command = [sys.executable, "-m", "tritonmoe", "warmup", "8", "2", "64", "32", "--target", "sm_90", "--tokens", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("]")[0] for line in lines] == [f"[{n}/{len(lines)}" for n in range(1, len(lines) + 1)]
    assert any("up up: " in line and "registers" in line for line in lines)
    assert list((tmp_path / "triton").rglob("*.cubin"))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that isn't there, on which nothing is measured; give how often it would have been."""
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "triton_unusable_reason", lambda device: None)
    monkeypatch.setattr(
        tuning, "tune", lambda *arguments: measured.append(1) or iter([{f"{os.getpid()}": {"block_m": 64}}])
    )
    return measured


def test_what_is_found_is_kept(cache, gpu):
    measured_tiles.write(cache, {"other": {"block_n": 32}})
    assert main(["tune", *SHAPE, "--tokens", "1", "8"]) == 0
    assert len(gpu) == 2
    assert measured_tiles.read(cache) == {"other": {"block_n": 32}, f"{os.getpid()}": {"block_m": 64}}
    assert cache.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("wrong", ["damaged", "folder"])
def test_what_can_not_be_kept_is_not_measured(wrong, cache, gpu, monkeypatch, capsys):
    if wrong == "damaged":
        cache.write_text("{")
    else:
        cache.write_text('{"tiles": {}}')
        monkeypatch.setenv("TRITONMOE_CACHE_DIR", str(cache))  # a file: as little to write in as a read-only folder
    assert main(["tune", *SHAPE]) == 2
    assert not gpu
    said = capsys.readouterr().err
    assert "can't keep what it would find" in said
    assert ("delete it and run `tritonmoe tune` again" if wrong == "damaged" else str(cache)) in said


@pytest.mark.thorough
def test_processes_that_tune_at_once_lose_nothing(cache):
    script = """
import sys
from pathlib import Path
from tritonmoe.ops.kernels.tiles import measured_tiles
print(flush=True)
sys.stdin.readline()
for n in range(25):
    measured_tiles.write(Path(sys.argv[1]), {f"{sys.argv[2]} {n}": {"block_m": 64}})
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(cache), str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for number in range(2)
    ]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(measured_tiles.read(cache)) == 50
