"""upcycle_checkpoint() and `tritonmoe upcycle`: from files to files, all or nothing."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_models import INPLACE, NATIVE, make_batch, make_dense

from tritonmoe.integrations.transformers import load_upcycled
from tritonmoe.integrations.transformers.upcycle import checkpoint_files
from tritonmoe.integrations.transformers.upcycle.checkpoint import upcycle_checkpoint
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import ShardWriter, parse_size
from tritonmoe.integrations.transformers.upcycle.conversion import upcycle
from tritonmoe.tools.cli import main

OPTIONS = {"num_experts": 4, "top_k": 2}


def save_dense(name: str, directory: Path, max_shard_size: str = "20KB", **changes) -> None:
    model = make_dense(name, **changes)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "notes.bin").write_bytes(b"weights of another format")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def dense_of(name: str, directory: Path):
    return (NATIVE | INPLACE)[name][0].from_pretrained(directory)


def load(directory: Path, like):
    if (directory / "tritonmoe_upcycling.json").exists():
        return load_upcycled(directory)
    return type(like).from_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NATIVE),
        ("llama", {"granularity": 2, "init": "drop"}),
        ("qwen3", {"layers": [1], "init": "noise"}),
        ("qwen2", {"shared_expert": True}),
        ("llama", {"target": "inplace"}),
        *((name, {"init": "noise"}) for name in ("gpt2", "bert", "t5", "vit", "bart")),
        ("opt", {"granularity": 2, "shared_expert": True}),
    ],
    ids=str,
)
def test_the_tensors_are_those_of_the_model_in_memory(name, options, tmp_path):
    save_dense(name, tmp_path / "dense")
    before = contents(tmp_path / "dense")
    seen = []
    upcycle_checkpoint(
        tmp_path / "dense",
        tmp_path / "moe",
        max_shard_size="20KB",
        progress=lambda done, total: seen.append((done, total)),
        **{**OPTIONS, **options},
    )
    dense = dense_of(name, tmp_path / "dense")
    expected = upcycle(dense, **{**OPTIONS, **options})
    actual = load(tmp_path / "moe", expected)
    states = expected.state_dict(), actual.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    batch = make_batch(dense)
    with torch.no_grad():
        outputs = [model.eval()(**batch)[0] for model in (expected, actual)]
    torch.testing.assert_close(*outputs)

    assert contents(tmp_path / "dense") == before
    written = sorted(path.name for path in (tmp_path / "moe").iterdir())
    assert sum(path.endswith(".safetensors") for path in written) > 2
    assert "tokenizer_config.json" in written
    assert "notes.bin" not in written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert seen[0][0] < seen[-1][1]


def test_files_look_as_save_pretrained_writes_them(tmp_path):
    save_dense("llama", tmp_path / "dense")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", max_shard_size="20KB", **OPTIONS)
    upcycle(dense_of("llama", tmp_path / "dense"), **OPTIONS).save_pretrained(tmp_path / "saved")
    names = []
    for directory in ("moe", "saved"):
        found = {}
        for path in (tmp_path / directory).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= {key: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118
        names.append(found)
    assert names[0] == names[1]
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names[0].keys()
    configs = [json.loads((tmp_path / directory / "config.json").read_text()) for directory in ("moe", "saved")]
    assert configs[0] == configs[1]


def test_bf16_and_tied_embeddings(tmp_path):
    make_dense("llama", tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "dense")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **OPTIONS)
    assert not (tmp_path / "moe" / "model.safetensors.index.json").exists()
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "moe")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = upcycle(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense"), **OPTIONS)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in expected.state_dict().items())


def test_a_base_model_without_its_prefix(tmp_path):
    model = make_dense("gpt2")
    model.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **OPTIONS)
    loaded = load_upcycled(tmp_path / "moe")
    expected = upcycle(model, **OPTIONS)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in expected.state_dict().items())


def test_memory_holds_one_block_and_one_shard(tmp_path, monkeypatch):
    """What is pending never exceeds a shard, and every tensor is asked for once."""
    save_dense("llama", tmp_path / "dense", num_hidden_layers=4)
    asked: list[str] = []
    pending: list[int] = []
    get = checkpoint_files.CheckpointReader.__getitem__
    add = ShardWriter.add

    def counted_get(self, name):
        asked.append(name)
        return get(self, name)

    def counted_add(self, name, tensor):
        add(self, name, tensor)
        pending.append(self._pending_bytes)

    monkeypatch.setattr(checkpoint_files.CheckpointReader, "__getitem__", counted_get)
    monkeypatch.setattr(ShardWriter, "add", counted_add)
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", max_shard_size=20_000, **OPTIONS)
    assert len(asked) == len(set(asked)) == len(make_dense("llama", num_hidden_layers=4).state_dict())
    assert max(pending) <= 20_000


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space")
def test_a_model_larger_than_half_of_the_memory(tmp_path):
    """It works in memory that holds neither model twice, and in which upcycle() itself has no room."""
    code = f"""
        import resource
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from tritonmoe.integrations.transformers import upcycle, upcycle_checkpoint

        torch.set_num_threads(1)

        def save(num_layers, directory):
            config = LlamaConfig(vocab_size=64, hidden_size=192, intermediate_size=512, num_attention_heads=4,
                                 num_hidden_layers=num_layers)
            model = LlamaForCausalLM(config)
            model.save_pretrained(directory, max_shard_size="5MB")
            return sum(parameter.numel() * 4 for parameter in model.parameters())

        def address_space():
            return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

        options = dict(num_experts=8, top_k=2)
        folder = {str(tmp_path)!r}
        save(1, folder + "/small")
        upcycle_checkpoint(folder + "/small", folder + "/small-moe", **options)  # what it loads once
        dense_bytes = save(24, folder + "/dense")
        memory = int(1.9 * dense_bytes)
        # the files of the dense model are mapped whole; pages that were read are not memory in use
        limit = address_space() + dense_bytes + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        seen = []
        upcycle_checkpoint(folder + "/dense", folder + "/moe", max_shard_size="10MB",
                           progress=lambda done, total: seen.append(total), **options)
        assert seen[0] > 2 * memory, (seen[0], memory)
        try:
            upcycle(LlamaForCausalLM.from_pretrained(folder + "/dense"), **options)
        except (MemoryError, RuntimeError) as error:
            print("no room:", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no room: " in done.stdout
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 10


def test_the_command_says_how_far_it_is(tmp_path, capsys):
    save_dense("llama", tmp_path / "dense")
    capsys.readouterr()
    sizes = ["--num-experts", str(OPTIONS["num_experts"]), "--top-k", str(OPTIONS["top_k"])]
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), *sizes]) == 0
    assert capsys.readouterr().err.splitlines() == ["upcycling: 0.00 GB ...", "upcycling: done in 0 s"]
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "silent", **OPTIONS)
    assert capsys.readouterr().err == ""


# Failures leave nothing


def fails_after(monkeypatch, number: int, error: BaseException) -> None:
    import safetensors.torch

    save_file = safetensors.torch.save_file
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > number:
            args[1].write_bytes(b"half a shard")
            raise error
        return save_file(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", failing)


FULL_DISK = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "raised"), [(FULL_DISK, OSError), (KeyboardInterrupt(), KeyboardInterrupt)], ids=repr
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_failed_write_leaves_no_output(name, error, raised, tmp_path, monkeypatch):
    save_dense(name, tmp_path / "dense")
    before = contents(tmp_path / "dense")
    fails_after(monkeypatch, 2, error)
    with pytest.raises(raised):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", max_shard_size="20KB", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert contents(tmp_path / "dense") == before


def test_a_failed_save_of_a_model_leaves_no_output(tmp_path, monkeypatch):
    moe = upcycle(make_dense("gpt2"), **OPTIONS)
    fails_after(monkeypatch, 1, FULL_DISK)
    with pytest.raises(OSError, match="No space left"):
        moe.save_pretrained(tmp_path / "moe", max_shard_size="20KB")
    assert not list(tmp_path.iterdir())


def test_a_write_that_the_system_refuses(tmp_path, capsys):
    """The real thing: files may not grow beyond 4 KB, so the first shard can't be written."""
    resource = pytest.importorskip("resource")
    save_dense("llama", tmp_path / "dense")
    before = contents(tmp_path / "dense")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "moe"), "--num-experts", "4", "--top-k", "2"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        status = main(["upcycle", *arguments])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    error = capsys.readouterr().err
    assert f"could not write 0.00 GB to {tmp_path}" in error
    assert "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert contents(tmp_path / "dense") == before


@pytest.mark.thorough
def test_a_killed_process_leaves_nothing_that_loads(tmp_path):
    save_dense("llama", tmp_path / "dense")
    code = f"""
        import os, signal
        import safetensors.torch
        from tritonmoe.integrations.transformers import upcycle_checkpoint

        save_file, calls = safetensors.torch.save_file, []
        def killed(*args, **kwargs):
            calls.append(save_file(*args, **kwargs))
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = killed
        upcycle_checkpoint({str(tmp_path / "dense")!r}, {str(tmp_path / "moe")!r}, num_experts=4, top_k=2,
                           max_shard_size="20KB")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "moe").exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name != "dense")
    assert left.name.startswith(".moe.unfinished-")
    assert not any(path.suffix == ".safetensors" for path in left.iterdir())
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(left)
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **OPTIONS)  # and the next one removes it
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "moe"}


def test_a_disk_without_room_is_seen_before(tmp_path, monkeypatch):
    save_dense("llama", tmp_path / "dense")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"but the disk has 0.00 GB free"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_sources_that_are_not_whole(tmp_path):
    def refused(directory: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            upcycle_checkpoint(directory, tmp_path / "moe", **OPTIONS)
        assert not (tmp_path / "moe").exists()

    refused(tmp_path / "nowhere", "no such directory")
    refused(Path(__file__), "it is a file")
    with pytest.raises(ValueError, match=r"a shard size is a number of bytes, or like '500MB' or '5GB'; got 1\.5"):
        upcycle_checkpoint(tmp_path, tmp_path / "moe", **OPTIONS, max_shard_size=1.5)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "it holds nothing")
    save_dense("llama", tmp_path / "whole")
    shards = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    for name, damage, message in (
        (
            "shard",
            lambda d: (d / shards[1]).unlink(),
            f"is half written: .* names {shards[1]}, 1 of {len(shards)} shards",
        ),
        ("cut", lambda d: os.truncate(d / shards[1], 500), f"{shards[1]} is damaged or half written"),
        ("index", lambda d: os.truncate(d / "model.safetensors.index.json", 50), "is damaged .*half written"),
        ("list", lambda d: (d / "model.safetensors.index.json").write_text("[1]"), "is damaged .*half written"),
        ("config", lambda d: (d / "config.json").unlink(), "has no config.json"),
        ("swapped", lambda d: shutil.copy(d / shards[0], d / shards[1]), f"twice, in {shards[0]} and in {shards[1]}"),
        (
            "fewer",
            lambda d: save_file({"another": torch.ones(1)}, d / shards[1], metadata={"format": "pt"}),
            "which no shard holds",
        ),
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        damage(tmp_path / name)
        refused(tmp_path / name, message)
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(tmp_path / "other", r"does not hold the tensors of LlamaForCausalLM: .* is missing")
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    refused(tmp_path / "other", "names no architecture")
    for size in ("hidden_size", "intermediate_size", "vocab_size"):
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, size: 2 * config[size]}))
        refused(tmp_path / "other", r"does not fit its config\.json: .* in the file, .* in the model")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantised_sources(name, tmp_path):
    def refused(directory: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            upcycle_checkpoint(directory, tmp_path / "moe", **OPTIONS)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", directory.name}
        shutil.rmtree(directory)

    make_dense(name).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    first = next(key for key in tensors if ".mlp." in key)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):  # the config doesn't say so
        shutil.copytree(tmp_path / "whole", tmp_path / "file")
        changed = tensors | {first: tensors[first].to(dtype)}
        save_file(changed, tmp_path / "file" / "model.safetensors", metadata={"format": "pt"})
        refused(tmp_path / "file", rf"is quantised \({first} is {dtype}\)")
    for method in ("bitsandbytes", "compressed-tensors", "fp8"):  # with tensors that the dense model doesn't have
        shutil.copytree(tmp_path / "whole", tmp_path / "config")
        path = tmp_path / "config" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
        changed = tensors | {first: tensors[first].to(torch.uint8), f"{first}.absmax": torch.ones(3)}
        save_file(changed, tmp_path / "config" / "model.safetensors", metadata={"format": "pt"})
        refused(tmp_path / "config", f"is quantised .*config: {method}")


def test_a_half_written_result_does_not_load(tmp_path):
    upcycle(make_dense("gpt2"), **OPTIONS).save_pretrained(tmp_path / "moe", max_shard_size="20KB")
    shards = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match="is half written"):
        load_upcycled(tmp_path / "moe")


def test_a_damaged_result_does_not_load(tmp_path):
    upcycle(make_dense("gpt2"), **OPTIONS).save_pretrained(tmp_path / "moe")
    name = "tritonmoe_upcycling.json"
    description = json.loads((tmp_path / "moe" / name).read_text())
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    for number, (file, text, message) in enumerate(
        [
            *(
                (name, text, rf"{name} is damaged .*half written")
                for text in ("", '{"form', "[]", "{}", '{"format": 1}')
            ),
            (name, json.dumps({**description, "format": 2, "settings": 3}), "has format 2, this version reads 1"),
            (name, json.dumps({**description, "model_class": "Nothing"}), "holds a Nothing, which transformers"),
            (
                name,
                json.dumps({**description, "blocks": {"0": "transformer.h.7"}}),
                r"has no transformer\.h\.7\.router",
            ),
            ("config.json", None, "has no config.json"),
            ("config.json", json.dumps({**config, "n_embd": 16}), "does not fit its config.json"),
        ]
    ):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "moe", directory)
        if text is None:
            (directory / file).unlink()
        else:
            (directory / file).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_upcycled(directory)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_what_from_pretrained_leaves_out_is_left_out(name, tmp_path, caplog):
    """Real checkpoints of GPT-2 and BERT hold buffers of older releases."""
    save_dense(name, tmp_path / "dense", max_shard_size="1GB")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"h.0.attn.bias": torch.ones(3)}, path, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **OPTIONS)
    assert "left out, as from_pretrained does" in caplog.text
    assert "h.0.attn.bias" in caplog.text
    expected = upcycle(dense_of(name, tmp_path / "dense"), **OPTIONS)
    actual = load(tmp_path / "moe", expected).state_dict()
    assert actual.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.state_dict().items())


def test_destinations_and_sizes(tmp_path):
    save_dense("llama", tmp_path / "dense")
    before = contents(tmp_path / "dense")
    for inside in (tmp_path / "dense" / "moe", tmp_path / "dense" / "a" / ".." / "moe"):
        with pytest.raises(ValueError, match=r"lies in .*, which is not to be changed"):
            upcycle_checkpoint(tmp_path / "dense", inside, **OPTIONS)
    assert contents(tmp_path / "dense") == before
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "dense", **OPTIONS)
    (tmp_path / "empty").mkdir()
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "empty", **OPTIONS)
    assert (tmp_path / "empty" / "config.json").exists()
    assert parse_size("1.5MB") == 1_500_000
    assert parse_size(7) == 7
    for size in ("5", "5TB", "xGB", "-1GB", 0):
        with pytest.raises(ValueError, match="shard"):
            parse_size(size)


# Command


def test_command(tmp_path, capsys):
    save_dense("llama", tmp_path / "dense")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "moe"), "--num-experts", "4", "--top-k", "2"]
    assert main(["upcycle", *arguments]) == 0
    assert "mixtral, load it with from_pretrained" in capsys.readouterr().out
    assert main(["upcycle", *arguments]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    arguments[1] = str(tmp_path / "inplace")
    assert main(["upcycle", *arguments, "--layers", "0-1", "--target", "inplace", "--granularity", "2"]) == 0
    assert "load_upcycled" in capsys.readouterr().out
    arguments[1] = str(tmp_path / "odd")
    assert main(["upcycle", *arguments, "--granularity", "3"]) == 2
    assert "multiple of granularity" in capsys.readouterr().err
    assert not (tmp_path / "odd").exists()


def test_a_mixture_of_experts_is_refused(tmp_path):
    """Also one whose files name its experts otherwise than the model does."""
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "num_local_experts": 4}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "mixtral")
    upcycle(make_dense("gpt2"), 4, 2).save_pretrained(tmp_path / "inplace")
    with pytest.raises(ValueError, match="MixtralForCausalLM has experts already"):
        upcycle_checkpoint(tmp_path / "mixtral", tmp_path / "out", num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="holds a model that was upcycled already"):
        upcycle_checkpoint(tmp_path / "inplace", tmp_path / "out", num_experts=4, top_k=2)
    assert not (tmp_path / "out").exists()
