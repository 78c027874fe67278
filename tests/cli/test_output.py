"""What is printed goes into a pipe that nobody reads any more, or onto a full disk: the command ends, and says why."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tritonmoe as tm
from tritonmoe.cli import main

TINY = ["bench", "overlap", "--emulate", "2", "--model", "tiny", "--tokens", "9", "--rounds", "1", "--chunks", "1"]
COMMANDS = [
    pytest.param(["--help"], True, id="help"),
    pytest.param(["bench", "overlap", "--help"], True, id="help of a benchmark"),
    pytest.param(["env"], True, id="env"),
    pytest.param(["env"], False, id="env, unbuffered"),
    pytest.param(["models"], True, id="models"),
    pytest.param(["tune", "8", "2", "64", "64", "--show"], False, id="tune, unbuffered"),
    pytest.param(TINY, True, id="overlap"),
]


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def open_unread(monkeypatch: pytest.MonkeyPatch, name: str, is_buffered: bool) -> io.TextIOWrapper:
    stream = io.TextIOWrapper(os.fdopen(closed_pipe(), "wb", 8192), write_through=not is_buffered)
    monkeypatch.setattr(sys, name, stream)
    return stream


@pytest.mark.parametrize(("arguments", "is_buffered"), COMMANDS)
def test_nobody_reads_it(arguments: list[str], is_buffered: bool, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    stream = open_unread(monkeypatch, "stdout", is_buffered)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 141
    stream.close()  # what it still held goes nowhere
    assert sys.stdout is stream
    assert not [line for line in capsys.readouterr().err.splitlines() if not line.startswith("measuring ")]


def test_nobody_reads_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is printed by an emulated rank's thread."""
    with open_unread(monkeypatch, "stderr", is_buffered=False), pytest.raises(SystemExit) as ended:
        main(TINY)
    assert ended.value.code == 141


def test_files_are_written_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open_unread(monkeypatch, "stdout", is_buffered=False), pytest.raises(SystemExit, match="141"):
        main([*TINY, "--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png")])
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.png"}


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="tritonmoe: the output could not be written: No space left on device"):
            main(["env"])


def test_an_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        print("something")
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("tritonmoe.cli.env.collect", fail)
    with open_unread(monkeypatch, "stdout", is_buffered=True) as stream:
        with pytest.raises(ValueError, match="a mistake of ours"):
            main(["env"])
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@pytest.mark.thorough
def test_a_process_whose_output_nobody_reads() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    pipe = closed_pipe()
    command = [sys.executable, "-m", "tritonmoe", "env"]
    ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(pipe)
    assert (ended.returncode, ended.stderr) == (141, "")
