"""Hugging Face transformers: `register()` makes experts_implementation="tritonmoe" work in every MoE model.

Importing this package imports no transformers; register() does.
"""

import torch

from ...overlap_config import OverlapConfig
from .patching import PatchReport, patch
from .requirements import MINIMUM_TRANSFORMERS, check_transformers
from .sharding import parallelize
from .statistics import ModelStatistics, collect_statistics
from .upcycle import UpcycleReport, upcycle, verify_upcycle
from .upcycle_checkpoint import upcycle_checkpoint
from .upcycle_inplace import aux_loss
from .upcycle_saved import load_upcycled

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "MINIMUM_TRANSFORMERS",
    "ModelStatistics",
    "PatchReport",
    "UpcycleReport",
    "aux_loss",
    "collect_statistics",
    "load_upcycled",
    "parallelize",
    "patch",
    "register",
    "upcycle",
    "upcycle_checkpoint",
    "verify_upcycle",
]

EXPERTS_IMPLEMENTATION = "tritonmoe"
EP_REGISTRY_SINCE = (5, 23)


def register(overlap: OverlapConfig | None = None) -> None:
    """Give transformers' MoE models the experts implementation "tritonmoe"; calling it again changes nothing.

    From transformers 5.23 on it also gives `DistributedConfig` the expert-parallel implementation "tritonmoe", whose
    exchanges overlap with the experts; earlier releases have parallelize().

    Args:
        overlap: the chunks of ep_implementation="tritonmoe" from now on; the same on every rank. None leaves them.
    Raises:
        ImportError: transformers is missing or older than 5.7.
    Example:
        register()
        model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="tritonmoe")
        model.set_experts_implementation("eager")      # and back: model.set_experts_implementation("tritonmoe")
        expert_parallel = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="tritonmoe")
        model = AutoModelForCausalLM.from_pretrained(name, distributed_config=expert_parallel)
    """
    version = check_transformers()
    from transformers.integrations.moe import ExpertsInterface

    from .experts import experts_forward

    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)
    if version >= EP_REGISTRY_SINCE and torch.distributed.is_available():
        from transformers.distributed.expert_parallel import EPImplementationInterface

        from .ep_implementation import OverlappedEP

        if overlap is not None:
            OverlappedEP.overlap = overlap
        EPImplementationInterface.register(EXPERTS_IMPLEMENTATION, OverlappedEP)
    elif overlap is not None:
        raise ImportError(
            f"register(overlap=...) is for an expert-parallel implementation, which transformers "
            f"{'.'.join(map(str, version))} doesn't know (5.23 and later do): use parallelize(model, group, overlap)"
        )
