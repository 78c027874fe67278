"""Benchmarks under torchrun: nothing is measured there under the name of a link that nobody made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.tools.benchmarks import auto, expert_parallel, overlap, timing
from tritonmoe.tools.benchmarks.expert_parallel import num_settling_steps
from tritonmoe.tools.benchmarks.namespaces import INSIDE, check_start

MAINS = {"overlap": overlap.main, "auto": auto.main, "expert_parallel": expert_parallel.main}
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", MAINS)
def test_namespaces_are_not_made_under_torchrun(name: str, complaint_of) -> None:
    said = complaint_of(MAINS[name], ["--netns", "2"], rank="1")
    assert "--netns 2 starts processes of its own, and the environment has RANK=1, as under torchrun" in said
    assert "leave out --netns to measure torchrun's ranks" in said


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("overlap", ["--rate", "2gbit"], "--rate 2gbit shapes the link of --emulate or --netns"),
        ("overlap", ["--emulate", "2"], "--emulate 2 needs one process, and the environment has RANK=0"),
        ("overlap", ["--node-size", "2", "--inter-rate", "1mbit"], "--inter-rate shapes the links that --netns makes"),
        ("auto", ["--rates", "1gbit"], "--rates shapes the links that --netns makes"),
        ("expert_parallel", ["--rate", "1gbit"], "--rate shapes the links that --netns makes"),
    ],
)
def test_what_torchrun_would_ignore(name: str, arguments: list[str], words: str, complaint_of) -> None:
    assert words in complaint_of(MAINS[name], arguments, rank="0")


def test_mpi_has_no_rate(complaint_of) -> None:
    said = complaint_of(overlap.main, ["--mpi", "--rate", "2gbit"])
    assert "can't shape the link between ranks of torchrun or mpiexec" in said


def test_processes_in_namespaces_have_a_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(INSIDE, "1")
    check_start(2, {"--rate": "1gbit"})
    monkeypatch.delenv(INSIDE)
    with pytest.raises(ValueError, match="--netns 2 starts processes of its own"):
        check_start(2, {})
    monkeypatch.delenv("RANK")
    check_start(2, {"--rate": "1gbit"})


@pytest.mark.slow
def test_nobody_gave_a_rate(tmp_path: Path) -> None:
    arguments = [
        "--model",
        "tiny",
        "--tokens",
        "40",
        "--rounds",
        "1",
        "--chunks",
        "1",
        "--json",
        str(tmp_path / "r.json"),
    ]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tritonmoe"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, *command, "bench", "overlap", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["rate_bits_per_s"] is None
    assert (results["link"], results["device"]) == ("2 processes, gloo", "cpu")


def test_figures_of_a_cpu_name_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"a card, {device}")
    assert timing.environment()["device"] == timing.cpu_name()
    assert timing.environment("cuda:1")["device"] == "a card, cuda:1"
    timing.write_json(tmp_path / "cpu.json", "name", [])
    timing.write_json(tmp_path / "gpu.json", "name", [], "cuda")
    found = [json.loads((tmp_path / f"{name}.json").read_text())["environment"]["device"] for name in ("cpu", "gpu")]
    assert found == [timing.cpu_name(), "a card, cuda"]


@pytest.mark.parametrize(("num_layers", "steps"), [(1, SETTLING_CALLS + 1), (2, 11), (4, 6), (48, 2)])
def test_few_layers_take_more_steps_to_settle(num_layers: int, steps: int) -> None:
    assert num_settling_steps(num_layers) == steps
    assert (num_settling_steps(num_layers) - 1) * num_layers >= SETTLING_CALLS
