"""What every rank runs of Trainer's checkpoints: `torchrun trainer_checkpoints_worker.py DIRECTORY CASE...`."""

import functools
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from expert_parallel_worker import OVERLAP, assert_close, batch, gradients, main, make_model, rank, size, whole
from same_bits import assert_same_bits
from tiny_models import make_dense, make_tokenizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import tritonmoe as tm
from tritonmoe.experts.adapters import HANDS_OVER
from tritonmoe.integrations import transformers as tmt
from tritonmoe.placement.whole_states import whole_forms

STEPS = 4


def make_spread(name: str, dropout: float = 0.0) -> Any:
    """The model that all start from; dropout makes the random state of every rank matter."""
    model: Any
    if name == "gpt2":
        model = tmt.upcycle(make_dense(name), num_experts=4, top_k=2, shared_expert=True).train()
        model.transformer.drop.p = dropout
    else:
        model = make_model(name).train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    return model


def load(name: str, directory: Path) -> dict[str, Tensor]:
    kind = tmt.load_upcycled if name == "gpt2" else AutoModelForCausalLM.from_pretrained
    return kind(directory).state_dict()


def make_trainer(model: nn.Module, directory: Path, trainer: Any = Trainer, **settings: Any) -> Any:
    ids = batch(4 * STEPS)
    arguments = {
        "per_device_train_batch_size": 4 // size,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    return trainer(
        model=model,
        args=TrainingArguments(output_dir=str(directory), **arguments),
        train_dataset=dataset,
        eval_dataset=dataset[:4],
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def run_resumed(name: str, directory: Path) -> None:
    """Four steps in one go, and two steps, a checkpoint and two more: the same losses and weights, bit for bit."""
    directory = directory / f"resumed-{name}"
    undisturbed = make_trainer(make_spread(name, dropout=0.1), directory)
    undisturbed.train()
    expected, expected_losses = weights(undisturbed.model), losses(undisturbed)
    torch.manual_seed(17 + rank)
    resumed = make_trainer(make_spread(name, dropout=0.1), directory)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    assert losses(resumed) == expected_losses
    assert_same(weights(resumed.model), expected)
    # what is saved loads anywhere, and is what was trained
    resumed.save_model(str(directory / "model"))
    for saved in ("checkpoint-4", "model"):
        loaded = load(name, directory / saved)
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def run_saved_alone(name: str, directory: Path) -> None:
    """Spread by tritonmoe.parallelize, which knows nothing of save_pretrained: refused, and whole by the way out."""
    model = tmt.upcycle(make_dense(name), num_experts=4, top_k=2)
    expected = weights(model)
    tm.parallelize(model, dist.group.WORLD)
    with pytest.raises(ValueError, match=r"weights of this model are spread .*gather_state_dicts\(model\)"):
        model.save_pretrained(directory / "alone")
    assert not (directory / "alone").exists()
    tm.gather_state_dicts(model)
    state = model.state_dict()
    if rank == 0:
        model.save_pretrained(directory / "alone", state_dict=state)
        loaded = load(name, directory / "alone")
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def run_killed(name: str, directory: Path) -> None:
    """A checkpoint that ends before trainer_state.json is passed over, or refused where it is named."""
    directory = directory / "killed"
    make_trainer(make_spread(name), directory, max_steps=2, save_steps=1).train()
    assert (directory / "checkpoint-2" / "trainer_state.json").exists()
    dist.barrier()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed while the optimizer is written")

    trainer = make_trainer(make_spread(name), directory, max_steps=2, save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.save", fail)
        with pytest.raises(RuntimeError, match="killed"):  # over the whole checkpoint of this step
            trainer.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    assert not (directory / "checkpoint-2" / "trainer_state.json").exists()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no trainer_state\.json, .*half written"):
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    dist.barrier()
    trainer = make_trainer(make_spread(name), directory, max_steps=2, save_steps=1, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-2"]
    for missing in ("nowhere", "checkpoint-2/optimizer_sharded"):
        with pytest.raises(ValueError, match="has no trainer_state"):
            trainer.train(resume_from_checkpoint=str(directory / missing))
    with pytest.raises(ValueError, match="holds no whole checkpoint of Trainer"):
        make_trainer(make_spread(name), directory / "empty").train(resume_from_checkpoint=True)


def run_restarted(name: str, directory: Path) -> None:
    """A rank is killed inside the second checkpoint; torchrun starts all ranks again, which end as if undisturbed."""
    path = directory / "restarted"
    is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    own_save = distributed_checkpoint.save
    num_saves = 0

    def save(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_saves
        num_saves += 1
        if is_first_start and rank == 1 and num_saves == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return own_save(*arguments, **keywords)

    trainer = make_trainer(make_spread(name, dropout=0.1), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.save", save)
        trainer.train(resume_from_checkpoint=not is_first_start)
    assert not is_first_start
    undisturbed = make_trainer(make_spread(name, dropout=0.1), directory / "undisturbed")
    undisturbed.train()
    assert losses(trainer) == losses(undisturbed)
    assert_same(weights(trainer.model), weights(undisturbed.model))


def run_best(name: str, directory: Path) -> None:
    """load_best_model_at_end puts the experts of the best checkpoint back on every rank."""
    directory = directory / "best"

    class RaiseLearningRate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:  # so that what follows is worse
                for group in kwargs["optimizer"].param_groups:
                    group["lr"] = 10.0

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(make_spread(name), directory, lr_scheduler_type="constant", save_total_limit=1, **settings)
    trainer.add_callback(RaiseLearningRate())
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert_same(weights(trainer.model), load(name, best))


def run_write(name: str, directory: Path) -> None:
    trainer = make_trainer(make_spread(name), directory / f"over-{name}")
    trainer.train()
    if rank == 0:
        torch.save((losses(trainer), weights(trainer.model)), directory / f"over-{name}.pt")
    else:
        weights(trainer.model)


def run_read(name: str, directory: Path) -> None:
    """Another number of ranks goes on with the same global batch."""
    copied = directory / f"read-{name}-{size}"
    if rank == 0:
        shutil.copytree(directory / f"over-{name}" / "checkpoint-2", copied / "checkpoint-2")
    dist.barrier()
    trainer = make_trainer(make_spread(name), copied)
    trainer.train(resume_from_checkpoint=True)
    expected_losses, expected = torch.load(directory / f"over-{name}.pt")
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(expected_losses), atol=2e-4, rtol=0)
    assert_close(weights(trainer.model), expected)


def make_adapted(name: str, order: str) -> Any:
    from peft import LoraConfig, get_peft_model

    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=parameters, init_lora_weights=False
    )
    model = make_model(name)
    if order == "after":
        tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    if order != "one":
        torch.manual_seed(3)
        model = get_peft_model(model, config)
    if order == "before":
        tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    return model


def peft_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every gradient whole, and those of adapters in PEFT's format."""
    forms = whole_forms(model)
    return {name: forms[name](grad) if name in forms else grad for name, grad in gradients(model).items()}


def assert_divided(model: nn.Module) -> None:
    """Each rank has its share of the experts' adapters, and no more."""
    factors = [p for name, p in model.named_parameters() if "lora_" in name and ".experts." in name]
    assert factors
    assert all(factor.to_local().numel() * size == factor.numel() for factor in factors)


def run_adapted(name: str, directory: Path) -> None:
    """LoRA on attention and experts, before parallelize() and after it: gradients, the file, resumed, merged."""
    from peft import PeftModel, get_peft_model_state_dict

    ids, own = batch(2 * size), slice(2 * rank, 2 * rank + 2)
    one_device = make_adapted(name, "adapted")
    output = one_device(input_ids=ids, labels=ids)
    output.loss.backward()
    logits = output.logits.detach()
    expected = gradients(one_device)
    norm = nn.utils.clip_grad_norm_(one_device.parameters(), 0.1)
    one_device.save_pretrained(directory / f"adapter-of-{rank}")
    whole_file = (directory / f"adapter-of-{rank}" / "adapter_model.safetensors").read_bytes()
    for order in ("before", "after"):
        model = make_adapted(name, order)
        assert_divided(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(input_ids=ids[own], labels=ids[own]).loss.backward()
        assert_close(peft_gradients(model), expected)
        torch.testing.assert_close(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1)), norm)
        with pytest.raises(ValueError, match="would keep one rank's experts alone"):
            torch.save(get_peft_model_state_dict(model), directory / f"rank-{rank}.pt")
        with pytest.raises(ValueError, match="every rank must call it"):
            model.save_pretrained(directory / "alone", is_main_process=rank == 0)
        model.save_pretrained(directory / f"adapter-{order}")
        assert (directory / f"adapter-{order}" / "adapter_model.safetensors").read_bytes() == whole_file
        for base in (make_model(name), make_adapted(name, "one"), make_spread(name)):
            loaded = PeftModel.from_pretrained(base, directory / f"adapter-{order}").eval()
            torch.testing.assert_close(loaded(input_ids=ids[own]).logits, logits[own])
        for settings in ({}, {"low_cpu_mem_usage": True}):
            frozen = PeftModel.from_pretrained(make_spread(name), directory / f"adapter-{order}", **settings)
            assert_divided(frozen)
            frozen.save_pretrained(directory / "again")
            assert (directory / "again" / "adapter_model.safetensors").read_bytes() == whole_file
        tm.gather_state_dicts(frozen)
        assert_same(get_peft_model_state_dict(frozen), get_peft_model_state_dict(one_device))
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids[own]).logits, logits[own], atol=1e-4, rtol=1e-4)

        path = directory / f"adapted-{order}"
        undisturbed = make_trainer(make_adapted(name, order), path)
        undisturbed.train()
        saved = [file.name for file in (path / "checkpoint-2").iterdir()]
        assert "adapter_model.safetensors" in saved
        assert "model.safetensors" not in saved
        resumed = make_trainer(make_adapted(name, order), path)
        resumed.train(resume_from_checkpoint=str(path / "checkpoint-2"))
        assert losses(resumed) == losses(undisturbed)
        assert_same(weights(resumed.model), weights(undisturbed.model))


def run_adapted_merged(name: str, directory: Path) -> None:
    """Safe merging looks at every rank's experts, and hotswap takes the part of this rank."""
    from peft.utils import hotswap

    own = slice(2 * rank, 2 * rank + 2)
    ids = batch(2 * size)[own]
    other = make_adapted(name, "adapted")
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if "lora_" in key:
                parameter.mul_(-0.5)
        expected, swapped = make_adapted(name, "adapted")(input_ids=ids).logits, other(input_ids=ids).logits
    assert (expected - swapped).abs().max() > 1e-3
    other.save_pretrained(directory / f"swapped-{rank}")
    for order in ("before", "after"):
        model = make_adapted(name, order)
        model.merge_adapter(safe_merge=True)
        close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
        close(model(input_ids=ids).logits, expected)
        with pytest.raises(ValueError, match="currently merged"):
            hotswap.hotswap_adapter(model, str(directory / f"swapped-{rank}"), "default", torch_device="cpu")
        model.unmerge_adapter()
        close(model(input_ids=ids).logits, expected)
        hotswap.hotswap_adapter(model, str(directory / f"swapped-{rank}"), "default", torch_device="cpu")
        assert_divided(model)
        close(model(input_ids=ids).logits, swapped)
        model.save_pretrained(directory / f"saved-{order}")  # of one whose class's own save gathers too
        model.add_adapter("second", model.peft_config["default"])
        model.delete_adapter("second")
        close(model(input_ids=ids).logits, swapped)
        close(model.merge_and_unload(safe_merge=True)(input_ids=ids).logits, swapped)
        close(make_adapted(name, order).unload()(input_ids=ids).logits, make_model(name)(input_ids=ids).logits)
        broken = make_adapted(name, order)
        layer = broken.get_base_model().model.layers[-1].mlp
        factor = next(p for key, p in layer.named_parameters() if "lora_B" in key)
        if rank == size - 1:  # another rank's experts
            factor.detach().to_local().fill_(torch.nan)
        before = {key: whole(value).clone() for key, value in broken.state_dict().items()}
        for merge in (broken.merge_and_unload, broken.merge_adapter):
            with pytest.raises(ValueError, match=r"weights .* on some rank infinite or NaN"):
                merge(safe_merge=True)
            after = {key: whole(value) for key, value in broken.state_dict().items()}  # no layer was merged
            assert_same_bits(after, before)
        key = next(key for key in whole_forms(broken) if "lora_A" in key)
        wider = {key: torch.cat([other.state_dict()[key]] * 2)}
        with pytest.raises(ValueError, match="adapter of another rank"):
            hotswap.hotswap_adapter_from_state_dict(broken, wider, "default", broken.peft_config["default"])


def assert_trained_as_on_one_device(models: list[Any]) -> None:
    """Three clipped steps of AdamW, of a model here and of the same one over ranks: each has its part of the state."""
    from peft import get_peft_model_state_dict

    ids, own = batch(2 * size), slice(2 * rank, 2 * rank + 2)
    for model, rows in zip(models, (slice(0, 2 * size), own), strict=True):
        parallel = model if rows != own else nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in parallel.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            parallel(input_ids=ids[rows], labels=ids[rows]).loss.backward()
            nn.utils.clip_grad_norm_(parallel.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert sum(m.to_local().numel() for m in moments) * size == sum(m.numel() for m in moments)
    one_device, spread = models
    tm.gather_state_dicts(spread)
    assert_close(get_peft_model_state_dict(spread), get_peft_model_state_dict(one_device))


def run_adapted_experts(name: str, directory: Path) -> None:
    """LoRA on experts alone, before they are spread and after it, equals PEFT's own way on one device."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules=[], target_parameters=["experts.gate_up_proj"], init_lora_weights=False)
    ids, own = batch(2 * size), slice(2 * rank, 2 * rank + 2)
    rows = torch.randn(8 * size, 16, generator=torch.Generator().manual_seed(4))

    def make() -> Any:
        torch.manual_seed(5)
        if name == "layer":
            return nn.Sequential(tm.MoELayer(tm.MoEConfig(16, 8, 4, 2, transposed=True)))
        return make_model(name) if name == "mixtral" else tmt.upcycle(make_dense(name), 4, 2, target="inplace")

    def adapt(model: nn.Module) -> nn.Module:
        torch.manual_seed(6)
        return get_peft_model(model, config)

    def gradients_on(model: nn.Module, own: slice) -> dict[str, Tensor]:
        if name == "layer":
            model(rows[4 * own.start : 4 * own.stop]).square().mean().backward()
        else:
            model(input_ids=ids[own], labels=ids[own]).loss.backward()
        return {k.removeprefix("module."): grad for k, grad in peft_gradients(model).items() if "lora_" in k}

    one_device = adapt(make())
    with peft_alone():
        expected = gradients_on(one_device, slice(0, 2 * size))
    assert expected
    spread = tm.parallelize if name == "layer" else tmt.parallelize
    for order in ("before", "after"):
        model = make()
        if order == "after":
            spread(model, dist.group.WORLD)
        adapted = adapt(model)
        if order == "before":
            spread(adapted, dist.group.WORLD)
        adapted.requires_grad_(False)
        for key, parameter in adapted.named_parameters():
            parameter.requires_grad_("lora_" in key)
        assert_close(gradients_on(nn.parallel.DistributedDataParallel(adapted), own), expected)
    if name == "mixtral":
        adapted = adapt(make())
        tmt.parallelize(adapted, dist.group.WORLD)
        for part in (*adapted.get_base_model().model.layers, adapted):
            fully_shard(part, ignored_params=set(tm.expert_parameters(adapted)))
        assert_divided(adapted)
        assert_close(gradients_on(adapted, own), expected)
        assert_trained_as_on_one_device([adapt(make_model(name)), adapt(make_spread(name))])
        replicas = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replica", "expert"))
        model = make()
        tmt.parallelize(model, replicas)
        torch.manual_seed(rank)
        with pytest.raises(ValueError, match="has another value on ranks"):
            get_peft_model(model, config)
        model = make()
        tmt.parallelize(model, replicas)
        assert_close(gradients_on(nn.parallel.DistributedDataParallel(adapt(model)), own), expected)
        adapted = adapt(make())
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match="SGD was made with the experts of"):
            tmt.parallelize(adapted, dist.group.WORLD)
        del optimizer
        tmt.parallelize(adapted, dist.group.WORLD)
        tmt.two_batches(adapted)
        assert_close(gradients_on(nn.parallel.DistributedDataParallel(adapted), own), expected)
        model = adapt(make_spread(name))
        with pytest.raises(tm.TransportError if rank == 0 else tm.CountMismatch, match="every rank must"):
            model.save_pretrained(directory / "alone") if rank == 0 else model(input_ids=ids[own])


@contextmanager
def peft_alone() -> Iterator[None]:
    """Run PEFT's adapters in its own way meanwhile, whether it has been taught another one or not."""
    from peft.tuners.lora.layer import ParamWrapper

    tmt.register()
    taught, ParamWrapper._activate_lora = ParamWrapper._activate_lora, getattr(ParamWrapper, HANDS_OVER)
    yield
    ParamWrapper._activate_lora = taught


def run_trl(name: str, directory: Path) -> None:
    """TRL's SFTTrainer, which is a Trainer of its own."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def make() -> Any:
        arguments = SFTConfig(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=4 // size,
            max_steps=STEPS,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        ids = batch(4 * STEPS)
        dataset = Dataset.from_dict({"input_ids": ids.tolist()})
        tokenizer = make_tokenizer()
        return SFTTrainer(make_spread(name), arguments, train_dataset=dataset, processing_class=tokenizer)

    undisturbed = make()
    undisturbed.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(directory / "trl" / "checkpoint-2"))
    assert losses(resumed) == losses(undisturbed)
    assert_same(weights(resumed.model), weights(undisturbed.model))
    assert_same(load(name, directory / "trl" / "checkpoint-4"), weights(undisturbed.model))


CASES = {
    "resumed": run_resumed,
    "saved_alone": run_saved_alone,
    "killed": run_killed,
    "restarted": run_restarted,
    "best": run_best,
    "write": run_write,
    "read": run_read,
    "adapted": run_adapted,
    "adapted_merged": run_adapted_merged,
    "adapted_experts": run_adapted_experts,
    "trl": run_trl,
}

if __name__ == "__main__":
    main(CASES)
