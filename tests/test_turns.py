"""Tests marked `alone` run beside no other test."""

import os
import subprocess
import sys

TURNS = """
import sys, time
import turns

path, alone = sys.argv[1], sys.argv[2] == "alone"
for _ in range(6):
    with turns.turn(sys.argv[3], alone=alone):
        with open(path, "a") as log:
            log.write(f"begin {sys.argv[2]}\\n")
        time.sleep(0.03)
        with open(path, "a") as log:
            log.write(f"end {sys.argv[2]}\\n")
"""


def test_nobody_runs_beside_one_that_is_alone(tmp_path) -> None:
    kinds = ("alone", "shared a", "shared b")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__) + "/support", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", TURNS, str(tmp_path / "log")]
    processes = [subprocess.Popen([*command, kind, "run"], env=environment) for kind in kinds]
    assert [process.wait(timeout=30) for process in processes] == [0, 0, 0]
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2 * 6 * len(kinds)
    for number, line in enumerate(lines):
        if line == "begin alone":
            assert lines[number + 1] == "end alone"
            before = lines[:number]
            assert sum(of.startswith("begin") for of in before) == sum(of.startswith("end") for of in before)
