"""python -m bench.gpu, on a CPU with tiny shapes: the code that will run on the day there is a GPU."""

import json

import pytest
import torch

from tritonmoe.benchmarks import gpu, gpu_cases
from tritonmoe.benchmarks.shapes import GPU_SHAPES, draw_inputs, draw_routing, tiny

SETTING = gpu_cases.Setting(torch.device("cpu"), torch.float32, "torch", rounds=1, batch_s=0.0)


def run(folder, *arguments):
    return gpu.main(["--out", str(folder), "--rounds", "1", "--tiny", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    assert run(folder, "--summary", str(folder / "summary" / "gpu.json")) == 0
    return folder


def test_every_case_gives_every_figure(finished):
    cases = list(gpu.cases(is_tiny=True))
    assert len({case.file_name for case in cases}) == len(cases)
    summary = json.loads((finished / "summary" / "gpu.json").read_text())
    assert len(summary["results"]) == len(cases)
    assert {"device", "driver", "versions", "commit"} <= set(summary["environment"])
    for result in summary["results"]:
        assert result["E_K_D_F"]
        if result["kind"] == "check":
            assert result["passed"]
            assert {"y", "dx", "dtopk_weights", "dgate_up_proj", "ddown_proj"} <= set(result["errors"])
            assert ("dgate_up_bias" in result["errors"]) == (result["shape"] == "gpt-oss")
        elif result["kind"] == "layer":
            for name in ("forward", "forward+backward"):
                measured = result[name]
                assert {"tritonmoe", "eager", "grouped_mm", "dense products"} <= set(measured)
                assert measured["tritonmoe"]["median_ms"] > 0
                assert "fraction_of_dense" in measured["tritonmoe"]
            assert result["memory"]["saved_tensor_bytes"] > 0
            assert result["group_us"] > 0
            assert set(result["left_out"]) >= {"sonicmoe", "liger"}
        else:
            assert {"group", "up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad W1"} <= set(result)
            assert all("fraction_of_dense" in result[name] for name in ("up", "down_grad", "weight_grad W2"))
            assert all(result[name]["us"] > 0 for name in ("group", "gather_sum"))


def test_a_rerun_does_only_what_is_missing(finished, monkeypatch, capsys):
    case = next(case for case in gpu.cases(is_tiny=True) if case.kind == "check")
    (finished / case.file_name).unlink()
    done = []
    monkeypatch.setitem(gpu.MEASURES, "check", lambda *case: done.append(case) or {"passed": True, "errors": {}})
    assert run(finished, "--budget-s", "-1") == 3
    assert "1 cases are left" in capsys.readouterr().out
    assert not done
    assert run(finished) == 0
    assert [shape.name for shape, *_ in done] == [case.shape.name]


def test_a_wrong_result_and_one_that_does_not_fit(tmp_path, monkeypatch):
    def raise_out_of_memory(*case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22 GiB")

    monkeypatch.setitem(gpu.MEASURES, "check", raise_out_of_memory)
    assert run(tmp_path / "memory", "--kinds", "check") == 0
    monkeypatch.setitem(gpu.MEASURES, "check", lambda *case: {"passed": False, "errors": {"dx": 1}})
    assert run(tmp_path / "wrong", "--kinds", "check") == 1


def test_a_case_that_raises_holds_up_no_other(tmp_path, monkeypatch, capsys):
    """It is finished, so that a rerun goes on behind it, and stays wrong."""
    shapes = []

    def fail_first(shape, *case):
        shapes.append(shape.name)
        if len(shapes) == 1:
            raise RuntimeError("no such instruction")
        return {"passed": True, "errors": {}}

    monkeypatch.setitem(gpu.MEASURES, "check", fail_first)
    assert run(tmp_path, "--kinds", "check") == 1
    said = capsys.readouterr()
    assert len(shapes) > 1
    assert "FAILED: RuntimeError: no such instruction" in said.out
    assert f"WRONG: check {shapes[0]} T=9 zipf: RuntimeError: no such instruction" in said.err
    shapes.append("only what is missing runs again")
    assert run(tmp_path, "--kinds", "check") == 1
    assert shapes[-1] == "only what is missing runs again"


def test_nothing_more_runs_on_a_device_that_has_failed(tmp_path, monkeypatch, capsys):
    def fail(*case):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(gpu.MEASURES, "check", fail)
    monkeypatch.setattr(gpu, "_device_works", lambda device: False)
    assert run(tmp_path, "--kinds", "check") == 1
    assert capsys.readouterr().out.count("FAILED") == 1


def test_a_peer_that_can_not_be_made_is_left_out(monkeypatch):
    def refuse(*weights):
        raise ImportError("cannot import name 'MixtralExperts'")

    monkeypatch.setattr(gpu_cases.peers, "experts_function", refuse)
    inputs = draw_inputs(tiny(GPU_SHAPES["Mixtral"]), 9, "uniform", torch.float32, torch.device("cpu"))
    functions, left_out = gpu_cases._implementations(inputs, SETTING)
    assert list(functions) == ["tritonmoe"]
    assert left_out["eager"] == "ImportError: cannot import name 'MixtralExperts'"


def test_results_of_another_machine_are_not_mixed(finished, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_machine", lambda: {"driver": "1.2", "clocks_and_power": None, "commit": "abc"})
    assert run(finished) == 2
    assert "give another --out" in capsys.readouterr().err


def test_an_error_in_a_gradient_is_found(monkeypatch):
    moe_mlp = gpu_cases.moe_mlp

    def wrong(x, ids, gates, *, backend, **arguments):
        y = moe_mlp(x, ids, gates, backend=backend, **arguments)
        return y if backend == "reference" else y + (x - x.detach()) * 1e-3

    shape = tiny(GPU_SHAPES["Mixtral"])
    assert gpu_cases.check(shape, 9, "uniform", SETTING)["passed"]
    monkeypatch.setattr(gpu_cases, "moe_mlp", wrong)
    result = gpu_cases.check(shape, 9, "uniform", SETTING)
    assert [name for name, error in result["errors"].items() if not error["passed"]] == ["dx"]


def test_saved_bytes():
    """h in the layer's dtype, one int64 that marks the call, and nothing that depends on D."""
    shape = tiny(GPU_SHAPES["Mixtral"])
    inputs = draw_inputs(shape, 9, "uniform", torch.float32, torch.device("cpu"))
    functions, _ = gpu_cases._implementations(inputs, SETTING)
    saved = gpu_cases._memory(inputs, functions["tritonmoe"])["saved_tensor_bytes"]
    assert saved == 9 * shape.top_k * 2 * shape.intermediate_size * 4 + 8


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_routing(routing):
    ids, weights = draw_routing(2000, 60, 6, routing, torch.Generator().manual_seed(0))
    assert ids.shape == weights.shape == (2000, 6)
    assert all(len(set(row)) == 6 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(2000))
    load = torch.bincount(ids.flatten(), minlength=60).sort(descending=True).values
    assert (load[0] > 10 * load[30]) == (routing == "zipf")


def test_routing_has_no_other_name():
    with pytest.raises(ValueError, match="uniform or zipf, got 'even'"):
        draw_routing(1, 2, 1, "even", torch.Generator())
