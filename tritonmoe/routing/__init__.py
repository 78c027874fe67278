"""Routing: which K experts each token goes to and with what weight; losses, numbers, and recordings to replay.

Selection without an auxiliary loss and expert groups as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437); the load
balance loss of Switch Transformers (https://arxiv.org/abs/2101.03961), for any K; the z-loss of ST-MoE
(https://arxiv.org/abs/2202.08906); MaxVio from loss-free balancing (https://arxiv.org/abs/2408.15664).
"""

from tritonmoe.routing.checkpointing import save_topk
from tritonmoe.routing.layer_recording import LayerRecording
from tritonmoe.routing.losses import load_balance_loss, z_loss
from tritonmoe.routing.recording import RoutingRecording
from tritonmoe.routing.router import TopKRouter
from tritonmoe.routing.statistics import RoutingStatistics, expert_load, routing_statistics
from tritonmoe.routing.token_routing import Routing

__all__ = [
    "LayerRecording",
    "Routing",
    "RoutingRecording",
    "RoutingStatistics",
    "TopKRouter",
    "expert_load",
    "load_balance_loss",
    "routing_statistics",
    "save_topk",
    "z_loss",
]
