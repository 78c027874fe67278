"""Every example runs, and does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_processes(script: str, num_processes: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", output)]


def test_expert_parallel_training_has_the_losses_of_one_process():
    # 331 tokens: uneven over two ranks and over chunks.
    arguments = ("--steps", "6", "--tokens", "331", "--chunks", "3")
    one, two = (run_processes("train_expert_parallel.py", n, *arguments) for n in (1, 2))
    assert len(losses(two)) == 6
    assert losses(two)[-1] < losses(two)[0]
    assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    assert "sends to rank k" in two
