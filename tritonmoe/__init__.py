"""Mixture-of-Experts layers with Triton kernels and compute/communication overlap.

Importing this touches no device, patches nothing, and works where triton is not installed.
"""

from . import transports
from .config import ClampedSwiGLU, MoEConfig
from .emulation import run_on_emulated_ranks
from .errors import CapacityOverflow, CountMismatch, NonFiniteScores, TransportError
from .expert_parallel import expert_parallel_mlp
from .experts import moe_mlp
from .gradient_clipping import clip_grad_norm_
from .layer import GroupedExperts, MoELayer
from .overlap_config import OverlapConfig, OverlapPlan
from .placement import ExpertPlacement
from .routing import TopKRouter
from .spread import expert_parameters, gather_state_dicts, parallelize
from .transports import LinkModel

__version__ = "0.1.0"

__all__ = [
    "CapacityOverflow",
    "ClampedSwiGLU",
    "CountMismatch",
    "ExpertPlacement",
    "GroupedExperts",
    "LinkModel",
    "MoEConfig",
    "MoELayer",
    "NonFiniteScores",
    "OverlapConfig",
    "OverlapPlan",
    "TopKRouter",
    "TransportError",
    "clip_grad_norm_",
    "expert_parallel_mlp",
    "expert_parameters",
    "gather_state_dicts",
    "moe_mlp",
    "parallelize",
    "run_on_emulated_ranks",
    "transports",
]
