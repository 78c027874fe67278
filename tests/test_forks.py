"""Ranks that are forks of one process: each is a script of its own, whose end, output and failure the test hears of."""

import os
import subprocess
import textwrap
import time

import pytest
from processes import run_forks

SCRIPT = """
import os, sys
print(sys.argv[1:], __name__, sys.stdin.read() == "")
print("to stderr", file=sys.stderr)
if sys.argv[1] == "kills itself":
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[2]))
"""


def test_each_rank_is_its_script() -> None:
    scripts = [["-c", SCRIPT, "ends", "0"], ["-c", SCRIPT, "fails", "3"], ["-c", SCRIPT, "kills itself", "0"]]
    outputs, ended = run_forks(scripts, 60.0, is_group=False)
    assert ended.statuses == [0, 3, -9]
    assert outputs[:2] == ["['ends', '0'] __main__ True\n", "['fails', '3'] __main__ True\n"]
    assert ended.output.count("to stderr") == 3


def test_an_error_has_its_traceback() -> None:
    _, ended = run_forks([["-c", "import torch\ntorch.ones(2) + torch.ones(3)"]], 60.0, is_group=False)
    assert ended.statuses == [1]
    assert "RuntimeError: The size of tensor a (2)" in ended.output


def test_ranks_find_each_other_and_nothing_is_left_of_those_before(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = """
        import os, torch, torch.distributed as dist
        assert not dist.is_initialized()
        assert os.getcwd() == {folder!r}
        dist.init_process_group("gloo")
        rank = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(rank)
        print(torch.rand(()).item(), rank.item(), dist.get_world_size())
        dist.destroy_process_group()
    """
    script = ["-c", textwrap.dedent(code).format(folder=os.path.realpath(tmp_path))]
    found = [run_forks([script] * 3, 60.0, is_group=True) for _ in range(2)]
    assert [ended.statuses for _, ended in found] == [[0, 0, 0]] * 2, found
    (printed,) = {text for outputs, _ in found for text in outputs}  # the generator is as in a new process
    assert printed.endswith("3.0 3\n")


def test_one_that_fails_ends_the_others() -> None:
    script = ["-c", "import os, time\nassert os.environ['RANK'] == '1', 'rank 0 fails'\ntime.sleep(600)"]
    started = time.monotonic()
    _, ended = run_forks([script] * 2, 60.0, is_group=True)
    assert ended.statuses == [1, None]
    assert "rank 0 fails" in ended.output
    assert time.monotonic() - started < 30


def test_one_that_hangs_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_forks([["-c", "import time\ntime.sleep(600)"]], 0.5, is_group=False)
