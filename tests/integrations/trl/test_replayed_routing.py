"""A GRPOTrainer of TRL that replays the routing of its rollout: log-probabilities are those of the replayed experts.

TRL is no part of the extra `test`: `bash .ci/framework trl` runs these tests in a venv that has it.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

pytest.importorskip("datasets", reason="trl is not installed")
pytest.importorskip("trl")

import datasets
from processes import ENVIRONMENT, run_torchrun
from trl import GRPOConfig, GRPOTrainer

from tritonmoe.integrations import transformers as tmt
from tritonmoe.integrations.trl import ReplayedRouting
from tritonmoe.routing import RoutingRecording

NUM_LAYERS, TOP_K, NUM_EXPERTS = 2, 2, 16
WORKER = Path(__file__).parent / "replayed_routing_worker.py"


def make_model() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=12,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():  # transformers' own start is so flat that no other expert would make a difference
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return model


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(61))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


PROMPTS = ["4 8 15", "16 23 42 4 5 6 7", "7 7 7 7 9", "1 2 3 5 8 13 21 34"]


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def make_trainer(
    model: Any, directory: Path, kind: type = GRPOTrainer, rollout_func: Any = None, **settings: Any
) -> Any:
    class Trainer(ReplayedRouting, kind):  # type: ignore[misc]
        pass

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(directory), **(arguments | settings)),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        rollout_func=rollout_func,
    )


class Rollout:
    """An engine whose weights are a little different, so that some tokens go to other experts there."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda rows: rows, noise: float = 0.1) -> None:
        self.model = make_model()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
        self.change = change
        self.rows: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "routed_experts": []}
        for number, prompt in enumerate(prompts):
            ids = trainer.processing_class(prompt)["input_ids"]
            generator = torch.Generator().manual_seed(number)
            completion = torch.randint(3, 64, (5 + number % 7,), generator=generator).tolist()
            sequence = [*ids, *completion]
            with torch.no_grad(), tmt.record_routing(self.model) as recording:
                self.model(torch.tensor([sequence]))
            rows = torch.stack([layer.topk_ids for layer in recording.layers.values()], dim=1)[:-1]
            self.rows[tuple(sequence)] = rows
            for key, value in zip(found, (ids, completion, [0.0] * len(completion), self.change(rows)), strict=True):
                found[key].append(value)
        return found


def expected_log_probs(model: Any, sequence: list[int], num_completion: int, rows: Tensor | None) -> Tensor:
    """Return the log-probabilities of one sequence, nothing padded, with forced experts if given."""
    ids = torch.tensor([sequence])
    with tmt.record_routing(model) as like:
        logits = model(ids).logits
    if rows is not None:
        recording = RoutingRecording.from_rollout([rows], torch.ones_like(ids), like)
        with tmt.replay_routing(model, recording):
            logits = model(ids).logits
    all_log_probs = logits[0, :-1].float().log_softmax(-1)
    return all_log_probs.gather(1, ids[0, 1:, None]).squeeze(1)[-num_completion:]


def snapshot(model: nn.Module) -> Any:
    """Return a model of the same weights as they are now; TRL has put a forward of its own on this one."""
    copied = make_model().eval()
    copied.load_state_dict(model.state_dict())
    return copied


def watch(trainer: Any) -> list[tuple[Any, bool, list[int], int, Tensor]]:
    """Return a list that fills with what the trainer computes: a model, whether it trains, a sequence, its results."""
    seen: list[tuple[Any, bool, list[int], int, Tensor]] = []
    compute = trainer._get_per_token_logps_and_entropies

    def method(model: Any, ids: Tensor, mask: Tensor, keep: int, *rest: Any, **named: Any) -> Any:
        result = compute(model, ids, mask, keep, *rest, **named)
        copied = snapshot(trainer.accelerator.unwrap_model(model))
        for row, real, log_probs in zip(ids, mask.bool(), result[0].detach(), strict=True):
            num_completion = int(real[-keep:].sum())
            seen.append((copied, model is not trainer.ref_model, row[real].tolist(), num_completion, log_probs))
        return result

    trainer._get_per_token_logps_and_entropies = method
    return seen


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 4, "num_iterations": 2, "beta": 0.1}])
def test_log_probs_are_those_under_forced_routing(settings: dict[str, Any], tmp_path: Path) -> None:
    rollout = Rollout()
    make_model().save_pretrained(tmp_path / "start")  # where TRL finds the reference model
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "start")
    tmt.patch(model)
    trainer = make_trainer(model, tmp_path, rollout_func=rollout, **settings)
    seen = watch(trainer)
    trainer.train()
    num_policy = sum(is_policy for _, is_policy, *_ in seen)
    assert num_policy >= 16
    assert (len(seen) > num_policy) == bool(settings)
    num_other = 0
    for own, is_policy, sequence, num_completion, log_probs in seen:
        rows = rollout.rows[tuple(sequence)]
        forced, free = (expected_log_probs(own, sequence, num_completion, given) for given in (rows, None))
        expected = forced if is_policy else free
        torch.testing.assert_close(log_probs[:num_completion], expected.detach(), rtol=2e-4, atol=2e-5)
        num_other += not torch.allclose(forced, free, rtol=1e-2)
    assert num_other > len(seen) / 4  # so that nothing above holds by chance


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("has_gaps", [False, True])
def test_the_logs_say_how_much_was_replayed_and_changed(noise: float, has_gaps: bool, tmp_path: Path) -> None:
    """Of a step with the first weights: as in forwards of single sequences."""
    rollout = Rollout(lambda rows: rows.long().index_fill(0, torch.tensor([1]), -1) if has_gaps else rows, noise)
    model = make_model()
    tmt.patch(model)
    settings = {"max_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": 1}
    trainer = make_trainer(model, tmp_path, rollout_func=rollout, **settings)
    before = snapshot(model)
    seen = watch(trainer)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    found = [logs[f"routing_replay/{name}_ratio"] for name in ("replayed_tokens", "changed_pairs")]
    num_tokens, counts = 0, torch.zeros(3)
    for _, _, sequence, *_ in seen:
        ids = torch.tensor([sequence])
        with tmt.record_routing(before) as like:
            before(ids)
        rows = rollout.change(rollout.rows[tuple(sequence)])
        recording = RoutingRecording.from_rollout([rows], torch.ones_like(ids), like)
        with tmt.replay_routing(before, recording) as of_one:
            before(ids)
        num_tokens += NUM_LAYERS * (len(sequence) - 1)
        counts += torch.stack([of_one.num_replayed_tokens, of_one.num_pairs, of_one.num_changed_pairs])
    assert len(seen) == 4
    assert found == pytest.approx([float(counts[0] / num_tokens), float(counts[2] / counts[1])])
    assert (found[0] == 1) != has_gaps
    assert (found[1] > 0.05) == bool(noise)


def test_own_generation_is_recorded_and_replayed(tmp_path: Path) -> None:
    model = make_model()
    tmt.patch(model)
    trainer = make_trainer(model, tmp_path, steps_per_generation=4)
    kept = []
    original = trainer.compute_loss

    def compute_loss(inner: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        kept.append(inputs)
        return original(inner, inputs, *rest, **named)

    trainer.compute_loss = compute_loss
    before = snapshot(model)  # generated with these
    trainer.train()
    assert len(kept) == 4
    for inputs in kept:
        for ids, mask, more, real, rows in zip(
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            inputs["completion_mask"],
            inputs["routed_experts"],
            strict=True,
        ):
            sequence = torch.cat([ids[mask.bool()], more[real.bool()]])
            with torch.no_grad(), tmt.record_routing(before) as own:
                before(sequence[None])
            expected = torch.stack([layer.topk_ids for layer in own.layers.values()], dim=1)[:-1]
            assert torch.equal(rows.long().sort(2).values, expected.long().sort(2).values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.roll(-1, 0), "rows are shifted by one"),
        (lambda rows: rows[:-1], "must have .* rows of routed_experts"),
        (lambda rows: rows[:, :1], r"must be \(rows, layers, K\)"),
        (lambda rows: rows + NUM_EXPERTS, r"ids must be in \[0, 16\)"),
        (lambda rows: "non_sense", "damaged"),
    ],
)
def test_what_is_misaligned_is_refused(change: Callable[[Tensor], Any], says: str, tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(model, tmp_path, rollout_func=Rollout(change, noise=0.01))
    with pytest.raises(ValueError, match=says):
        trainer.train()


def test_what_has_no_routing_is_refused(tmp_path: Path) -> None:
    class Without(Rollout):
        def __call__(self, *arguments: Any) -> dict[str, Any]:
            found = super().__call__(*arguments)
            del found["routed_experts"]
            return found

    trainer = make_trainer(make_model(), tmp_path, rollout_func=Without())
    with pytest.raises(ValueError, match=r'rollout_func must return "routed_experts", .* got none'):
        trainer.train()
    trainer = make_trainer(make_model(), tmp_path)
    trainer.tools = [print]
    with pytest.raises(ValueError, match="tools or environment_factory: TRL keeps no routing there"):
        trainer._refuse_what_drops_routing()


def test_the_adapted_policy_replays_and_its_base_does_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    tmt.patch(model)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=2,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        ),
    )
    rollout = Rollout()
    trainer = make_trainer(adapted, tmp_path, rollout_func=rollout, beta=0.1, max_steps=1)
    replayed = []
    original = trainer._replay

    def replay(inner: nn.Module, *arguments: Any) -> Any:
        context = original(inner, *arguments)
        replayed.append(type(context).__name__ != "nullcontext")
        return context

    trainer._replay = replay
    trainer.train()
    assert sorted(set(replayed)) == [False, True]


@pytest.mark.thorough
def test_spread_over_two_processes(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=["spread:", "refused:"])


def test_the_page_runs(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "how-to" / "trl.md"
    (script,) = re.findall(r'```python title="train_grpo.py"\n(.*?)```', page.read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120, env=ENVIRONMENT)
