"""CallSpec: what an expert-parallel call is, apart from its tensors, decided once; also as a string, for operators."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from tritonmoe.config.literals import read_literal
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapConfig, OverlapPlan
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.experts.spec import ExpertSpec, from_plain, literal, to_plain

__all__ = ["CallSpec", "decode", "encode"]

PLAN_FIELDS, CONFIG_FIELDS = (tuple(field.name for field in fields(kind)) for kind in (OverlapPlan, OverlapConfig))


@dataclass(frozen=True)
class CallSpec:
    """What is decided once for all calls of a layer, and is the same on every rank."""

    experts: ExpertSpec
    num_experts: int
    """E, over all ranks."""
    overlap: OverlapConfig | OverlapPlan
    placement: ExpertPlacement | None = None


# As a string


def encode(spec: CallSpec) -> str:
    """Return a spec whose activation is fused as the string that an operator takes for it, of Python literals."""
    overlap, placement = spec.overlap, spec.placement
    is_plan = isinstance(overlap, OverlapPlan)
    settings = [getattr(overlap, name) for name in (PLAN_FIELDS if is_plan else CONFIG_FIELDS)]
    settings = [WIRE_DTYPES.index(value) if isinstance(value, torch.dtype) else value for value in settings]
    held = None if placement is None else placement.experts_of_rank
    return literal((to_plain(spec.experts), spec.num_experts, is_plan, tuple(settings), held))


@lru_cache(maxsize=1024)
def decode(encoded: str) -> CallSpec:
    """Return the spec that encode() made the string of."""
    experts, num_experts, is_plan, settings, held = read_literal(encoded)
    named: dict[str, Any] = dict(zip(PLAN_FIELDS if is_plan else CONFIG_FIELDS, settings, strict=True))
    if named["wire_dtype"] is not None:
        named["wire_dtype"] = WIRE_DTYPES[named["wire_dtype"]]
    overlap = OverlapPlan(**named) if is_plan else OverlapConfig(**named)
    placement = None if held is None else ExpertPlacement(held)
    return CallSpec(from_plain(experts), num_experts, overlap, placement)
