"""The kinds of plans, in the order in which every rank tries them: the first that plans a call runs it."""

from tritonmoe.expert_parallel.plans.base import PlanKind
from tritonmoe.expert_parallel.plans.bounded import Bounded
from tritonmoe.expert_parallel.plans.capacity import Capacity
from tritonmoe.expert_parallel.plans.copies.balance import Copies
from tritonmoe.expert_parallel.plans.halves import Halves
from tritonmoe.expert_parallel.plans.plain import Plain
from tritonmoe.expert_parallel.plans.two_level import TwoLevel

__all__ = ["KIND_NAMES", "PLAN_KINDS"]

PLAN_KINDS: tuple[type[PlanKind], ...] = (Halves, TwoLevel, Capacity, Copies, Bounded, Plain)
KIND_NAMES = tuple(kind.name for kind in PLAN_KINDS)
"""Ranks compare them, since ranks that tried kinds in another order would wait for each other."""
