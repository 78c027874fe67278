"""`python -m bench.launch` launches every operation through Triton's own launcher, over a driver that runs nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHES = {
    "moe_mlp, forward": 4,
    "moe_mlp, forward+backward": 10,
    "group": 1,
    "up": 1,
    "down": 1,
    "gather_sum": 1,
    "down_grad": 2,
    "up_grad": 1,
    "weight_grad of the up-projection": 1,
    "grouped_mm, forward": 0,
    "grouped_mm, forward+backward": 0,
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_every_operation_is_launched(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.launch", "--rounds", "1", "--json", str(tmp_path / "launch.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "launch.json").read_text())["results"]
    assert {row["what"]: row["launches"] for row in found} == LAUNCHES
    assert all(0 < row["median_us"] < 1e5 for row in found)
