"""What every rank runs of FSDP2 and Trainer: `torchrun expert_parallel_training_worker.py DIRECTORY CASE...`.

As in expert_parallel_worker.py, each case compares with one process on the whole batch.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expert_parallel_worker import (
    OVERLAP,
    assert_close,
    batch,
    gradients,
    main,
    make_model,
    rank,
    reference,
    same_everywhere,
    size,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt


def own_rows(ids: Tensor) -> Tensor:
    return ids[2 * rank : 2 * rank + 2]


def check_step(model: nn.Module, ids: Tensor, expected: dict[str, Tensor]) -> None:
    output = model(input_ids=own_rows(ids), labels=own_rows(ids))
    output.loss.backward()
    logits = same_everywhere(whole(output.logits).detach())
    assert_close({"logits": logits, **gradients(model)}, expected)


def run_fully_sharded(name: str, directory: Path) -> None:
    """Experts over one axis and their shards over the other, everything else over all ranks."""
    ids = batch(2 * size)
    expected, tokens = reference(name, ids)
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "expert"))
    everybody = init_device_mesh("cpu", (size,))
    model: Any = make_model(name)
    names = list(model.state_dict())
    tmt.parallelize(model, mesh, OVERLAP)
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts, mesh=mesh["data"])
        fully_shard(layer, mesh=everybody)
    fully_shard(model, mesh=everybody)
    assert list(model.state_dict()) == names
    experts = model.model.layers[0].mlp.experts.down_proj
    assert experts.to_local().shape[0] == 8 // size
    check_step(model, ids, expected)
    model.zero_grad()
    check_step(model, ids, expected)  # the weights were gathered, freed and gathered again
    generated = model.eval().generate(own_rows(ids)[:, :4], max_new_tokens=6, do_sample=False, synced_gpus=True)
    assert torch.equal(generated, own_rows(tokens))
    model.save_pretrained(directory / f"fsdp-{name}")
    loaded = AutoModelForCausalLM.from_pretrained(directory / f"fsdp-{name}", experts_implementation="eager")
    fresh = make_model(name).state_dict()
    assert all(torch.equal(loaded.state_dict()[key], fresh[key]) for key in fresh)


def run_sharded_beside_experts(name: str, directory: Path) -> None:
    """FSDP2 over the ranks that the experts are spread over, which leaves the experts alone."""
    ids = batch(2 * size)
    expected, _ = reference(name, ids)
    model: Any = make_model(name)
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    experts = set(tm.expert_parameters(model))
    everybody = init_device_mesh("cpu", (size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everybody, ignored_params=experts)
    fully_shard(model, mesh=everybody, ignored_params=experts)
    check_step(model, ids, expected)
    with pytest.raises(ValueError, match="are spread over ranks already: call parallelize"):
        tmt.parallelize(model, dist.group.WORLD)


def run_ep_implementation(name: str, directory: Path) -> None:
    """Two groups of experts' ranks: dense weights over all ranks, each expert's over those that hold it."""
    from transformers.distributed import DistributedConfig

    ids = batch(2 * size)
    expected, _ = reference(name, ids)
    if rank == 0:
        make_model(name).save_pretrained(directory / f"whole-{name}")
    dist.barrier()
    tmt.register(OVERLAP)
    model = AutoModelForCausalLM.from_pretrained(
        directory / f"whole-{name}",
        experts_implementation="tritonmoe",
        distributed_config=DistributedConfig(fsdp_size=size, ep_size=2, ep_implementation="tritonmoe"),
    )
    check_step(model, ids, expected)
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
        with pytest.raises(ValueError, match=r"adapters of its own experts alone.* instead of ep_implementation"):
            adapted(input_ids=ids[:2])


class InOrder(Trainer):
    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


STEPS, MAX_GRAD_NORM = 4, 0.7
OPTIMIZERS = {"sgd": (torch.optim.SGD, 0.5), "adamw_torch": (torch.optim.AdamW, 1e-2)}


def reference_training(name: str, optimizer_name: str, ids: Tensor) -> tuple[list[float], list[float], nn.Module]:
    model = make_model(name).train()
    kind, lr = OPTIMIZERS[optimizer_name]
    optimizer = kind(model.parameters(), lr=lr, weight_decay=0.0)
    losses, norms = [], []
    for step in range(STEPS):
        rows = ids[4 * step : 4 * step + 4]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms, model


def train(model: nn.Module, optimizer_name: str, ids: Tensor, directory: Path) -> tuple[list[float], list[float]]:
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=4 // size,
        max_steps=STEPS,
        optim=optimizer_name,
        learning_rate=OPTIMIZERS[optimizer_name][1],
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    trainer = InOrder(model=model, args=arguments, train_dataset=dataset)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs]


def check_training(name: str, make_spread: Any, directory: Path) -> None:
    ids = batch(4 * STEPS)
    for optimizer_name in OPTIMIZERS:
        losses, norms, expected = reference_training(name, optimizer_name, ids)
        assert min(norms) > MAX_GRAD_NORM  # so that the norm matters to every step
        model = make_spread()
        actual_losses, actual_norms = train(model, optimizer_name, ids, directory)
        torch.testing.assert_close(torch.tensor(actual_losses), torch.tensor(losses), atol=2e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(actual_norms), torch.tensor(norms), atol=0, rtol=1e-4)
        if optimizer_name == "sgd":  # Adam's first steps are signs, which rounding turns around
            actual = {key: whole(value.detach()) for key, value in model.named_parameters()}
            assert_close(actual, {key: value.detach() for key, value in expected.named_parameters()})


def run_trainer(name: str, directory: Path) -> None:
    def make_spread() -> nn.Module:
        model = make_model(name).train()
        tmt.parallelize(model, dist.group.WORLD, OVERLAP)
        return model

    check_training(name, make_spread, directory)
    for how in ({"is_main_process": rank == 0}, {"state_dict": None}):  # as one rank alone calls
        with pytest.raises(ValueError, match=r"every rank must call it.*trainer\.save_model\(directory\)"):
            make_spread().save_pretrained(directory / "alone", **how)
    assert not (directory / "alone").exists()


def run_trainer_with_ep_implementation(name: str, directory: Path) -> None:
    from transformers.distributed import DistributedConfig

    if rank == 0:
        make_model(name).save_pretrained(directory / f"trained-{name}")
    dist.barrier()
    tmt.register(OVERLAP)

    def make_spread() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            directory / f"trained-{name}",
            experts_implementation="tritonmoe",
            distributed_config=DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="tritonmoe"),
        ).train()

    check_training(name, make_spread, directory)


CASES = {
    "fully_sharded": run_fully_sharded,
    "sharded_beside_experts": run_sharded_beside_experts,
    "ep_implementation": run_ep_implementation,
    "trainer": run_trainer,
    "trainer_with_ep_implementation": run_trainer_with_ep_implementation,
}

if __name__ == "__main__":
    main(CASES)
