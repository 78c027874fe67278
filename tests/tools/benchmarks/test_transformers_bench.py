"""`tritonmoe bench transformers` measures what it says: every pass, both routings, files written."""

import json
import sys
import types

import pytest
import torch

from tritonmoe.integrations.transformers.bench_model import ModelSizes, qwen3_moe_model
from tritonmoe.tools.benchmarks import transformers as bench
from tritonmoe.tools.benchmarks.step_memory import kept_for_backward_mb, peak_mb
from tritonmoe.tools.benchmarks.timing import ratio
from tritonmoe.tools.benchmarks.transformers import Subject, kept, largest_violation
from tritonmoe.tools.cli import main

SMALL = ModelSizes(num_layers=2, hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, vocab_size=64)


@pytest.mark.thorough
def test_it_runs_and_writes(tmp_path, capsys):
    sizes = ["--layers", "1", "--hidden-size", "32", "--intermediate-size", "16", "--experts", "8", "--top-k", "2"]
    files = ["--json", str(tmp_path / "times.json"), "--png", str(tmp_path / "times.png")]
    arguments = ["--tokens", "48", "--new-tokens", "2", "--dtypes", "float32", "--rounds", "1", *sizes, *files]
    assert main(["bench", "transformers", *arguments]) == 0
    results = json.loads((tmp_path / "times.json").read_text())["results"]
    found = {(case["subject"], case["pass"], case["routing"]) for case in results}
    assert len(found) == len(results) == 12
    for case in results:
        assert {"tritonmoe", "eager", "grouped_mm", "batched_mm"} <= case["times"].keys()
        assert case["best_other"] in case["times"]
        assert case["ratio"] == ratio(case["times"][case["best_other"]], case["times"]["tritonmoe"], 3)
        assert ("kept_for_backward_mb" in case) == (case["pass"] == "training")
        assert case["peak_mb"].keys() == case["times"].keys()
        assert min(case["peak_mb"].values()) > 0
    out = capsys.readouterr().out
    table = out[out.index("median ms / peak MB") :].splitlines()
    assert table[1].split()[:5] == ["pass", "T", "dtype", "routing", "tritonmoe"]
    assert sum(line.startswith(("block ", "model ")) for line in table) == 12
    assert sum(line.startswith("kept for backward") for line in table) == 4
    assert (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"
    if not torch.cuda.is_available():
        assert "not run somewhere: sonicmoe (its kernels need an NVIDIA GPU" in out
        assert "not run somewhere: liger (its kernels need a GPU)" in out


@pytest.mark.parametrize("sizes", [["--hidden-size", "40"], ["--intermediate-size", "12"]], ids=str)
def test_sizes_that_no_implementation_takes(sizes, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "transformers", *sizes])
    assert "--hidden-size must be a multiple of 16" in capsys.readouterr().err


def test_skewed_routing_is_skewed_and_changes_no_implementation():
    model = qwen3_moe_model(SMALL, skew=1.0)
    subject = Subject(model, is_block=False, num_tokens=48, new_tokens=2)
    uniform = Subject(qwen3_moe_model(SMALL), is_block=False, num_tokens=48, new_tokens=2)
    assert largest_violation(subject) > 0.5 + largest_violation(uniform)
    model.set_experts_implementation("eager")
    expected = model(subject.ids).logits
    model.set_experts_implementation("tritonmoe")
    torch.testing.assert_close(model(subject.ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_block", [False, True])
def test_kept_memory_counts_each_storage_once_and_no_parameter(is_block):
    model = qwen3_moe_model(SMALL)
    subject = Subject(model, is_block=is_block, num_tokens=48, new_tokens=2)
    once = kept(subject, "tritonmoe")
    assert once == kept(subject, "tritonmoe")
    tokens_and_hidden = 48 * 32 + 48 * 2 * 32  # T*D + T*K*2F numbers must be kept by every layer
    assert once * 1e6 >= 4 * tokens_and_hidden
    if is_block:
        assert once * 1e6 <= 4 * 4 * tokens_and_hidden


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator rounds sizes up")
def test_memory_of_a_step_is_known_to_the_byte():
    a = torch.ones(250, 1000)

    def run() -> None:
        b = a + 1
        c = b + 1  # two at once
        del b
        torch.add(c, 1)  # and two again

    assert peak_mb(run) == pytest.approx(2.0, abs=1e-3)
    x, weight = torch.ones(250, 1000, requires_grad=True), torch.ones(1000, 1000, requires_grad=True)
    assert kept_for_backward_mb(lambda: (x @ weight).exp().sum(), [weight]) == pytest.approx(2.0)  # x and exp's result


class LigerFunction:
    """What Liger's own function computes, without its kernels."""

    calls = 0

    @classmethod
    def apply(cls, x, gate_up_proj, down_proj, topk_ids, topk_weights):
        assert topk_ids.dtype == torch.int32
        cls.calls += 1
        gate, up = torch.einsum("td,ehd->teh", x, gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate) * up, down_proj)
        dense = torch.zeros(*y.shape[:2], dtype=y.dtype).scatter_add(1, topk_ids.long(), topk_weights.to(y.dtype))
        return torch.einsum("ted,te->td", y, dense)


def test_liger_is_measured_where_it_runs(monkeypatch):
    model = qwen3_moe_model(SMALL)
    ids = torch.arange(2, 40)[None]
    expected = model(ids).logits
    ops = types.SimpleNamespace(LigerFusedMoEFunction=LigerFunction)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    reason_of = bench.peer_unusable_reason
    monkeypatch.setattr(
        bench, "peer_unusable_reason", lambda peer, *at, **kw: None if peer == "liger" else reason_of(peer, *at, **kw)
    )
    bench.register_liger()
    model.set_experts_implementation("liger")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    before = LigerFunction.calls
    assert before >= 2
    case = bench.measure(Subject(model, is_block=True, num_tokens=16, new_tokens=2), "training", 16, 1, 0.0)
    assert LigerFunction.calls > before
    assert {"liger", "tritonmoe"} <= case["times"].keys() == case["peak_mb"].keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--subjects", "block", "--layers", "8"],
            "--layers 8 has no effect on this measurement: leave the option out, or",
        ),
        (["--passes", "training", "--new-tokens", "4"], "--new-tokens 4 has no effect on this measurement"),
        (
            ["--passes", "decode", "--subjects", "block", "--tokens", "9"],
            "--tokens 9 has no effect on this measurement",
        ),
    ],
)
def test_options_that_nothing_would_heed(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "transformers", *arguments])
    assert words in capsys.readouterr().err
