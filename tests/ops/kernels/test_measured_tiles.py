"""Measured tile configurations: keys, the cache file, and that a launch takes them."""

import dataclasses
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton

from tritonmoe.ops import aot
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.config import TileConfig, refusal
from tritonmoe.tools.benchmarks.tuning import candidates_of_layer

KEY = f"sm_90 bfloat16 up 1024x2048 rows 128 triton {triton.__version__}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONMOE_CACHE_DIR", str(tmp_path / "cache"))
    measured_tiles.kept.cache_clear()
    yield tmp_path / "cache" / "tiles.json"
    measured_tiles.kept.cache_clear()


def up_launch(**changes):
    variant = aot.Variant(**changes)
    return aot.record_launches(variant, aot.TARGETS["sm_90"])["up up"]


def test_key():
    assert measured_tiles.tile_key("sm_90", torch.bfloat16, "up", 768, 2048, 128) == KEY
    any_rows = measured_tiles.tile_key("gfx942", torch.float16, "down", 1, 1025, None)
    assert any_rows == f"gfx942 float16 down 1x2048 rows any triton {triton.__version__}"


def test_what_is_written_is_read_and_merged(cache):
    assert measured_tiles.read(cache) == {}
    measured_tiles.write(cache, {KEY: {"block_n": 64}})
    measured_tiles.write(cache, {"other": {"num_warps": 4}})
    assert measured_tiles.read(cache) == {KEY: {"block_n": 64}, "other": {"num_warps": 4}}
    assert sorted(path.name for path in cache.parent.iterdir()) == ["tiles.json", "tiles.lock"]


def test_others_may_read_it_if_the_umask_says_so(cache):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            measured_tiles.write(cache.with_name(f"{umask}.json"), {KEY: {"block_n": 64}})
        finally:
            os.umask(before)
        assert stat.S_IMODE(cache.with_name(f"{umask}.json").stat().st_mode) == mode
        assert stat.S_IMODE(cache.with_name(f"{umask}.lock").stat().st_mode) == mode


def test_those_who_write_at_once_lose_nothing(cache, monkeypatch):
    """Each reads what is there slowly, so that without the lock it would miss what the others add meanwhile."""
    read = measured_tiles.read

    def slow(path):
        entries = read(path)
        time.sleep(0.02)
        return entries

    monkeypatch.setattr(measured_tiles, "read", slow)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: measured_tiles.write(cache, {f"key {n}": {"block_n": 64}}), range(12)))
    assert read(cache) == {f"key {n}": {"block_n": 64} for n in range(12)}


def test_a_pipe_in_its_place_is_an_error(cache):
    cache.parent.mkdir()
    os.mkfifo(cache)
    with pytest.raises(ValueError, match=r"tiles\.json must be a file, and is a pipe.*delete it"):
        measured_tiles.read(cache)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        '{"tiles": []}',
        "[" * 100_000,
        '{"tiles": {"k": 3}}',
        '{"tiles": {"k": {"block_m": 64}, "k": {"block_m": 32}}}',
        '{"tiles": {"k": {"block": 1}}}',
        '{"tiles": {"k": {"num_stages": NaN}}}',
        '{"tiles": {"k": {"num_stages": 1' + "0" * 5000 + "}}}",
        '{"tiles": {"k": {"block_m": "16"}}}',
        '{"tiles": {"k": {"tma": "yes"}}}',
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_file_is_an_error(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json is.*delete it and run `tritonmoe tune` again") as raised:
        measured_tiles.read(cache)
    assert ("k: " in str(raised.value) or "'k'" in str(raised.value)) == ('"k"' in text)


def test_a_launch_takes_the_cache_file(cache):
    before = up_launch().constexprs["BLOCK_N"]
    measured_tiles.write(cache, {KEY: {"block_n": 64, "num_stages": 2}})
    found = up_launch()
    assert before != 64
    assert found.constexprs["BLOCK_N"] == 64
    assert found.options["num_stages"] == 2
    assert up_launch(hidden_size=8192).constexprs["BLOCK_N"] == before  # another key
    assert up_launch(num_rows=1).constexprs["BLOCK_M"] == 16  # another class of pairs per expert


def test_using_takes_the_files_place(cache):
    measured_tiles.write(cache, {KEY: {"block_n": 64}})
    with measured_tiles.using({}), measured_tiles.asked() as asked:
        assert up_launch().constexprs["BLOCK_N"] != 64
    assert asked[KEY].block_n != 64
    with measured_tiles.using({KEY: {"block_n": 32}}):
        assert up_launch().constexprs["BLOCK_N"] == 32
    assert up_launch().constexprs["BLOCK_N"] == 64


def test_entries_that_ship_are_valid():
    json.dumps(dict(measured_tiles.SHIPPED))
    assert not [refusal(*field) for entry in measured_tiles.SHIPPED.values() for field in entry.items()]


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 1, "intermediate_size": 1}, {"num_rows": 1}])
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_what_is_chosen_or_tried_can_be_kept(target, shape, cache):
    with measured_tiles.using({}), measured_tiles.asked() as asked:
        aot.record_launches(aot.Variant(**shape), aot.TARGETS[target])
    entries = {
        key: {name: value for name, value in dataclasses.asdict(config).items() if name != "reads" and value != ""}
        for key, config in asked.items()
    }
    tried = candidates_of_layer(aot.Variant(**shape), target)
    assert len({candidate.name for candidate in tried}) == len(tried)
    assert {candidate.key for candidate in tried} == set(asked)
    entries |= {candidate.name: candidate.fields for candidate in tried}
    measured_tiles.write(cache, entries)
    assert measured_tiles.read(cache) == entries


REFUSED = [
    ("block_m", 48, "block_m must be a power of two from 16 on"),
    ("block_n", 8, "block_n must be a power of two from 16 on"),
    ("block_k", 0, "block_k must be a power of two from 16 on"),
    ("num_warps", 3, "num_warps must be a power of two up to 32"),
    ("num_warps", 64, "num_warps must be a power of two up to 32"),
    ("block_m", 2**62, "block_m must be a power of two from 16 on, up to 1024"),
    ("num_warps", True, "num_warps must be a power of two up to 32"),
    ("num_stages", 0, "num_stages must be an integer from 1 on"),
    ("num_stages", 10**9, "num_stages must be an integer from 1 on, up to 1024"),
    ("num_stages", True, "num_stages must be an integer from 1 on"),
    ("subtiles", 1.0, "subtiles must be 1, 2, 4 or 8"),
    ("group_m", 0, "group_m must be an integer from 1 on"),
    ("subtiles", 3, "subtiles must be 1, 2, 4 or 8"),
    ("gather", "by hand", "gather must be one of pointers, tma, copy"),
    ("programs_per_multiprocessor", 0, "programs_per_multiprocessor must be an integer from 1 to 4"),
    ("programs_per_multiprocessor", True, "programs_per_multiprocessor must be an integer from 1 to 4"),
    ("programs_per_multiprocessor", 5, "programs_per_multiprocessor must be an integer from 1 to 4"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_a_tile_that_triton_would_refuse_is_refused_with_the_rule(name, value, message, cache):
    tile = TileConfig(64, 64, 32, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match=f"{message}.*, got {value!r}"):
        dataclasses.replace(tile, **{name: value})
    with measured_tiles.using({KEY: {name: value}}), pytest.raises(ValueError, match=message):
        up_launch()
    cache.parent.mkdir()
    cache.write_text(json.dumps({"tiles": {KEY: {name: value}}}))
    with pytest.raises(ValueError, match=f"tiles.json.*{KEY}: {message}.*, got {value!r}.*correct it, or delete it"):
        up_launch()


def test_a_tile_of_a_height_without_row_tiles_is_refused():
    with measured_tiles.using({KEY: {"block_m": 256}}), pytest.raises(ValueError, match="block_m of up must be one of"):
        up_launch()
