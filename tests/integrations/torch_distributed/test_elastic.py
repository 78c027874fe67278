"""A rank that is killed: torchrun starts all again, and the training ends where it would have ended."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_forks
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_expert_parallel.py"
STEPS = 7
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes in /proc")


def script(checkpoints: Path) -> list[str]:
    return [str(EXAMPLE), "--tokens", "331", "--steps", str(STEPS), "--checkpoints", str(checkpoints)]


def train(checkpoints: Path, num_ranks: int) -> str:
    """Run the example; give what it printed."""
    _, ended = run_forks([script(checkpoints)] * num_ranks, 120.0, is_group=True)
    assert not any(ended.statuses), ended.output
    return ended.output


def train_killed(checkpoints: Path, num_ranks: int, kill_at_step: int | None) -> str:
    """Run the example by torchrun, killing one of its ranks once a step has been printed; give what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    process = subprocess.Popen(
        [*command, "--max-restarts", "1", *script(checkpoints)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if line.startswith(f"step {kill_at_step} ") and kill_at_step is not None:
                ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                assert len(ranks) == num_ranks
                os.kill(int(random.Random(kill_at_step).choice(ranks)), signal.SIGKILL)
                kill_at_step = None
        assert process.wait(timeout=60) == 0, "".join(output)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    assert kill_at_step is None
    return "".join(output)


def result(checkpoints: Path, tmp_path: Path) -> dict[str, Tensor]:
    """Return the weights and moments of the last checkpoint, whole."""
    whole = tmp_path / f"{checkpoints.name}.pt"
    dcp_to_torch_save(checkpoints / f"step-{STEPS}", whole)
    state = torch.load(whole, weights_only=True)
    moments = state["optimizer"]["state"]
    return state["model"] | {f"{name}/{key}": of[key] for name, of in moments.items() for key in of}


def last_loss(output: str) -> float:
    return float(re.findall(rf"step {STEPS - 1} loss (\S+)", output)[-1])


def check(tmp_path: Path, num_ranks: int, num_fewer: int) -> None:
    kill_at_step = random.Random(num_ranks).randrange(3, STEPS)
    undisturbed = train(tmp_path / "undisturbed", num_ranks)
    killed = train_killed(tmp_path / "killed", num_ranks, kill_at_step)
    assert "goes on from" in killed
    assert "goes on from" not in undisturbed
    assert last_loss(killed) == last_loss(undisturbed)
    expected, actual = (result(tmp_path / name, tmp_path) for name in ("undisturbed", "killed"))
    assert expected.keys() == actual.keys()
    assert sum("exp_avg" in name for name in expected) == 6
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    shutil.copytree(tmp_path / "undisturbed" / "step-4", tmp_path / "fewer" / "step-4")
    fewer = train(tmp_path / "fewer", num_fewer)
    assert "goes on from" in fewer
    assert last_loss(fewer) == pytest.approx(last_loss(undisturbed), abs=2e-6)
    actual = result(tmp_path / "fewer", tmp_path)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.thorough
def test_a_killed_rank_changes_nothing(tmp_path: Path) -> None:
    check(tmp_path, num_ranks=2, num_fewer=1)


@pytest.mark.slow
def test_a_killed_rank_of_four_changes_nothing(tmp_path: Path) -> None:
    check(tmp_path, num_ranks=4, num_fewer=2)
