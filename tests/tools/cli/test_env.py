"""tritonmoe env."""

import json
import subprocess
import sys

import pytest
import torch

import tritonmoe
from tritonmoe.tools.cli import main
from tritonmoe.transports import torch_groups


def test_json(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] is not None
    assert found["versions"]["tritonmoe"] is not None
    assert found["backends"]["torch"] is None
    assert found["transports"]["emulated"] is None
    assert set(found["transports"]) == {"local", "emulated", "gloo", "nccl", "mpi"}
    assert len(found["cuda"]["devices"]) == torch.cuda.device_count()


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"tritonmoe {tritonmoe.__version__}\n"


def test_text_says_why_something_cannot_run(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "need a CUDA or ROCm device" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_transports_without_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    reasons = torch_groups.available()
    assert reasons["gloo"] == reasons["nccl"] == "this torch was built without torch.distributed"


def test_module_and_help():
    result = subprocess.run([sys.executable, "-m", "tritonmoe", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in result.stdout
    assert "env" in result.stdout


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "command" in capsys.readouterr().err
