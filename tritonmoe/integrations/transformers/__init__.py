"""Hugging Face transformers: `register()` makes experts_implementation="tritonmoe" work in every MoE model.

Importing this package imports no transformers; register() does.
"""

from tritonmoe.integrations.transformers.model_halves import HalvedForward, two_batches
from tritonmoe.integrations.transformers.offload import offload_experts
from tritonmoe.integrations.transformers.packed.quantize import QuantizeReport, quantize_experts
from tritonmoe.integrations.transformers.parallelize_model import parallelize
from tritonmoe.integrations.transformers.peft_adapters import set_lora_B_order
from tritonmoe.integrations.transformers.registration import PatchReport, patch, register, set_expert_precision
from tritonmoe.integrations.transformers.requirements import EXPERTS_IMPLEMENTATION, MINIMUM_TRANSFORMERS
from tritonmoe.integrations.transformers.routed_experts import ModelStatistics, collect_statistics
from tritonmoe.integrations.transformers.routing_replay import record_routing, replay_routing
from tritonmoe.integrations.transformers.upcycle.auxiliary_loss import aux_loss
from tritonmoe.integrations.transformers.upcycle.checkpoint import upcycle_checkpoint
from tritonmoe.integrations.transformers.upcycle.conversion import UpcycleReport, upcycle, verify_upcycle
from tritonmoe.integrations.transformers.upcycle.saved import load_upcycled

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "MINIMUM_TRANSFORMERS",
    "HalvedForward",
    "ModelStatistics",
    "PatchReport",
    "QuantizeReport",
    "UpcycleReport",
    "aux_loss",
    "collect_statistics",
    "load_upcycled",
    "offload_experts",
    "parallelize",
    "patch",
    "quantize_experts",
    "record_routing",
    "register",
    "replay_routing",
    "set_expert_precision",
    "set_lora_B_order",
    "two_batches",
    "upcycle",
    "upcycle_checkpoint",
    "verify_upcycle",
]
