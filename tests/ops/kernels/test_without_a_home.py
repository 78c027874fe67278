"""The first call of kernels where nothing can be kept: no home directory, another user's, or one that is a device."""

import os
from pathlib import Path

import pytest
from processes import run_processes

WORKER = Path(__file__).with_name("without_a_home.py")
NOBODY = "54321"  # a number that no user has
AS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")


@pytest.mark.parametrize(
    ("home", "user"),
    [
        pytest.param("none", NOBODY, marks=(AS_ROOT, pytest.mark.thorough), id="no home"),
        pytest.param("unreadable", NOBODY, marks=AS_ROOT, id="another user's home"),
        pytest.param("/dev/null", "0", marks=pytest.mark.thorough, id="a device"),
    ],
)
def test_the_first_call(home: str, user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if home == "unreadable":
        (tmp_path / "home").mkdir(mode=0o700)
        home = str(tmp_path / "home")
    (tmp_path / "here").mkdir()
    (tmp_path / "here").chmod(0o777)
    monkeypatch.chdir(tmp_path / "here")
    ended = run_processes(1, "gloo", str(WORKER), home, user, timeout_s=170)
    assert ended.statuses == [0], ended.output[-3000:]
    (said,) = (line for line in ended.output.splitlines() if line.startswith("cache "))
    assert said.startswith("cache True True ")
    assert not Path(said.split()[-1]).exists()  # the process took it away at its end
    assert not list((tmp_path / "here").iterdir())  # no folder "~" either
    assert ended.output.count("kernels are compiled again in every process") == 1
    assert ended.output.count("kernels take no measured tiles") == (home.startswith(str(tmp_path)))
