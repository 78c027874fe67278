"""`tritonmoe bench transformers` measures what it says: every pass, both routings, files written."""

import json

import pytest
import torch

from tritonmoe.benchmarks.transformers import Subject, largest_violation
from tritonmoe.cli import main
from tritonmoe.integrations.transformers.bench_model import qwen3_moe_model

SMALL = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 16, "num_experts": 8, "top_k": 2, "vocab_size": 64}


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
        assert case["ratio"] > 0
        assert ("kept_for_backward_mb" in case) == (case["pass"] == "training")
    assert (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"
    if not torch.cuda.is_available():
        assert "not run somewhere: sonicmoe" in capsys.readouterr().out


def test_skewed_routing_is_skewed_and_changes_no_implementation():
    model = qwen3_moe_model(**SMALL, skew=1.0)
    subject = Subject(model, is_block=False, num_tokens=48, new_tokens=2)
    uniform = Subject(qwen3_moe_model(**SMALL), is_block=False, num_tokens=48, new_tokens=2)
    assert largest_violation(subject) > 0.5 + largest_violation(uniform)
    model.set_experts_implementation("eager")
    expected = model(subject.ids).logits
    model.set_experts_implementation("tritonmoe")
    torch.testing.assert_close(model(subject.ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_block", [False, True])
def test_kept_memory_counts_each_storage_once_and_no_parameter(is_block):
    model = qwen3_moe_model(**SMALL)
    subject = Subject(model, is_block=is_block, num_tokens=48, new_tokens=2)
    model.set_experts_implementation("tritonmoe")
    once = subject.kept_for_backward_mb()
    assert once == subject.kept_for_backward_mb()
    tokens_and_hidden = 48 * 32 + 48 * 2 * 32  # T*D + T*K*2F numbers must be kept by every layer
    assert once * 1e6 >= 4 * tokens_and_hidden
    if is_block:
        assert once * 1e6 <= 4 * 4 * tokens_and_hidden
