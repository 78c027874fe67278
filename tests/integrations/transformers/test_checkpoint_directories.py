"""Checkpoint directories from anybody: nothing outside of them is read, and what is absurd in them is said."""

import contextlib
import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_dense

from tritonmoe.integrations.transformers import load_upcycled
from tritonmoe.integrations.transformers.upcycle import checkpoint_files
from tritonmoe.integrations.transformers.upcycle.checkpoint import upcycle_checkpoint
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader, file_inside
from tritonmoe.integrations.transformers.upcycle.conversion import upcycle

OPTIONS = {"num_experts": 4, "top_k": 2}
INDEX = "model.safetensors.index.json"


def write_shard(path: Path, **tensors: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.tensor([value]) for name, value in tensors.items()}, path)


def write_index(directory: Path, **weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 8.0}, "weight_map": weight_map}))


def values(directory: Path) -> dict[str, float]:
    reader = CheckpointReader(directory)
    return {name: reader[name].item() for name in reader}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    write_shard(directory / "first.safetensors", a=1.0)
    write_shard(directory / "below" / "second.safetensors", b=2.0)
    write_index(directory, a="first.safetensors", b="below/second.safetensors")
    return directory


def refused(directory: Path, message: str) -> None:
    """No file or pipe elsewhere may be opened, or waited for."""
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        CheckpointReader(directory)
    assert time.perf_counter() - begun < 10


def test_a_reader_gives_what_the_files_hold(sharded: Path, tmp_path: Path) -> None:
    assert values(sharded) == {"a": 1.0, "b": 2.0}
    (tmp_path / "link").symlink_to(sharded)  # the reader's own, and no link inside
    assert values(tmp_path / "link") == {"a": 1.0, "b": 2.0}
    assert CheckpointReader(sharded).num_bytes == sum(path.stat().st_size for path in sharded.rglob("*.safetensors"))


NAMES = [
    *("../outside.safetensors", "/etc/passwd", "below/../first.safetensors", ".."),
    *("./first.safetensors", "below//second.safetensors", "first.safetensors/", "", "."),
    *("first\0.safetensors", "first\n.safetensors", "\ud800", "C:\\first.safetensors", "below\\second.safetensors"),
    *(3, None, True, ["first.safetensors"], {}, 1.5),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_index_names_files_of_its_directory(sharded: Path, name: object) -> None:
    write_shard(sharded.parent / "outside.safetensors", b=3.0)
    write_index(sharded, a="first.safetensors", b=name)
    refused(sharded, rf"sharded/{INDEX}: weight_map\['b'\] must ")


INDEXES = [
    ("[]", 'no "weight_map"'),
    ("{}", 'no "weight_map"'),
    ('{"weight_map": 3}', 'no "weight_map"'),
    ('{"weight_map": {}}', 'no "weight_map"'),
    ('{"weight_map": {"a": "first.safetensors", "a": "below/second.safetensors"}}', "key 'a' twice"),
    ('{"weight_map": {"a": NaN}}', r"\['weight_map'\]\['a'\] is NaN"),
    ('{"weight_map": {"a": 1' + "0" * 9999 + "}}", r"\['weight_map'\]\['a'\] is an integer of more than 64 bits"),
    ('{"weight_map": ' + "[" * 99_999, "nests deeper than 64"),
    ("\0", "half written"),
]


@pytest.mark.parametrize(("text", "message"), INDEXES, ids=lambda value: value[:40])
def test_absurd_indexes(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, rf"sharded/{INDEX} is damaged.*{message}")


def test_a_long_index_is_not_read(sharded: Path) -> None:
    os.truncate(sharded / INDEX, 1 << 40)
    refused(sharded, rf"{INDEX} is damaged: it has 1099511627776 bytes")


def test_links_out_of_a_directory_are_refused(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    first, index = sharded / "first.safetensors", sharded / INDEX
    first.rename(outside)
    first.symlink_to(outside)
    refused(sharded, rf"first\.safetensors is a link out of the directory, to {outside}: if that file is meant, copy")
    first.unlink()
    first.symlink_to("../outside.safetensors")
    refused(sharded, "is a link out of the directory")
    first.unlink()
    outside.rename(sharded / "below" / "first")
    first.symlink_to("below/first")  # it stays inside
    assert values(sharded) == {"a": 1.0, "b": 2.0}
    shutil.move(sharded / "below", sharded.parent / "elsewhere")
    (sharded / "below").symlink_to("../elsewhere")
    refused(sharded, "is a link out of the directory")
    index.rename(sharded.parent / "index")
    index.symlink_to("../index")
    refused(sharded, rf"{INDEX} is a link out of the directory")
    index.unlink()
    index.symlink_to("nothing")
    refused(sharded, rf"{INDEX} leads to no file: the checkpoint is half written")
    index.unlink()
    index.symlink_to(INDEX)
    with pytest.raises((ValueError, OSError)):
        CheckpointReader(sharded)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("below", ["", "unet"])
def test_links_of_hugging_faces_cache_are_followed(tmp_path: Path, is_shared: bool, below: str) -> None:
    """Relative ones into the repository's blobs, which may be links into those that all repositories share."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "2439f60" / below
    kept = cache / "blobs" / "ab" if is_shared else blobs
    for folder in (blobs, snapshot, kept):
        folder.mkdir(parents=True, exist_ok=True)
    write_shard(kept / "ab12", a=1.0)
    if is_shared:
        (blobs / "etag").symlink_to("../../blobs/ab/ab12")
    blob = blobs / ("etag" if is_shared else "ab12")
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    assert values(snapshot) == {"a": 1.0}
    (tmp_path / "model").symlink_to(snapshot)
    assert values(tmp_path / "model") == {"a": 1.0}

    token = cache / "token"
    token.write_text("secret")
    for target in (token, repository / "refs", "/etc/passwd"):
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(target)
        with pytest.raises(ValueError, match="is a link out of the directory"):
            file_inside(snapshot, "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    shutil.rmtree(blobs)
    blobs.symlink_to(tmp_path)  # a look-alike of a cache, as an archive may hold one
    write_shard(tmp_path / blob.name, a=3.0)
    refused(snapshot, "is a link out of the directory")


def test_what_only_looks_like_a_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models" / "snapshots" / "2439f60"
    snapshot.mkdir(parents=True)
    write_shard(tmp_path / "models" / "blobs" / "ab12", a=1.0)
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")
    refused(snapshot, "is a link out of the directory")


@pytest.mark.parametrize("name", ["first.safetensors", INDEX, "config.json"])
def test_pipes_and_devices_are_not_opened(sharded: Path, name: str) -> None:
    def read() -> None:
        file_inside(sharded, "config.json") if name == "config.json" else CheckpointReader(sharded)

    path = sharded / name
    for make, kind in ((os.mkfifo, "a pipe"), (os.mkdir, "a directory")):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(ValueError, match=rf"{name} must be a file, and is {kind}"):
            read()
        (path.rmdir if kind == "a directory" else path.unlink)()
    with contextlib.suppress(PermissionError):  # root makes devices
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # that of /dev/zero
        with pytest.raises(ValueError, match=rf"{name} must be a file, and is a device"):
            read()


def test_a_file_that_vanishes(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanishing(directory: Path, name: str) -> Path:
        path = file_inside(directory, name)
        if name == "first.safetensors":
            path.unlink()
        return path

    monkeypatch.setattr(checkpoint_files, "file_inside", vanishing)
    refused(sharded, r"first\.safetensors is damaged or half written \(No such file")


def test_two_checkpoints_in_one_directory(sharded: Path) -> None:
    """from_pretrained reads the single file, so to read the shards would be another model."""
    write_shard(sharded / "model.safetensors", a=3.0)
    refused(sharded, rf"holds two checkpoints, model\.safetensors and the shards of {INDEX}")
    write_index(sharded, a="model.safetensors", b="below/second.safetensors")
    assert values(sharded) == {"a": 3.0, "b": 2.0}


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    write_shard(sharded / "below" / "second.safetensors", b=2.0, a=5.0)
    refused(sharded, r"holds a twice, in below/second\.safetensors and in first\.safetensors")
    (sharded / "first.safetensors").unlink()
    os.link(sharded / "below" / "second.safetensors", sharded / "first.safetensors")  # one file under two names
    refused(sharded, "holds a twice")


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


TWICE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
HEADERS = {
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "damaged or half written .*offset"),
    "overlapping bytes": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "damaged or half written .*offset"),
    "bytes behind the end": ({"a": entry(0, 400, [100])}, 4, "damaged or half written"),
    "bytes of nobody": ({"a": entry(0, 4)}, 8, "damaged or half written"),
    "a hole": ({"a": entry(4, 8)}, 8, "damaged or half written .*offset"),
    "a negative offset": ({"a": entry(-4, 0)}, 4, "damaged or half written"),
    "a shape beyond 64 bits": ({"a": entry(0, 4, [2**62, 2**62])}, 4, "damaged or half written"),
    "an unknown dtype": ({"a": entry(0, 4, dtype="X32")}, 4, "damaged or half written"),
    "a name twice": (TWICE, 4, "key 'a' twice"),
    "a NUL in a name": ({"a\0b": entry(0, 4)}, 4, r"a tensor whose name can't be printed: 'a\\x00b'"),
    "a line break in a name": ({"a\nb": entry(0, 4)}, 4, r"a tensor whose name can't be printed: 'a\\nb'"),
    "NaN": ('{"a": NaN}', 0, "damaged or half written"),
    "depth": ("[" * 99_999, 0, "damaged or half written"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_files_of_tensors_that_are_none(tmp_path: Path, case: str) -> None:
    header, num_bytes, message = HEADERS[case]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    refused(tmp_path, rf"model\.safetensors .*{message}")


@pytest.mark.parametrize("length", [2**63, 10**8 + 1, 100])
def test_headers_that_are_longer_than_their_file(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    refused(tmp_path, r"model\.safetensors is damaged or half written")


# What a model is made of


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    make_dense("llama").save_pretrained(directory)
    return directory


def changed(directory: Path, copy: Path, name: str, change: object) -> Path:
    """Return a copy in which a JSON file says something else."""
    shutil.copytree(directory, copy)
    path = copy / name
    found = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps({**found, **change}))
    return copy


CONFIGS = [
    *(({"hidden_size": value}, "hidden_size") for value in ("x", None, 1.5, float("nan"), 10**30)),
    ({"hidden_size": -4}, "negative"),
    ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the checkpoint holds"),
    ({"hidden_act": "nothing"}, "nothing"),
    ({"rope_parameters": 3}, "rope_parameters"),
    ({"model_type": [1]}, "TypeError"),
    ({"model_type": "nothing", "auto_map": {"AutoConfig": "code.Config"}}, "contains custom code"),
    # some transformers refuse the type themselves
    *(({"architectures": value}, "(names no architecture|Field 'architectures')") for value in (3, "Llama", {}, [3])),
    ({"architectures": ["logging"]}, "names no architecture"),
    *(({"architectures": [name]}, "names no architecture") for name in ("pipeline", "LlamaConfig", "AutoModel", "")),
    ("[]", "must be an object"),
    ("null", "must be an object"),
    ('{"model_type": "llama", "model_type": "gpt2"}', "key 'model_type' twice"),
    ('{"model_type": "llama", "architectures": ' + "[" * 999 + "]" * 999 + "}", "nests deeper than 64"),
    ("{", "half written"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=lambda value: str(value)[:50])
def test_absurd_configs(dense: Path, tmp_path: Path, change: object, message: str) -> None:
    source = changed(dense, tmp_path / "dense", "config.json", change)
    (source / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ValueError, match=rf"(?s)dense.config\.json.*{message}"):
        upcycle_checkpoint(source, tmp_path / "moe", **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_config_that_is_elsewhere(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    config.rename(tmp_path / "config.json")
    config.symlink_to("../config.json")
    with pytest.raises(ValueError, match="is a link out of the directory"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **OPTIONS)


def test_other_files_are_not_copied_from_elsewhere(dense: Path, tmp_path: Path) -> None:
    """A result that is published must not hold what a link in its source led to."""
    source, secret = tmp_path / "dense", tmp_path / "id_rsa"
    shutil.copytree(dense, source)
    secret.write_text("secret")
    (source / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link out of the directory, to .*id_rsa"):
        upcycle_checkpoint(source, tmp_path / "moe", **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "id_rsa"}
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("generation_config.json")
    os.mkfifo(source / "pipe")
    upcycle_checkpoint(source, tmp_path / "moe", **OPTIONS)
    assert not (tmp_path / "moe" / "tokenizer.json").is_symlink()
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == (source / "generation_config.json").read_text()
    assert not (tmp_path / "moe" / "pipe").exists()


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("upcycled") / "moe"
    upcycle(make_dense("gpt2"), **OPTIONS).save_pretrained(directory)
    return directory


SETTINGS = {"num_experts": 4, "top_k": 2, "granularity": 1, "init": "copy", "shared_expert": False, "seed": 0}
DESCRIPTIONS = [
    *(
        ({"settings": {**SETTINGS, "num_experts": value}}, "num_experts must be")
        for value in (-1, True, "4", None, 4.0)
    ),
    ({"settings": {**SETTINGS, "num_experts": float("nan")}}, r"\['settings'\]\['num_experts'\] is NaN"),
    ({"settings": {**SETTINGS, "num_experts": 10**30}}, r"\['settings'\]\['num_experts'\] is an integer of more"),
    ({"settings": {**SETTINGS, "more": 1}}, "more"),
    ({"settings": [1]}, "TypeError"),
    *(({"blocks": value}, "blocks must be an object") for value in ({}, [], 3, None, "transformer")),
    *(({"blocks": {key: "transformer.h.0.mlp"}}, f"blocks.*{key}") for key in ("-1", "1_0", "00", "9" * 5000)),
    ({"blocks": {"0": 3}}, r"blocks\['0'\] must be the path of a block"),
    *(({"model_class": value}, "holds a .* which transformers") for value in (3, ["GPT2Model"], "logging", "pipeline")),
]


@pytest.mark.parametrize(("change", "message"), DESCRIPTIONS, ids=lambda value: str(value)[:50])
def test_absurd_descriptions(upcycled: Path, tmp_path: Path, change: dict, message: str) -> None:
    directory = changed(upcycled, tmp_path / "moe", "tritonmoe_upcycling.json", change)
    with pytest.raises(ValueError, match=rf"moe.*{message}"):
        load_upcycled(directory)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 10**12}, {"n_embd": 10**6, "n_head": 1}, {"n_inner": 10**12}], ids=str
)
def test_no_memory_is_taken_for_sizes_that_no_tensor_has(upcycled: Path, tmp_path: Path, change: dict) -> None:
    directory = changed(upcycled, tmp_path / "moe", "config.json", change)
    with pytest.raises(ValueError, match=r"moe does not fit its config\.json: .* in the file, .* in the model"):
        load_upcycled(directory)


def test_a_damaged_generation_config(tmp_path: Path) -> None:
    upcycle(make_dense("gpt2"), **OPTIONS).save_pretrained(tmp_path / "moe")
    path = tmp_path / "moe" / "generation_config.json"
    for text, message in (("[]", "must be an object"), ('{"max_length": NaN}', "NaN"), ("{", "half written")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"generation_config\.json.*{message}"):
            load_upcycled(tmp_path / "moe")
