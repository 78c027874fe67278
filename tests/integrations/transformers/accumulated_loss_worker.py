"""Routers' gradients in one step of Trainer; `torchrun accumulated_loss_worker.py DIRECTORY KIND...` saves rank 0's."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import make_dense
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainerCallback, TrainingArguments

from tritonmoe.integrations import transformers as tmt

QWEN3_MOE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
}
ROW = torch.randint(3, 64, (9,), generator=torch.Generator().manual_seed(1))
DROPOUTS = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def make_model(kind: str) -> Any:
    name, _, spread = kind.partition(" ")
    if name == "qwen3_moe":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**QWEN3_MOE))
    elif name == "native":
        model = tmt.upcycle(make_dense("qwen3"), 4, 2)
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.01
    else:
        model = tmt.upcycle(make_dense(name, **DROPOUTS.get(name, {})), 4, 2, target="inplace")
    if spread:
        tmt.parallelize(model, dist.group.WORLD)
    elif name == "qwen3_moe":
        tmt.patch(model)
    return model.train()


def routers(model: nn.Module) -> list[nn.Module]:
    found = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    return [module for name, module in found.items() if name.endswith((".router", "mlp.gate"))]


def router_gradients(model: Any, accumulation: int, directory: str | os.PathLike) -> list[Tensor]:
    """Gradients of a step over four rows in all, which are the same, so that the cut changes nothing."""
    found: list[Tensor] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            found.extend(router.weight.grad.clone() for router in routers(model))

    size = dist.get_world_size() if dist.is_initialized() else 1
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=1,
        per_device_train_batch_size=4 // size // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": ROW, "labels": ROW}] * 4
    Trainer(model, arguments, train_dataset=data, callbacks=[Look()]).train()
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    directory = Path(sys.argv[1])
    for kind in sys.argv[2:]:
        for accumulation in (1, 2):
            gradients = router_gradients(make_model(kind), accumulation, directory)
            if dist.get_rank() == 0:
                torch.save(gradients, directory / f"{kind} {accumulation}.pt")
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed {kind}", flush=True)
    dist.destroy_process_group()
