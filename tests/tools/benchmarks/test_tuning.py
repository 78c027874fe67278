"""The search of `tritonmoe tune`: which tiles are tried, what is measured of one, which are kept."""

import os
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tritonmoe.ops import aot
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.config import TileConfig
from tritonmoe.tools.benchmarks import tuning
from tritonmoe.tools.benchmarks.kept_results import read_results
from tritonmoe.tools.benchmarks.shapes import LayerShape, draw_inputs, operation_calls
from tritonmoe.tools.benchmarks.tile_candidates import Candidate, redundant

CPU = torch.device("cpu")
SHAPE = LayerShape("small", num_experts=3, top_k=2, hidden_size=32, intermediate_size=16)


def tried_fields(operation, **changes):
    variant = aot.Variant(**changes)
    return [c.fields for c in tuning.candidates_of_layer(variant, "sm_90") if c.key.split()[2] == operation]


def test_whole_tiles_are_tried():
    """Those of published kernels, of a layer with 2048 pairs per expert."""
    down = tried_fields("down", num_rows=32768)
    two_programs = {
        "block_m": 128,
        "block_n": 128,
        "num_warps": 4,
        "persistent": True,
        "programs_per_multiprocessor": 2,
    }
    assert any(two_programs.items() <= fields.items() for fields in down)
    assert {(f["block_n"], f["num_stages"]) for f in down} == {(256, 3), (256, 4), (128, 3)}
    up = tried_fields("up", num_rows=32768)
    assert {
        (f.get("gather"), f.get("group_m"))
        for f in up
        if f["num_stages"] == 3 and f["block_n"] == 128 and f["persistent"]
    } == {
        *((gather, group_m) for gather in ("pointers", "copy") for group_m in (4, 8, 16)),
        ("tma", None),
    }
    assert {f["num_stages"] for f in up if f["block_n"] == 128} == {3, 4}
    assert {f["group_m"] for f in down if "group_m" in f} == {4, 8, 16}
    down_grad = tried_fields("down_grad", num_rows=32768)
    assert {(f["block_n"], f["num_stages"]) for f in down_grad if f["num_warps"] == 8 and "subtiles" not in f} == {
        *((128, num_stages) for num_stages in (3, 5, 6)),
    }
    in_eight = [f for f in down_grad if f.get("subtiles") == 8]
    assert {(f["block_n"], f["persistent"], f.get("programs_per_multiprocessor")) for f in in_eight} == {
        *((128, True, 2), (128, False, None), (256, False, None)),
    }
    weight_grad = tried_fields("weight_grad", num_rows=32768)
    assert {f.get("group_m") for f in weight_grad} == {1, 4, 8}
    no_effect = {"persistent", "tma", "gather", "subtiles", "programs_per_multiprocessor"}
    assert not any(no_effect & set(fields) for fields in weight_grad)


@pytest.mark.parametrize(("num_rows", "height"), [(1, 16), (512, 32), (1024, 64), (4096, 128)])
def test_no_tile_is_higher_than_an_experts_share(num_rows, height):
    assert {fields["block_m"] for fields in tried_fields("down", num_rows=num_rows)} == {height}


def test_fp32_tiles_have_half_the_columns_and_depth():
    half, single = (tried_fields("down", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert [fields["block_k"] for fields in single] == [fields["block_k"] // 2 for fields in half]
    assert [fields["block_n"] for fields in single] == [fields["block_n"] // 2 for fields in half]


def test_a_second_program_on_every_multiprocessor(monkeypatch):
    config = TileConfig(128, 128, 64, 4, 3, persistent=True)
    monkeypatch.setattr(launch, "_num_multiprocessors", lambda index: 132)
    for programs, expected in ((1, 132), (2, 264)):
        shared = launch.dataclasses.replace(config, programs_per_multiprocessor=programs)
        device = torch.device("cuda", 0)
        assert launch.num_programs(4096, shared, launch.KernelOptions(), device) == expected
        assert launch.num_programs(4096, shared, launch.KernelOptions(num_sms=10), device) == 10 * programs
        assert launch.num_programs(100, shared, launch.KernelOptions(), device) == 100


@pytest.fixture(scope="module")
def calls():
    inputs = draw_inputs(SHAPE, 9, "uniform", torch.float32, CPU)
    return tuning.calls_by_key(operation_calls(inputs, "triton"))


def key_of(calls, operation):
    return next(key for key in calls if f" {operation} " in key)


def test_every_product_is_found_by_its_key(calls):
    assert sorted(key.split()[2] for key in calls) == ["down", "down", "down_grad", "up", "weight_grad", "weight_grad"]


def test_a_tile_is_measured_beside_the_tables(calls):
    key = key_of(calls, "down")
    found = tuning.try_candidate(calls[key], Candidate(key, {"block_n": 16}), CPU, rounds=3, batch_s=0.0)
    assert {name: len(samples) for name, samples in found["samples"].items()} == {"table": 3, "candidate": 3}
    table_s, candidate_s = (statistics.median(found["samples"][name]) for name in ("table", "candidate"))
    assert found["gain"] == table_s / candidate_s
    assert found["agrees"]
    assert found["gain"] > 0
    assert "block_n=16" in found["tile"]


def test_a_tile_that_is_wrong_or_can_not_run(calls):
    key = key_of(calls, "down")

    def is_tried():
        return dict(measured_tiles.fields_of(key)).get("block_n") == 16

    def wrong():
        return calls[key]() * (1.001 if is_tried() else 1.0)

    assert not tuning.try_candidate(wrong, Candidate(key, {"block_n": 16}), CPU, rounds=1, batch_s=0.0)["agrees"]

    def too_large():
        if is_tried():
            raise RuntimeError("out of resource: shared memory")
        return calls[key]()

    found = tuning.try_candidate(too_large, Candidate(key, {"block_n": 16}), CPU, rounds=1, batch_s=0.0)
    assert found == {"left_out": "RuntimeError: out of resource: shared memory"}


def result(key, block_n, gain, agrees=True):
    return {"key": key, "fields": {"block_n": block_n}, "gain": gain, "agrees": agrees, "samples": {}}


def test_the_fastest_tile_is_kept_where_it_is_really_faster_and_right():
    tried = {
        "1": result("a", 16, 1.1),
        "2": result("a", 32, 1.3),
        "3": result("a", 64, 1.5, agrees=False),
        "4": result("b", 16, 1.01),
        "5": {"key": "c", "fields": {}, "left_out": "too large"},
    }
    assert tuning.best_entries(tried | {"6": result("d", 16, 1.05)}) == {"a": {"block_n": 32}, "d": {"block_n": 16}}


def test_what_has_the_same_machine_code_is_measured_once():
    def fits(binary, problem=""):
        return {"problem": problem, "binary": binary}

    fitness = {
        "k: one": fits("a x 1"),
        "k: two": fits("", "up: spills 8 bytes"),
        "k: three": fits("a x 1"),
        "k: four": fits("a x 2"),
        "l: five": fits("a x 1"),
    }
    assert redundant(fitness) == {"k: two": "up: spills 8 bytes", "k: three": "the same machine code as one"}


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """A GPU that isn't there, and four candidates of which two need a measurement; give what was measured."""
    names = {"one": 1.2, "two": 1.4, "same": 1.9, "spills": 1.9}
    measured, interrupted, gains_again = [], None, {"k": 1.3, "l": 1.01}

    def try_candidate(call, candidate, device, rounds, batch_s):
        name = candidate.fields["name"]
        if rounds == tuning.ROUNDS_AGAIN:
            measured.append(f"{name} again")
            return {"gain": gains_again[candidate.key], "agrees": True, "samples": {"table": [1.0], "candidate": [1.0]}}
        measured.append(name)
        if name == interrupted:
            raise KeyboardInterrupt
        return {"gain": names[name], "agrees": True, "samples": {"table": [1.0], "candidate": [1.0]}}

    def candidates(variant, target_name, done):
        return [Candidate(key, {"name": name}) for key in "kl" if key not in done for name in names]

    def judge_all(variant, target_name, missing):
        for candidate in missing:
            name = candidate.fields["name"]
            problem = "spills 8 bytes" if name == "spills" else ""
            yield candidate.name, {"problem": problem, "binary": "a" if name in ("one", "same") else "b"}

    monkeypatch.setattr(tuning, "try_candidate", try_candidate)
    monkeypatch.setattr(tuning, "candidates_of_layer", candidates)
    monkeypatch.setattr(tuning, "judge_all", judge_all)
    monkeypatch.setattr(tuning, "calls_by_key", lambda calls: {"k": None, "l": None})
    monkeypatch.setattr(tuning, "draw_inputs", lambda *arguments: None)
    monkeypatch.setattr(tuning, "operation_calls", lambda *arguments: None)
    monkeypatch.setattr(launch, "architecture_of", lambda target: "sm_90")
    monkeypatch.setattr(launch, "target_of", lambda device: None)

    def interrupt(name):
        nonlocal interrupted
        interrupted = name

    return measured, interrupt


def test_a_search_goes_on_where_it_was_stopped(no_gpu_needed, tmp_path):
    """What is the fastest is measured again, and kept only where it is faster then too."""
    measured, interrupt = no_gpu_needed
    file, done, lines = tmp_path / "tuning.jsonl", set(), []

    def search():
        return tuning.tune(SHAPE, 9, torch.float32, file, lines.append, done)

    interrupt("two")
    with pytest.raises(KeyboardInterrupt):
        next(search())
    assert [line["case"] for line in read_results(file)][-1].endswith("T=9 k: name=one")
    assert done == set()
    interrupt(None)
    assert list(search()) == [{"k": {"name": "two"}}] * 2  # l's was no faster again
    assert measured == ["one", "two", "two", "two again", "one", "two", "two again"]
    assert done == {"k", "l"}
    assert any("the same machine code as name=one" in line for line in lines)
    assert any("spills 8 bytes" in line for line in lines)
    assert list(search()) == []


def test_another_layout_is_another_layer(no_gpu_needed, tmp_path):
    measured, _ = no_gpu_needed
    for shape in (SHAPE, replace(SHAPE, bias=True)):
        list(tuning.tune(shape, 9, torch.float32, tmp_path / "tuning.jsonl", lambda line: None, set()))
    assert measured.count("one") == 4


@pytest.mark.slow
def test_candidates_are_compiled_and_judged(tmp_path):
    """Without the interpreter, in processes: one fits, one is the table's own, one needs too much shared memory."""
    script = """
import torch
from tritonmoe.ops import aot
from tritonmoe.tools.benchmarks.shapes import LayerShape
from tritonmoe.tools.benchmarks.tile_candidates import Candidate, judge_all
from tritonmoe.tools.benchmarks.tuning import candidates_of_layer

if __name__ == "__main__":
    variant = aot.Variant.of(LayerShape("small", 4, 2, 512, 256), torch.bfloat16, 1024)
    key = next(c.key for c in candidates_of_layer(variant, "sm_90") if c.key.split()[2] == "down")
    tiles = {"own": {"num_stages": 3}, "fits": {"block_n": 64}, "too large": {"num_stages": 9, "block_n": 256}}
    found = dict(judge_all(variant, "sm_90", [Candidate(key, fields) for fields in tiles.values()]))
    for name, fields in tiles.items():
        fitness = found[Candidate(key, fields).name]
        print(name, "|", fitness["problem"], "|", fitness["binary"], "|", fitness["registers"])
"""
    (tmp_path / "judge.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "judge.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    own, fits, too_large = (line.split(" | ") for line in done.stdout.splitlines())
    assert own[1:3] == ["it is the table's own tile", ""]
    assert fits[1] == ""
    assert fits[2].endswith(" x 1")
    assert int(fits[3]) > 0
    assert "of shared memory, there are" in too_large[1]
