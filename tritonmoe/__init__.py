"""Mixture-of-Experts layers with Triton kernels and compute/communication overlap.

Importing this touches no device, patches nothing, and works where triton is not installed.
"""

from tritonmoe import transports
from tritonmoe.config.activations import ClampedSwiGLU, SoftcappedSwiGLU
from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.errors import CapacityOverflow, CountMismatch, NonFiniteScores, OffloadError, TransportError
from tritonmoe.expert_parallel.expert_parallel_mlp import expert_parallel_mlp
from tritonmoe.expert_parallel.plans.halves import two_batches
from tritonmoe.experts.adapters import ExpertAdapters
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.experts.quantized_weight import QuantizedWeight
from tritonmoe.integrations.torch_distributed.gradient_clipping import clip_grad_norm_
from tritonmoe.integrations.torch_distributed.parallelize import expert_parameters, gather_state_dicts, parallelize
from tritonmoe.integrations.weight_sync.export_weights import export_weights
from tritonmoe.integrations.weight_sync.load_weights import load_weights
from tritonmoe.layer import GroupedExperts, MoELayer
from tritonmoe.layer.offloading import offload_experts
from tritonmoe.layer.rebalancing.rebalance import Rebalancer, rebalance
from tritonmoe.layer.rebalancing.rebalanced import Rebalanced
from tritonmoe.routing import TopKRouter
from tritonmoe.runtime.version import __version__ as __version__
from tritonmoe.transports import LinkModel
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

__all__ = [
    "CapacityOverflow",
    "ClampedSwiGLU",
    "CountMismatch",
    "ExpertAdapters",
    "ExpertPlacement",
    "ExpertPrecision",
    "GroupedExperts",
    "LinkModel",
    "MoEConfig",
    "MoELayer",
    "NonFiniteScores",
    "OffloadError",
    "OverlapConfig",
    "OverlapPlan",
    "QuantizedWeight",
    "Rebalanced",
    "Rebalancer",
    "SoftcappedSwiGLU",
    "TopKRouter",
    "TransportError",
    "clip_grad_norm_",
    "expert_parallel_mlp",
    "expert_parameters",
    "export_weights",
    "gather_state_dicts",
    "load_weights",
    "moe_mlp",
    "offload_experts",
    "parallelize",
    "rebalance",
    "run_on_emulated_ranks",
    "transports",
    "two_batches",
]
