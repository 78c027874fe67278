"""Upcycled models: save_pretrained in place takes transformers' arguments, and Trainer loads what it wrote."""

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import make_dense
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tritonmoe.integrations import transformers as tmt

IDS = torch.randint(2, 60, (16, 9), generator=torch.Generator().manual_seed(1))


def upcycled(num_experts: int = 4, name: str = "gpt2") -> Any:
    return tmt.upcycle(make_dense(name), num_experts=num_experts, top_k=2, target="inplace", seed=3)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_every_argument_of_transformers_is_taken():
    """With the same default where it says the same; shards are smaller."""
    own = inspect.signature(upcycled().save_pretrained).parameters
    theirs = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    for name, parameter in theirs.items():
        if name not in ("self", "kwargs", "max_shard_size"):
            assert own[name].default == parameter.default, name
            assert own[name].kind == parameter.kind, name
    positions = [name for name in theirs if name not in ("self", "kwargs")]
    assert list(own)[: len(positions)] == positions


def test_arguments_say_what_they_say_elsewhere(tmp_path):
    model = upcycled()
    expected = weights(model)
    calls: list[dict[str, Any]] = [
        {"push_to_hub": False, "token": "secret", "repo_id": "nobody/nothing"},
        {"save_peft_format": False, "save_original_format": False},
        {"max_shard_size": "50KB"},
        # as Accelerate's guide calls it
        {"is_main_process": True, "save_function": torch.save, "state_dict": model.state_dict()},
    ]
    for number, settings in enumerate(calls):
        model.save_pretrained(tmp_path / str(number), **settings)
        assert_same(tmt.load_upcycled(tmp_path / str(number)).state_dict(), expected)
    assert len(list((tmp_path / "2").glob("upcycled-*.safetensors"))) > 2
    doubled = {name: value * 2 for name, value in expected.items()}
    model.save_pretrained(tmp_path / "given", True, doubled, False, "1GB")
    assert_same(tmt.load_upcycled(tmp_path / "given").state_dict(), doubled)
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank").exists()


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({"push_to_hub": True, "repo_id": "nobody/nothing"}, "upload the directory"),
        ({"variant": "fp16"}, "directory of its own"),
        ({"distributed_checkpoint": True}, r"torch\.distributed\.checkpoint"),
        ({"state_dict": {}}, "it has nothing"),
        ({"state_dict": {"module.wte": torch.ones(1)}}, r"lacks .* it has module\.wte: pass that of the model itself"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused(tmp_path, settings, way_out):
    for is_main_process in (True, False) if "state_dict" not in settings else (True,):
        with pytest.raises(ValueError, match=way_out):
            upcycled().save_pretrained(tmp_path / "saved", is_main_process=is_main_process, **settings)
    assert not (tmp_path / "saved").exists()


def test_attached_adapters_are_saved_alone(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda *_, **__: None)
    model, other = upcycled(), upcycled()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path))
    assert not (tmp_path / "tritonmoe_upcycling.json").exists()
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(other.eval()(IDS).logits, model.eval()(IDS).logits)


class RaiseLearningRate(TrainerCallback):
    """So that what follows step 2 is worse."""

    def __init__(self, learning_rate: float = 10.0) -> None:
        self.learning_rate = learning_rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = self.learning_rate


def make_trainer(model: nn.Module, directory: Path, **settings: Any) -> Any:
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(output_dir=str(directory), **arguments)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4])


BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "limit"), [("gpt2", None), ("gpt2", 1), ("llama", None)])
def test_trainer_loads_the_best_model(tmp_path, name, limit, caplog):
    """In place, and a native twin, on whose disk every expert has tensors of its own."""
    model: Any = upcycled(name=name) if name == "gpt2" else tmt.upcycle(make_dense(name), num_experts=4, top_k=2)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model, tmp_path, save_total_limit=limit, **BEST)
        trainer.add_callback(RaiseLearningRate())
        trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert "Could not locate the best model" not in caplog.text
    load = tmt.load_upcycled if name == "gpt2" else type(model).from_pretrained
    assert_same(weights(trainer.model), load(best).state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == ({"checkpoint-2"} if limit else {f"checkpoint-{step}" for step in (1, 2, 3, 4)})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trainer_resumes(tmp_path, name):
    def make() -> Any:
        return upcycled() if name == "gpt2" else tmt.upcycle(make_dense(name), num_experts=4, top_k=2)

    undisturbed = make_trainer(make(), tmp_path)
    undisturbed.train()
    loaded = [tmt.load_upcycled(tmp_path / "checkpoint-4").train()] if name == "gpt2" else []
    for model in (make(), *loaded):
        resumed = make_trainer(model, tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.state.global_step == 4
        assert_same(weights(resumed.model), weights(undisturbed.model))


class WithArgument(transformers.GptOssForCausalLM):
    def __init__(self, config: Any, extra: int) -> None:
        super().__init__(config)
        self.extra = nn.Linear(4, extra)


@pytest.mark.parametrize("kind", ["subclass", "value head", "native with value head"])
def test_models_with_parts_of_their_own_resume(tmp_path, kind):
    """Trainer goes its own way with what tritonmoe has not made; of what it has made, added parts are loaded too."""
    tmt.upcycle(make_dense("gpt2"), num_experts=4, top_k=2)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"],
    )  # fmt: skip

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        if kind == "subclass":
            return WithArgument(config, 3)
        native = kind.startswith("native")
        model: Any = (
            tmt.upcycle(make_dense("llama"), 4, 2, seed=seed) if native else transformers.GptOssForCausalLM(config)
        )
        model.value_head = nn.Linear(32, 1)
        return model

    saved, resumed = make(1), make(2)
    saved.save_pretrained(tmp_path)
    make_trainer(resumed, tmp_path)._load_from_checkpoint(str(tmp_path))
    assert_same(weights(resumed), weights(saved))


def test_weights_of_experts_that_are_missing_are_refused(tmp_path, monkeypatch):
    model: Any = tmt.upcycle(make_dense("llama"), num_experts=4, top_k=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    state = {name: value for name, value in loaded.state_dict().items() if "experts.down_proj" not in name}
    monkeypatch.setattr(loaded, "state_dict", lambda: state)
    monkeypatch.setattr(type(model), "from_pretrained", lambda *_, **__: loaded)
    with pytest.raises(ValueError, match=r"all weights of the experts of this MixtralForCausalLM: .*down_proj"):
        make_trainer(model, tmp_path)._load_from_checkpoint(str(tmp_path))


def test_trainer_loads_the_best_adapters_over_an_upcycled_model(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = make_trainer(peft.get_peft_model(upcycled(), config), tmp_path, **BEST)
    trainer.add_callback(RaiseLearningRate(-0.05))  # uphill
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    loaded = peft.PeftModel.from_pretrained(upcycled(), best)
    assert_same(weights(trainer.model), weights(loaded))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    upcycled().save_pretrained(tmp_path)
    for settings, differing in (
        ({"num_experts": 2}, r"saved num_experts=4; this model num_experts=2"),
        ({"top_k": 1}, r"saved top_k=2; this model top_k=1"),
        ({"granularity": 2}, r"saved granularity=1; this model granularity=2"),
        ({"shared_expert": True}, r"saved shared_expert=False; this model shared_expert=True"),
        ({"layers": [0]}, r"saved blocks=.*; this model blocks="),
    ):
        arguments: Any = {"num_experts": 4, "top_k": 2, "target": "inplace", **settings}
        other = tmt.upcycle(make_dense("gpt2"), **arguments)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        before = weights(other)
        with pytest.raises(ValueError, match=rf"does not fit this GPT2LMHeadModel, .*another way: {differing}"):
            make_trainer(other, tmp_path)._load_from_checkpoint(str(tmp_path))
        assert_same(weights(other), before)
    with pytest.raises(ValueError, match="GPT2LMHeadModel was not: upcycle the dense model"):
        make_trainer(make_dense("gpt2"), tmp_path)._load_from_checkpoint(str(tmp_path))
