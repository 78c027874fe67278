"""runtime/files.py: what is written is whole whoever else writes, and what is read is what a reader may expect."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tritonmoe as tm
from tritonmoe.runtime.files import MAX_DEPTH, check_regular, locked, parse_json, read_json, write_whole

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# write_whole


def test_files_are_whole(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for path in (file, link):
        write_whole(path, f"by {path.name}", "note")
        assert file.read_text() == f"by {path.name}"
    assert link.is_symlink()
    assert names_in(tmp_path) == {"file", "link"}
    write_whole(tmp_path / "new" / "folder" / "file", "content", "note")
    assert (tmp_path / "new" / "folder" / "file").read_text() == "content"
    longest = tmp_path / ("n" * 255)
    write_whole(longest, "content", "note")
    assert longest.read_text() == "content"


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    for path, reason in (
        (file / "file", "File exists|Not a directory"),
        (file / "folder" / "file", "Not a directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(OSError, match=f"the note could not be written: ({reason})"):
            write_whole(path, "new", "note")
    assert file.read_text() == "old"
    assert names_in(tmp_path) == {"file"}


def test_a_read_only_folder_is_said() -> None:
    """As another user where this one is root, whom no mode keeps out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "file").write_text("old")
        folder.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(OSError, match="the note could not be written: Permission denied"):
                write_whole(folder / "file", "new", "note")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert (folder / "file").read_text() == "old"
        assert names_in(folder) == {"file"}


def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new", "note")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"file"}


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: None) -> None:
    write_whole(tmp_path / "file", "content", "note")
    assert mode_of(tmp_path / "file") == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_file_keeps_its_mode(tmp_path: Path, umask: None, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    modes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode)))
    write_whole(path, "new", "note")
    assert mode_of(path) == mode
    assert modes == [mode]  # nor could anybody else read it on the way


def test_links_that_lie_in_wait_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, path = tmp_path / "other", tmp_path / "file"
    other.write_text("another's")
    (tmp_path / "file.part").symlink_to(other)
    write_whole(path, "content", "note")
    assert (path.read_text(), other.read_text()) == ("content", "another's")
    monkeypatch.setattr("tritonmoe.runtime.files.secrets.token_hex", lambda length: "guessed")
    (tmp_path / ".file.guessed.part").symlink_to(other)
    with pytest.raises(OSError, match="the note could not be written: File exists"):
        write_whole(path, "new", "note")
    assert (path.read_text(), other.read_text()) == ("content", "another's")


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    thread.start()
    write_whole(pipe, "content", "note")
    thread.join(20)
    assert read == [b"content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_two_writers_never_tear_a_file(tmp_path: Path) -> None:
    """Contents of two lengths: were they mixed, one would end in the other's tail."""
    path = tmp_path / "file"
    contents = ["a" * 300_000, "b" * 200_000]
    ends = threading.Event()
    failures: list[BaseException] = []

    def write(content: str) -> None:
        try:
            while not ends.is_set():
                write_whole(path, content, "note")
        except BaseException as error:
            failures.append(error)

    write_whole(path, contents[0], "note")
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    try:
        seen = {path.read_text() for _ in range(300)}
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert seen <= set(contents)
    assert names_in(tmp_path) == {"file"}


# locked


def test_a_lock_is_held_by_one(tmp_path: Path, umask: None) -> None:
    path, order = tmp_path / "lock", []

    def second() -> None:
        with locked(path):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(TimeoutError, match=r"has been locked by another process for 0\.1 s"), locked(path, 0.1):
            pass
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    assert mode_of(path) == 0o640


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from tritonmoe.runtime.files import locked
        with locked(Path({str(tmp_path / "lock")!r})):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, timeout=60).returncode == -signal.SIGKILL
    with locked(tmp_path / "lock", 0.0):
        pass


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another's")
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "other").read_text() == "another's"


# read_json


def test_json_is_what_was_written(tmp_path: Path) -> None:
    path, value = tmp_path / "file", {"ä": [1, -(2**63), 2**63 - 1, 1.5, None, True, {"b": []}], "inf": float("inf")}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))
        assert read_json(path) == value


NESTED = '{"a":' * (MAX_DEPTH - 1)
REFUSED = [
    ("", "is damaged or half written: Expecting value"),
    ('{"a": 1', "is damaged or half written: "),
    (b'{"a": "\xff"}', "is damaged or half written: .*decode"),
    ('{"a": {"b": 1, "b": 2}}', "it has the key 'b' twice"),
    ('{"a": [NaN]}', r"\['a'\]\[0\] is NaN"),
    ('{"a": {"b": 9223372036854775808}}', r"\['a'\]\['b'\] is an integer of more than 64 bits"),
    ('{"a": -' + "9" * 10_000 + "}", r"\['a'\] is an integer of more than 64 bits"),
    (NESTED + "[[1]]" + "}" * (MAX_DEPTH - 1), rf"nests deeper than {MAX_DEPTH}, at \['a'\]\['a'\]"),
    ("[" * 100_000, f"nests deeper than {MAX_DEPTH}"),
    ("[" * 100_000 + "]" * 100_000, f"nests deeper than {MAX_DEPTH}"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=lambda value: repr(value)[:20])
def test_absurd_json_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "absurd.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"absurd\.json.*{message}"):
        read_json(path)


def test_what_is_as_deep_and_as_long_as_may_be(tmp_path: Path) -> None:
    deepest = NESTED + "[1]" + "}" * (MAX_DEPTH - 1)
    assert parse_json(deepest.encode(), tmp_path)
    path = tmp_path / "file"
    path.write_text('"' + "a" * 98 + '"')
    assert read_json(path, 100) == "a" * 98
    with pytest.raises(ValueError, match="file is damaged: it has 100 bytes, and no such file needs more than 99"):
        read_json(path, 99)


def test_only_files_are_read(tmp_path: Path) -> None:
    """None of these may block, or give for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    begun = time.perf_counter()
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "zero", "a device"), (tmp_path, "a directory")):
        for read in (check_regular, read_json):
            with pytest.raises(ValueError, match=f"must be a file, and is {kind}"):
                read(path)
    assert time.perf_counter() - begun < 10
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
