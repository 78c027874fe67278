"""unpublished(): all or nothing, whoever else writes or was killed while writing."""

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import tritonmoe as tm
from tritonmoe.integrations.transformers.upcycle.checkpoint_destination import unpublished

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}
HOST = socket.gethostname()
DEAD = 2**22 + 1
"""No process of Linux has a number so high."""


def publish(directory: Path, content: str = "content") -> None:
    with unpublished(directory) as temporary:
        (temporary / "file").write_text(content)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def start_writer(directory: Path) -> subprocess.Popen:
    """Start a process that is in the midst of writing when this returns, and goes on when it is told to."""
    code = f"""if True:
        import sys
        from pathlib import Path
        from tritonmoe.integrations.transformers.upcycle.checkpoint_destination import unpublished
        with unpublished(Path({str(directory)!r})) as temporary:
            (temporary / "file").write_text("by another")
            print(temporary.name, flush=True)
            sys.stdin.readline()
    """
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.thorough
def test_a_writer_that_lives_is_left_alone_and_what_it_leaves_when_killed_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with start_writer(out) as writer:
        assert writer.stdout is not None
        name = writer.stdout.readline().strip()
        assert name == f".out.unfinished-{writer.pid}-{HOST}"
        with caplog.at_level(logging.WARNING, "tritonmoe"):
            publish(out)
            assert names_in(tmp_path) == {"out", name}
            writer.send_signal(signal.SIGSTOP)  # nor does it have to run
            publish(tmp_path / "other")
            (out / "file").unlink()
            publish(out)
            assert names_in(tmp_path) == {"out", "other", name}
            assert caplog.text == ""
            writer.kill()
            writer.wait()
            (out / "file").unlink()
            publish(out)
        assert names_in(tmp_path) == {"out", "other"}
        assert f"removing {tmp_path / name}, left by a process that was killed" in caplog.text


@pytest.mark.thorough
def test_of_two_that_write_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start_writer(out) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        publish(out)
        _, said = writer.communicate("\n", timeout=60)
    assert f"FileExistsError: {out} was written by another process in the meantime: choose another directory" in said
    assert (out / "file").read_text() == "content"
    assert names_in(tmp_path) == {"out"}
    with pytest.raises(FileExistsError, match="was written by another process"), unpublished(tmp_path / "two"):
        publish(tmp_path / "two", "by the first")  # of one process, too
    assert (tmp_path / "two" / "file").read_text() == "by the first"
    assert names_in(tmp_path) == {"out", "two"}


ABANDONED = {
    "dead": f"{DEAD}-{HOST}",
    "dead, third": f"{DEAD}-{HOST}_3",
    "own": f"{os.getpid()}-{HOST}",
    "dead, no host": f"{DEAD}",
    "own, no host": f"{os.getpid()}",
    "no number of a process": f"{10**30}",
}
"""This process's number: a container that is started anew numbers alike. No host: left by an older version."""
KEPT = {
    # Of other machines that share the disk.
    "elsewhere": f"{DEAD}-elsewhere",
    "own number, host of a longer name": f"{os.getpid()}-{HOST}2",
    "empty host": f"{DEAD}-",
    # Of processes that run, if only under its number.
    "parent": f"{os.getppid()}-{HOST}",
    "parent, no host": f"{os.getppid()}",
    "first, no host": "1",
    "first": f"1-{HOST}",
    "negative": "-5",
    "word": "x",
    "suffix": f"{DEAD}.tar",
}


@pytest.mark.parametrize("ending", [*ABANDONED.values(), *KEPT.values()], ids=[*ABANDONED, *KEPT])
def test_whose_leftovers_are_removed(tmp_path: Path, ending: str) -> None:
    out, left = tmp_path / "out", tmp_path / f".out.unfinished-{ending}"
    others = {f".out2.unfinished-{DEAD}", f".xout.unfinished-{DEAD}", "out.unfinished-1"}
    for name in (left.name, *others):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "file").write_text("half a shard")
    publish(out)
    assert names_in(tmp_path) == {"out", *others, *({left.name} if ending in KEPT.values() else ())}
    assert names_in(out) == {"file"}


def test_the_lock_tells_where_numbers_do_not(tmp_path: Path) -> None:
    """A container on the same machine, of the same name, whose process has the same number."""
    left = tmp_path / f".out.unfinished-{os.getpid()}-{HOST}"
    left.mkdir()
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with unpublished(tmp_path / "out") as temporary:
        assert temporary.name == f"{left.name}_1"
    assert names_in(tmp_path) == {"out", left.name}
    os.close(descriptor)
    publish(tmp_path / "other")
    assert left.exists()
    publish(tmp_path / "out")
    assert names_in(tmp_path) == {"out", "other"}


def test_links_in_its_place_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, link = tmp_path / "kept", tmp_path / f".out.unfinished-{DEAD}"
    kept.mkdir()
    (kept / "file").write_text("another's")
    link.symlink_to(kept)
    (tmp_path / f".out.unfinished-{DEAD + 1}").write_text("a file")
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        publish(tmp_path / "out")
    assert caplog.text == ""
    assert link.is_symlink()
    assert (kept / "file").read_text() == "another's"


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of the network's: nothing can be told to be abandoned, and nothing is in the way."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / f".out.unfinished-{os.getpid()}-{HOST}"
    left.mkdir()
    publish(tmp_path / "out")
    assert names_in(tmp_path) == {"out", left.name}


def test_a_removal_between_making_and_locking_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, removed = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob(".out*"))
            removed[0].rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    publish(tmp_path / "out")
    assert len(removed) == 1
    assert names_in(tmp_path / "out") == {"file"}


@pytest.mark.parametrize("is_taken_in", [False, True])
def test_all_is_on_the_disk_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken_in: bool
) -> None:
    out, synced = tmp_path / "out", []
    if is_taken_in:
        out.mkdir()
        (out / "entry").write_text("old")

    def sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        assert (out / "entry").read_text() == "old" if is_taken_in else not out.exists()

    monkeypatch.setattr(os, "fsync", sync)
    with unpublished(out, "entry") as temporary:
        for name in ("model.safetensors", "entry"):
            (temporary / name).write_text("new")
    assert sorted(synced) == sorted((out / name).stat().st_ino for name in ("model.safetensors", "entry"))
    assert (out / "entry").read_text() == "new"


def test_of_two_that_are_taken_in_one_waits(tmp_path: Path) -> None:
    """Were their files mixed, the directory would hold a shard of the one and the index of the other."""
    (tmp_path / "state").write_text("Trainer's")
    done: list[str] = []

    def save() -> None:
        with unpublished(tmp_path, "entry") as temporary:
            (temporary / "entry").write_text("new")
        done.append("saved")

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    thread = threading.Thread(target=save)
    thread.start()
    thread.join(0.3)
    assert not done
    assert not (tmp_path / "entry").exists()
    os.close(descriptor)
    thread.join(20)
    assert done == ["saved"]
    assert names_in(tmp_path) == {"state", "entry"}


def make_file(path: Path) -> None:
    path.write_text("a file")


def make_link(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [make_file, make_link], ids=["file", "link"])
def test_what_takes_its_place_meanwhile_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    with pytest.raises(FileExistsError, match="was written by another process"), unpublished(tmp_path / "out"):
        make(tmp_path / "out")
    assert names_in(tmp_path) == {"out"}
