"""TRL: ReplayedRouting, by which a GRPOTrainer trains with the routing of the rollout. It imports no TRL by itself."""

from tritonmoe.integrations.trl.replayed_routing import ReplayedRouting

__all__ = ["ReplayedRouting"]
