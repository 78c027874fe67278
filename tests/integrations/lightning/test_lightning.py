"""Lightning's Trainer with spread experts, against one process: `bash .ci/framework lightning` runs these tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from processes import ENVIRONMENT, run_torchrun

WORKER = Path(__file__).parent / "lightning_worker.py"
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "lightning.md"


def test_a_run_goes_on_over_other_numbers_of_processes(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=["trained:", "evaluated:", "goes_on:"])
    run_torchrun(1, WORKER, str(tmp_path), cases=["goes_on:"])


def test_other_settings_and_models(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=["accumulated:", "half:", "transformers:", "refused:"])


def test_lightnings_own_strategies(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=["sharded:", "by_hand:", "fabric:"])


def test_the_page_runs(tmp_path: Path) -> None:
    titles = re.findall(r'^```python title="([\w.]+)"\n(.*?)^```$', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for title, block in titles:
        (tmp_path / title).write_text(block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for title, _ in titles:
        ended = subprocess.run([*command, title], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
