"""register(): make transformers' models know tritonmoe by its name."""

import torch

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.integrations.transformers.experts import experts_forward
from tritonmoe.integrations.transformers.names import EP_REGISTRY_SINCE, EXPERTS_IMPLEMENTATION
from tritonmoe.integrations.transformers.packed.quantizers import load_packed, register_fp8_experts
from tritonmoe.integrations.transformers.peft_adapters import hand_over_factors
from tritonmoe.integrations.transformers.requirements import check_transformers

__all__ = ["register"]


def register(overlap: OverlapConfig | None = None, *, packed: bool = False) -> None:
    """Return transformers' MoE models the experts implementation "tritonmoe"; calling it again changes nothing.

    Where PEFT is installed, its adapters of experts (LoraConfig(target_parameters=...)) are not multiplied out any
    more in models that run through it, whether made before or after this call.

    From transformers 5.23 on it also gives `DistributedConfig` the expert-parallel implementation "tritonmoe", whose
    exchanges overlap with the experts; earlier releases have parallelize().

    Args:
        overlap: the chunks of ep_implementation="tritonmoe" from now on; the same on every rank. None leaves them.
        packed: whether from_pretrained() keeps experts of MXFP4 and FP8 checkpoints packed from now on, frozen, and
            makes them run through tritonmoe; all other weights of such checkpoints become bf16. It needs transformers
            5.24.
    Raises:
        ImportError: transformers is missing or older than 5.7.
    Example:
        register()
        model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="tritonmoe")
        register(packed=True)                          # gpt-oss, Qwen3-FP8: from_pretrained(name) stays small
        model.set_experts_implementation("eager")      # and back: model.set_experts_implementation("tritonmoe")
        expert_parallel = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="tritonmoe")
        model = AutoModelForCausalLM.from_pretrained(name, distributed_config=expert_parallel)
    """
    version = check_transformers()
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)
    register_fp8_experts()
    if packed:
        load_packed()
    hand_over_factors()
    if version >= EP_REGISTRY_SINCE and torch.distributed.is_available():
        from transformers.distributed.expert_parallel import EPImplementationInterface

        from tritonmoe.integrations.transformers.ep_implementation import OverlappedEP

        if overlap is not None:
            OverlappedEP.overlap = overlap
        EPImplementationInterface.register(EXPERTS_IMPLEMENTATION, OverlappedEP)
    elif overlap is not None:
        raise ImportError(
            f"register(overlap=...) is for an expert-parallel implementation, which transformers "
            f"{'.'.join(map(str, version))} doesn't know (5.23 and later do): use parallelize(model, group, overlap)"
        )
