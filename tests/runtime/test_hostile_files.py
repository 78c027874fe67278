"""Readers of files that somebody made to harm: whatever the bytes, ValueError, in little time and memory."""

import base64
import gzip
import io
import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tritonmoe.ops.backends import first_use
from tritonmoe.routing import RoutingRecording
from tritonmoe.runtime.files import MAX_DEPTH, check_plain, read_json
from tritonmoe.runtime.plain_pickle import load_tensors, read_plain_pickle
from tritonmoe.tools.benchmarks.kept_results import read_results
from tritonmoe.tools.benchmarks.workload import _read_ids
from tritonmoe.tools.cli import main
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.planner.cluster_file import read_cluster, to_toml
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.model_config import expert_load, find_model
from tritonmoe.tools.recording.rank_file import read_rank_file

MOST_S, MOST_BYTES = 5.0, 1 << 30


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the block takes more than MOST_S of this process, or MOST_BYTES of memory more than there were."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, before[1]))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - began < MOST_S


def doubled(levels: int = 60, kind: type = list) -> Any:
    """Return something that holds something twice that holds ...: as much as 2 to the 60 values, in 640 bytes."""
    found: Any = kind([1])
    for _ in range(levels):
        found = kind([found, found])
    return found


# Pickles

ENTRY = {
    "profiling_name": "nccl:all_to_all",
    "time_created_ns": 1000,
    "time_discovered_started_ns": 2000,
    "time_discovered_completed_ns": 3000,
    "process_group": ("0", "default"),
    "collective_seq_id": 1,
    "input_sizes": [[4, 4]],
    "input_dtypes": ["Float"],
}


@pytest.mark.parametrize("field", [*ENTRY, "duration_ms", "rank", "pg_config", "version"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_pickle_that_doubles_itself(field: str, kind: type, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    value = doubled(50, kind)
    if field in ("process_group", "input_sizes", "input_dtypes"):
        value = [value]
    entry, top = dict(ENTRY), {"version": "2.9", "pg_config": {"0": {"ranks": "[0, 1]"}}}
    (entry if field in ENTRY else top)[field] = {"0": value} if field == "pg_config" else value
    (tmp_path / "rank0.pickle").write_bytes(pickle.dumps({**top, "entries": [entry]}))
    with bounded():
        assert main(["doctor", str(tmp_path)]) == 2
    assert "written out it has more than" in capsys.readouterr().err


def test_the_pickle_of_a_flight_recorder_is_read(tmp_path: Path) -> None:
    """A list in several places is none that doubles itself."""
    frames = [{"name": "forward", "filename": "model.py", "line": 1}]
    entries = [{**ENTRY, "frames": frames, "collective_seq_id": number} for number in range(99)]
    found = {"version": "2.9", "pg_config": {"0": {"ranks": "[0, 1]"}}, "entries": entries}
    assert read_plain_pickle(pickle.dumps(found)) == found
    assert read_plain_pickle(pickle.dumps(found, protocol=2)) == found
    assert read_plain_pickle(pickle.dumps(found, protocol=0)) == found


def of_codes(*codes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(codes) + b"."


PAIRS = b"".join(b"2\x86" for _ in range(60))
"""A tuple of what lies on the stack, twice, and so on."""
HOSTILE = {
    "a tuple as a key": of_codes(b"}", b")", PAIRS, b"K\x01s"),
    "a tuple among keys": of_codes(b"}(", b")", PAIRS, b"K\x01u"),
    "a tuple in a set": of_codes(b"\x8f(", b")", PAIRS, b"\x90"),
    "a tuple in a frozenset": of_codes(b"(", b")", PAIRS, b"\x91"),
    "a buffer of a terabyte": of_codes(b"\x96", struct.pack("<Q", 1 << 40)),
    "a text of a terabyte": of_codes(b"\x8d", struct.pack("<Q", 1 << 40)),
    "an integer of a megabyte": of_codes(b"\x8b", struct.pack("<I", 1 << 20), b"\x7f" * (1 << 20)),
    "digits": of_codes(b"I" + b"9" * (1 << 20) + b"\n"),
    "a function": pickle.dumps(eval),
    "a call": of_codes(b"cos\nsystem\n(S'touch /tmp/never'\ntR"),
    "a call by instance": of_codes(b"(S'touch /tmp/never'\nios\nsystem\n"),
    "a state": of_codes(b"]}b"),
    "a list in itself": of_codes(b"]\x94h\x00a"),
    "nothing": b"",
    "only a mark": b"(",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(content: bytes) -> None:
    with bounded(), pytest.raises(ValueError, match=r"its pickle|it (names|has|sets)|Exceeds"):
        read_plain_pickle(content)
    assert not Path("/tmp/never").exists()


def test_an_index_of_2_to_the_31() -> None:
    """Python's reader in C makes a table of as many places."""
    with bounded():
        assert read_plain_pickle(of_codes(b"]r", struct.pack("<I", (1 << 31) - 1))) == []


def test_depth_and_size_of_plain_data() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    check_plain(deep, "it")
    for wrong in ([deep], {"a": {"b": deep}}, [deep, [deep]]):
        with pytest.raises(ValueError, match=f"it is damaged: it nests deeper than {MAX_DEPTH}"):
            check_plain(wrong, "it")
    check_plain(doubled(20), "it")
    with pytest.raises(ValueError, match="written out it has more than"):
        check_plain(doubled(40), "it")


# Recordings of the routing


def recording() -> dict[str, Any]:
    fields = {
        "num_experts": 4,
        "num_tokens": [2, 1],
        "topk_ids": torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.uint8),
        "topk_weights": torch.rand(3, 2),
        "is_recorded": torch.tensor([True, False, True]),
    }
    return {"format": "tritonmoe routing 1", "layers": {"a": fields}}


IMPOSSIBLE: dict[str, tuple[str, Any]] = {
    "negative tokens": ("num_tokens", [4, -1]),
    "fractional tokens": ("num_tokens", [1.5, 1.5]),
    "tokens that are true": ("num_tokens", [2, True]),
    "other tokens": ("num_tokens", [2, 2]),
    "no tokens": ("num_tokens", None),
    "fractional experts": ("num_experts", 4.5),
    "no experts": ("num_experts", 0),
    "experts in words": ("num_experts", "4"),
    "a mask of another length": ("is_recorded", torch.tensor([True, False])),
    "a mask of two columns": ("is_recorded", torch.ones(3, 2, dtype=torch.bool)),
    "a mask of numbers": ("is_recorded", torch.tensor([1, 0, 1])),
    "a mask that is a list": ("is_recorded", [True, False, True]),
    "weights that are integers": ("topk_weights", torch.ones(3, 2, dtype=torch.int64)),
    "weights of another shape": ("topk_weights", torch.rand(3, 1)),
    "weights in words": ("topk_weights", "weights"),
    "ids of another shape": ("topk_ids", torch.tensor([0, 1, 2])),
    "ids that are fractions": ("topk_ids", torch.rand(3, 2)),
    "ids outside": ("topk_ids", torch.tensor([[0, 1], [2, 4], [1, 0]])),
    "no ids": ("topk_ids", None),
    "ids with strides of 0": ("topk_ids", torch.zeros(1, 1, dtype=torch.uint8).expand(1 << 36, 8)),
    "weights with strides of 0": ("topk_weights", torch.zeros(1, 1).expand(3, 1 << 36)),
    "another object": ("num_tokens", Path("here")),
    "tokens that double themselves": ("num_tokens", doubled()),
}


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_recordings(field: str, value: Any, tmp_path: Path) -> None:
    content = recording()
    torch.save(content, tmp_path / "right.pt")
    assert RoutingRecording.load(tmp_path / "right.pt").num_tokens == [2, 1]
    content["layers"]["a"][field] = value
    torch.save(content, tmp_path / "wrong.pt")
    with bounded(), pytest.raises(ValueError, match=r"wrong\.pt is (no recording of the routing|damaged)"):
        RoutingRecording.load(tmp_path / "wrong.pt")
    del content["layers"]["a"][field]
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=f"wrong.pt is damaged: 'a': it lacks {field}"):
        RoutingRecording.load(tmp_path / "wrong.pt")


@pytest.mark.parametrize(
    "content", [[], 1, {"format": "tritonmoe routing 1"}, {"format": [], "layers": {}}, {"layers": {}}, None]
)
def test_files_without_layers(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="is no recording of the routing"):
        RoutingRecording.load(tmp_path / "wrong.pt")
    torch.save({"format": "tritonmoe routing 1", "layers": {1: {}, "a": content}}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="is damaged"):
        RoutingRecording.load(tmp_path / "wrong.pt")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a file of torch.save once more, with other parts."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_in_files_of_tensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.pt"
    torch.save({"ids": torch.zeros(3, 2, dtype=torch.int64)}, path)
    assert load_tensors(path)["ids"].shape == (3, 2)  # type: ignore[index]
    rewritten(path, lambda part, content: HOSTILE[name] if part.endswith("data.pkl") else content)
    with bounded(), pytest.raises(ValueError, match=r"ids\.pt is damaged"):
        load_tensors(path)


def test_packed_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.pt"
    torch.save(torch.zeros(1 << 20, dtype=torch.int64), path)
    rewritten(path, lambda part, content: content, zipfile.ZIP_DEFLATED)
    with bounded(), pytest.raises(ValueError, match="larger than the file"):
        load_tensors(path)
    with pytest.raises(ValueError, match="holds no ids"):
        _read_ids(path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.uint16, torch.bfloat16, torch.bool])
def test_tensors_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = {"a": torch.ones(3, 2, dtype=dtype), "b": torch.tensor(1, dtype=dtype), "c": torch.ones(0, 4, dtype=dtype)}
    torch.save(saved, tmp_path / "a.pt")
    found: Any = load_tensors(tmp_path / "a.pt")
    assert {name: (of.shape, of.dtype) for name, of in found.items()} == {
        name: (of.shape, of.dtype) for name, of in saved.items()
    }


# Packed files, and those that are larger than they can be


def test_packed_zeros(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A thousand times as much as the file: blanks in a trace, and behind a record of the Inspector."""
    for begin in (b'{"traceEvents": [', b'{"header": {}, "metadata": {}}'):
        with gzip.open(tmp_path / "rank0.json.gz", "wb") as file:
            file.write(begin)
            for _ in range(64):
                file.write(b" " * (1 << 20))
        with bounded():
            assert main(["doctor", str(tmp_path)]) == 2
        assert "unpack it yourself" in capsys.readouterr().err


def test_files_with_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte of nothing, of which a disk holds not one block."""
    path = tmp_path / "hole"
    path.touch()
    os.truncate(path, 1 << 40)
    monkeypatch.setattr(first_use, "_file", lambda: path)
    readers: list[Callable[[Path], object]] = [
        *(read_json, read_rank_file, read_results, read_cluster, find_model_of, _read_ids, load_tensors),
        *(RoutingRecording.load, lambda path: expert_load(path, 8), lambda path: first_use._kept(), read_traces),
    ]
    for read in readers:
        with bounded(), pytest.raises(ValueError, match=r"hole|holds no ids"):
            read(path)
    path = path.rename(tmp_path / "hole.pickle")
    with path.open("rb+") as file:
        file.write(b"\x80\x04")
    with bounded(), pytest.raises(ValueError, match=r"hole\.pickle is damaged: it has 1099511627776 bytes"):
        read_traces(path)


def find_model_of(path: Path) -> object:
    return find_model(str(path))


# TOML and JSON

TOML = to_toml(CLUSTERS["H100"]).encode()
WRONG_TOML = {
    "lists in lists": b"a = " + b"[" * 5000 + b"]" * 5000,
    "tables in tables": b"a = " + b"{a = " * 5000,
    "a name of many parts": b"a." * 400_000 + b"b = 1",
    "a table of many parts": b"[" + b"a." * 400_000 + b"b]",
    "a name of many parts inside": b"x = {" + b"a." * 400_000 + b"b = 1}",
    "digits": TOML.replace(b"gpus_per_node = 8", b"gpus_per_node = " + b"9" * 5000),
    "an infinity": TOML.replace(b"gpus_per_node = 8", b"gpus_per_node = inf"),
    "no number": TOML.replace(b"gpus_per_node = 8", b"gpus_per_node = nan"),
    "a long text": TOML.replace(b"gpus_per_node = 8", b'gpus_per_node = "' + b"9" * 100_000 + b'"'),
    "a key twice": TOML.replace(b"gpus_per_node = 8", b"gpus_per_node = 8\ngpus_per_node = 8"),
    "another encoding": b"name = '\xff'",
    "nothing": b"",
}


@pytest.mark.parametrize("content", WRONG_TOML.values(), ids=WRONG_TOML)
def test_clusters(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "cluster.toml"
    path.write_bytes(content)
    with bounded():
        assert main(["plan", "Qwen3-30B-A3B", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tritonmoe plan: {path}")
    assert (said.count("\n"), len(said) < 1200) == (1, True)


@pytest.mark.parametrize("number", ["1e400", "NaN", "Infinity", "9" * 5000, "true", "-1", '"1"'])
def test_numbers_of_pairs(number: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(f"[1, {number}]")
    with pytest.raises(ValueError, match=r"pairs\.json"):
        expert_load(path, 2)


def test_a_member_that_stands_twice_in_a_trace(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '{"distributedInfo": {"rank": 0}, "distributedInfo": {"rank": 1}, "traceEvents": []}'
    )
    with pytest.raises(ValueError, match="'distributedInfo' twice"):
        read_traces(tmp_path)


# Whatever the bytes

SEEDS: dict[str, list[bytes]] = {
    "trace": [
        b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 2, "tid": 1}]}',
        pickle.dumps({"version": "2", "entries": [ENTRY], "pg_config": {"0": {"ranks": "[0]"}}}, protocol=2),
        b'{"header": {"id": "a", "rank": 0, "n_ranks": 2}, "coll_perf": {"coll": "AllReduce", "coll_sn": 1, '
        b'"coll_msg_size_bytes": 8, "coll_exec_time_us": 5}}\n',
        gzip.compress(b'{"traceEvents": []}'),
    ],
    "cluster": [TOML],
    "json": [b'{"right": ["a"], "tiles": {"a": {"block_m": 1}}, "run": 1, "case": "a"}\n', b"[[0, 1], [1, 0]]"],
    "tensors": [],
}
_saved = io.BytesIO()
torch.save(recording(), _saved)
SEEDS["tensors"].append(_saved.getvalue())
READERS: dict[str, list[Callable[[Path], object]]] = {
    "trace": [read_traces, read_rank_file],
    "cluster": [read_cluster],
    "json": [read_json, read_results, find_model_of, lambda path: expert_load(path, 2), _read_ids],
    "tensors": [RoutingRecording.load, load_tensors],
}


PIECES = (b"NaN", b"inf", b"1e400", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"2\x86" * 60, b"\x1f\x8b")


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Return a file that is cut, of which parts are others, or that is made of anything."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 8, 1 << 20]))
        content[at : at + length] = draw(st.one_of(st.binary(max_size=12), st.sampled_from(PIECES)))
    return bytes(content)


@pytest.mark.parametrize("number", [15, pytest.param(400, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", READERS)
def test_any_bytes(kind: str, number: int, tmp_path: Path) -> None:
    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(content=damaged(SEEDS[kind]))
    @example(content=b"")
    @example(content=SEEDS[kind][0][: len(SEEDS[kind][0]) // 2])
    @example(content=bytes(range(256)) * 9)
    def check(content: bytes) -> None:
        path = tmp_path / "rank0.json"
        path.write_bytes(content)
        for read in READERS[kind]:
            try:
                with bounded():
                    read(path)
            except ValueError:
                pass

    check()


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "folder", tmp_path / "link"):
        for read in READERS[kind]:
            if path.is_dir() and read in (read_traces, find_model_of):  # which take folders
                continue
            with bounded(), pytest.raises(ValueError, match=r"must be a file|holds no ids|no recording"):
                read(path)


def headed(header: str, content: bytes = bytes(80)) -> str:
    """Return an npy file in base64, of five rows of two layers and two int32 ids."""
    text = header.encode().ljust(117) + b"\n"
    return base64.b64encode(np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text + content).decode()


def shaped(shape: str) -> str:
    return headed(f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}")


ROLLOUTS = {
    "2**40 rows": (lambda: shaped("(1099511627776, 2, 2)"), "is damaged: .* and 20 numbers follow"),
    "2**28 rows": (lambda: shaped("(268435456, 2, 2)"), "is damaged: .* and 20 numbers follow"),
    "-5 rows": (lambda: shaped("(-5, 2, 2)"), "is damaged"),
    "a nested header": (lambda: headed("[" * 110), "is damaged"),
    "no header": (lambda: headed(""), "is damaged"),
    "objects": (lambda: headed("{'descr': '|O', 'fortran_order': False, 'shape': (5, 2, 2), }"), "is damaged"),
    "stride 0 of an array": (
        lambda: np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (2**36, 2, 2), (0, 0, 0)),
        "must have 3 rows .*, got 68719476736: ",
    ),
    **{
        f"stride 0 of {dtype}": (
            lambda dtype=dtype: torch.zeros(1, 1, 1, dtype=dtype).expand(2**36, 2, 2),
            "must have 3 rows .*, got 68719476736: ",
        )
        for dtype in (torch.int32, torch.uint16)
    },
    "uint64 that wraps": (lambda: np.full((3, 2, 2), 2**64 - 1, np.uint64), r"an unsigned id of 2\*\*63 or more"),
    "uint64 in a file": (
        lambda: headed("{'descr': '<u8', 'fortran_order': False, 'shape': (3, 2, 2), }", b"\xff" * 96),
        r"an unsigned id of 2\*\*63 or more",
    ),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_that_claim_more_than_they_are(name: str) -> None:
    make, rule = ROLLOUTS[name]
    like = RoutingRecording()
    for layer in ("a", "b"):
        like.add(layer, torch.tensor([[0, 1]]), 8)
    with bounded(), pytest.raises(ValueError, match=rule):
        RoutingRecording.from_rollout([make()], torch.ones(1, 4, dtype=torch.bool), like)
