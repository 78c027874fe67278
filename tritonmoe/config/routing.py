"""RoutingRule: how logits become ids and weights of K experts; also as a string, for operators."""

from functools import lru_cache
from typing import NamedTuple

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.literals import read_literal
from tritonmoe.config.scores import ScoreName

__all__ = ["RoutingRule", "decode"]


class RoutingRule(NamedTuple):
    """The fields of a MoEConfig that say how logits become ids and weights; their meaning stands there."""

    top_k: int
    score_function: ScoreName = "softmax"
    softmax_after_topk: bool = False
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    num_expert_groups: int = 1
    top_k_groups: int = 1

    @classmethod
    def of(cls, config: MoEConfig) -> "RoutingRule":
        """Return the rule of a layer."""
        return cls(
            config.top_k,
            config.score_function,
            config.softmax_after_topk,
            config.renormalize,
            float(config.routed_scaling_factor),
            config.num_expert_groups,
            config.top_k_groups,
        )

    def encode(self) -> str:
        """Return the string that an operator takes for this rule."""
        return repr(tuple(self))


@lru_cache(maxsize=1024)
def decode(encoded: str) -> RoutingRule:
    """Return the rule that encode() made the string of."""
    return RoutingRule(*read_literal(encoded))
