"""What is printed: where nobody reads it, or a disk is full, the command ends; no name of others moves the cursor."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tritonmoe as tm
from tritonmoe.tools.cli import main
from tritonmoe.tools.planner.cluster_file import to_toml
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.report.terminal import TextStyle, heat_map, visible

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


@pytest.mark.thorough
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

    monkeypatch.setattr("tritonmoe.tools.cli.env.collect", fail)
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


# Names that a terminal would obey

OBEYED = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\r\nHEALTHY"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\r\nHEALTHY"


def lines_of(capsys: pytest.CaptureFixture) -> list[str]:
    """Return all lines that were printed, none of which a terminal obeys."""
    said = capsys.readouterr()
    lines = (said.out + said.err).split("\n")
    assert all(character.isprintable() for line in lines for character in line)
    assert "HEALTHY" not in lines
    return lines


@pytest.mark.parametrize("command", [["doctor"], ["plan", "Qwen3-30B-A3B"], ["plan"], ["upcycle"], ["probe", "--out"]])
def test_names_on_the_command_line(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if command[0] == "probe":
        command = ["plan", "--new-cluster"]
        path = tmp_path / f"missing{OBEYED}" / "folder"
        path.parent.touch()
    else:
        path = tmp_path / f"name{OBEYED}"
        path.write_bytes(b"[")
    arguments = [*command, str(path)]
    try:
        status = main(arguments if command != ["plan"] else [*arguments, "H100"])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert any(SHOWN in line for line in lines_of(capsys)) or command[0] != "doctor"


def test_a_name_that_is_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\xfe.json"))
    path.write_bytes(b"[")
    assert main(["doctor", str(path)]) == 2
    assert any(r"/\udcff\udcfe.json" in line for line in lines_of(capsys))


def test_names_in_a_folder_and_in_its_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The run is judged, and its hosts are named."""
    folder = tmp_path / f"run{OBEYED}"
    shutil.copytree(Path(__file__).parents[1] / "doctor" / "data" / "gloo_ddp", folder)
    (folder / f"notes{OBEYED}.txt").write_text("notes")
    assert main(["doctor", str(folder), "--html", str(tmp_path / "page.html")]) in (0, 1)
    lines = lines_of(capsys)
    assert any(f"run{SHOWN}:" in line for line in lines)
    page = (tmp_path / "page.html").read_text()
    assert all(character.isprintable() or character == "\n" for character in page)


@pytest.mark.thorough
def test_names_in_a_model_and_in_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = {
        "model_type": f"mine{OBEYED}</script>", "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2,
        "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = tmp_path / "page.html"
    assert main(["plan", str(tmp_path), "H100", "--nodes", "1", "--ep", "8", "--html", str(page)]) == 0
    assert any(SHOWN in line for line in lines_of(capsys))
    assert page.read_text().count("</script>") == page.read_text().count("<script")
    assert OBEYED not in page.read_text()
    text = to_toml(CLUSTERS["H100"]).replace('name = "', 'name = "\\u001b[2J\\n', 1)
    (tmp_path / "cluster.toml").write_text(text)
    assert main(["plan", "Qwen3-30B-A3B", str(tmp_path / "cluster.toml")]) == 2
    assert any("name must be a text that can be printed" in line for line in lines_of(capsys))


def test_our_own_colours_are_obeyed() -> None:
    drawn = heat_map([[1, 2], [3, 4]], TextStyle(80, color=True), row="from", column="to")
    assert "\x1b[48;5;" in drawn
    assert visible(drawn) == drawn
    assert visible("\x1b[48;5;231;38;5;231m\x1b[8m") == r"\x1b[48;5;231;38;5;231m\x1b[8m"
    assert visible("tabs\tand ends\nstay, é 中 ░▒▓█ too") == "tabs\tand ends\nstay, é 中 ░▒▓█ too"
