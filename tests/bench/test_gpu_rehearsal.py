"""A rehearsal of a day with a GPU that is killed twice, in processes: nothing is lost, nothing repeated."""

import collections
import os
import signal
import subprocess
import sys
import time

import pytest

from bench.gpu.children import ROOT
from bench.gpu.plan import cases
from bench.gpu.setting import REHEARSAL
from tritonmoe.tools.benchmarks.kept_results import read_results

KERNELS = 3
MEASURES = ("describe_machine", "measure_dense", "measure_host", "try_tile")
SCRIPT = f"""
import sys
from bench.gpu import __main__ as gpu
kernels_of, cases = gpu.kernels_of, gpu.cases
if __name__ == "__main__":
    gpu.kernels_of = lambda *setting: kernels_of(*setting)[:{KERNELS}]
    gpu.cases = lambda *setting: [case for case in cases(*setting) if case.measure in {MEASURES}]
    sys.exit(gpu.main(["--rehearse", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_rehearsal_that_is_killed_twice(tmp_path):
    file, script = tmp_path / "gpu.jsonl", tmp_path / "rehearse.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "triton")}

    def start():
        command = [sys.executable, str(script), str(file)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def num_lines():
        return file.read_bytes().count(b"\n") if file.exists() else 0

    for at_least in (4, 12):  # in the kernels, in the cases
        process = start()
        while num_lines() < at_least:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with file.open("ab") as results:
        results.write(b'{"run": "a line that a kill to')
    process = start()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"{KERNELS} kernels and tiles are compiled for sm_90" in output
    lines = read_results(file)
    counts = collections.Counter(line["case"] for line in lines)
    assert set(counts.values()) == {1}
    planned = {case.name for case in cases(REHEARSAL, "sm_90") if case.measure in MEASURES}
    assert planned < set(counts)
    assert len(counts) == 1 + KERNELS + len(planned)
    assert not [line for line in lines if "failed" in line]
    assert len({line["run"] for line in lines}) == 1
