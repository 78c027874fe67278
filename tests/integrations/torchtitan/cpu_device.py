"""What torchtitan takes for granted of a GPU, made up for a CPU before torchtitan is imported.

Memory statistics, a barrier by device, attention by torch's scaled_dot_product_attention instead of a compiled kernel,
and sums instead of scaled sums.
"""

import sys
import types
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

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


class Aux(NamedTuple):
    lse: Tensor | None


def attention(q: Any, k: Any, v: Any, *, block_mask: Any, scale: Any, enable_gqa: bool, **_: Any) -> Any:
    length = q.shape[2]
    positions = torch.arange(length)
    batch = torch.arange(q.shape[0])
    mask = block_mask.mask_mod(batch[:, None, None], torch.tensor(0), positions[None, :, None], positions[None, None])
    mask = mask.expand(q.shape[0], length, length)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
    return out, Aux(None)


def sum_unscaled(divide: Any) -> Any:
    def divided(model: torch.nn.Module) -> None:
        divide(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    return divided


def finish() -> None:
    """Replace what can only be once torchtitan is imported."""
    from torchtitan.models.common.attention import FlexAttention

    FlexAttention.compiled_flex_attn = staticmethod(attention)
    name = "disable_fsdp_gradient_division"
    for module in [module for key, module in sys.modules.items() if key.startswith("torchtitan")]:
        if hasattr(module, name):
            setattr(module, name, sum_unscaled(getattr(module, name)))
