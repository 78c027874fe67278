"""A disk that is full: what can't be written is said, no part of it is left, and what was found is shown all the same.

The disk is a tmpfs of one page, mounted in a namespace of its own, which goes with its processes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tritonmoe as tm
from tritonmoe.tools.benchmarks.namespaces import unusable_reason

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}
MOUNT = 'mount -t tmpfs -o size=4k none "$1" && '


def run_on_full_disk(disk: Path, *command: str, timeout_s: float = 120) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run a command that finds a disk of 4 kB at `disk`, and give what is on that disk in the end."""
    disk.mkdir()
    listing = disk.with_name("listing")
    script = MOUNT + 'shift && { "$@"; status=$?; ls -A "$DISK" > "$LISTING"; exit $status; }'
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(disk), *command],
        env={**ENVIRONMENT, "DISK": str(disk), "LISTING": str(listing)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return ended, set(listing.read_text().split())


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "sh", "-c", MOUNT + "true", "sh", str(folder)]).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if not can_mount(tmp_path):
        pytest.skip("mounting a tmpfs needs root and the command unshare")
    return tmp_path / "disk"


@pytest.mark.thorough
def test_no_writer_leaves_a_part(disk: Path) -> None:
    code = f"""if True:
        import dataclasses, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_files import TIMELINE
        from tritonmoe.tools.benchmarks.timing import write_json
        from tritonmoe.tools.report.png import write_load_png
        from tritonmoe.tools.report.perfetto import write_chrome_trace
        from tritonmoe.tools.report.png import write_png
        disk = Path({str(disk)!r})
        (disk / "old").write_text("figures of yesterday")
        for write in (
            lambda: write_chrome_trace(disk / "trace", {{str(run): [TIMELINE] for run in range(20)}}),
            lambda: write_png(disk / "png", [[1, 2], [3, 4]], [TIMELINE], title="title"),
            lambda: write_load_png(disk / "load", {{"layer": [1, 2]}}),
            lambda: write_json(disk / "old", "name", list(range(9999))),
        ):
            try:
                write()
            except OSError as error:
                print(error)
        assert (disk / "old").read_text() == "figures of yesterday"
    """
    ended, left = run_on_full_disk(disk, sys.executable, "-c", code)
    assert ended.returncode == 0, ended.stderr
    assert left == {"old"}
    full = "could not be written: No space left on device: "
    for what, name in (("trace", "trace"), ("picture", "png"), ("picture", "load"), ("file of figures", "old")):
        assert f"the {what} {full}'{disk / name}'" in ended.stdout


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
NETNS = ["--netns", "4", "--node-size", "2", "--inter-rate", "500mbit"]
RANKS = [
    pytest.param([sys.executable, "-m"], ["--emulate", "2"], id="emulated", marks=pytest.mark.thorough),
    pytest.param(TORCHRUN, [], id="torchrun", marks=pytest.mark.slow),
    pytest.param([sys.executable, "-m"], ["--netns", "2"], id="netns", marks=pytest.mark.slow),
    pytest.param([sys.executable, "-m"], NETNS, id="two levels", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("python", "ranks"), RANKS)
def test_a_benchmark_gives_its_figures(disk: Path, tmp_path: Path, python: list[str], ranks: list[str]) -> None:
    """The trace and the picture find no room; the figures are on the screen, and on the other disk."""
    if "--netns" in ranks and unusable_reason() is not None:
        pytest.skip(str(unusable_reason()))
    figures = tmp_path / "figures.json"
    command = [*python, "tritonmoe", "bench", "overlap", *ranks, "--model", "tiny", "--tokens", "40"]
    command += ["--rounds", "1", "--chunks", "1", "2", "--trace", str(disk / "trace"), "--png", str(disk / "png")]
    ended, left = run_on_full_disk(disk, *command, "--json", str(figures))
    assert ended.returncode == (1 if python == TORCHRUN else 2), ended.stderr
    assert left == set()
    assert "T_overlapped" in ended.stdout
    assert json.loads(figures.read_text())["results"]["ranks"] == (4 if ranks == NETNS else 2)
    for what in ("trace", "picture"):
        assert f"the {what} could not be written: No space left on device" in ended.stderr
    if python != TORCHRUN:  # which shows its own
        assert "Traceback" not in ended.stderr
