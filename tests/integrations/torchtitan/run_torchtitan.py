"""torchtitan's own training program on a CPU: `torchrun run_torchtitan.py LOSSES ARGUMENT...`; writes losses to a file.

What torchtitan takes for granted of a GPU is made up here, the same for every run: memory statistics, a barrier by
device, attention by torch's scaled_dot_product_attention instead of a compiled kernel, sums instead of scaled sums.
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils

properties = types.SimpleNamespace(total_memory=1 << 34, name="cpu", multi_processor_count=1)
for name, value in {
    "get_device_name": lambda *_: "cpu",
    "get_device_properties": lambda *_: properties,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda *_: None,
    "memory_stats": lambda *_: {},
}.items():
    if not hasattr(torch.cpu, name):
        setattr(torch.cpu, name, value)
titan_utils.device_type, titan_utils.device_module = "cpu", torch.cpu
barrier = dist.barrier
dist.barrier = lambda *arguments, **keywords: barrier(*arguments, **{**keywords, "device_ids": None})
if not hasattr(dist, "set_timeout"):  # nor has torch 2.13 on a GPU, where torchtitan fails after its first step
    dist.set_timeout = lambda *_: None

import torchtitan.distributed.fsdp as titan_fsdp
import torchtitan.models.deepseek_v3 as titan_deepseek
import torchtitan.models.qwen3 as titan_qwen3
import torchtitan.train
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.models.common.attention import FlexAttention


def attention(q: Any, k: Any, v: Any, *, block_mask: Any, scale: Any, enable_gqa: bool, **_: Any) -> Any:
    length = q.shape[2]
    positions = torch.arange(length)
    batch = torch.arange(q.shape[0])
    mask = block_mask.mask_mod(batch[:, None, None], torch.tensor(0), positions[None, :, None], positions[None, None])
    mask = mask.expand(q.shape[0], length, length)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
    return out, types.SimpleNamespace(lse=None)


FlexAttention.compiled_flex_attn = staticmethod(attention)
divide = titan_fsdp.disable_fsdp_gradient_division


def no_scaled_sums(model: torch.nn.Module) -> None:
    divide(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


for module in [module for name, module in sys.modules.items() if name.startswith("torchtitan")]:
    if getattr(module, "disable_fsdp_gradient_division", None) is divide:
        module.disable_fsdp_gradient_division = no_scaled_sums


def with_layers(make: Any, number: int) -> Any:
    def made(*arguments: Any, **keywords: Any) -> Any:
        config = make(*arguments, **keywords)
        config.layers = config.layers[:number]
        return config

    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    for configs, name, number in (
        (titan_qwen3.qwen3_configs, "debugmodel_moe", 2),
        (titan_deepseek.deepseekv3_configs, "debugmodel", 3),  # the first is dense
    ):
        configs[name] = with_layers(configs[name], number)
    losses_path = Path(sys.argv.pop(1))
    losses = []
    log = MetricsProcessor.log

    def kept(self: Any, step: int, global_avg_loss: float, *rest: Any, **named: Any) -> Any:
        losses.append(float(global_avg_loss))
        return log(self, step, global_avg_loss, *rest, **named)

    MetricsProcessor.log = kept
    torchtitan.train.main()
    if os.environ.get("RANK", "0") == "0":
        losses_path.write_text(json.dumps(losses))
