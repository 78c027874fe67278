"""SpreadExperts: the experts of one layer that is spread over ranks, and what it takes to place them otherwise."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.experts.adapters import factors_of
from tritonmoe.layer import GroupedExperts
from tritonmoe.sharding.marks import MARK, STATE, ShardedNames
from tritonmoe.sharding.placed_states import note_order
from tritonmoe.sharding.sharded_parameters import Sharding
from tritonmoe.transports import Transport

__all__ = ["SpreadExperts", "find_spread_experts"]


class ExpertsState(Protocol):
    """What an integration leaves on a module of experts that it has spread (marks.STATE)."""

    @property
    def num_experts(self) -> int: ...
    @property
    def sharding(self) -> Sharding: ...
    @property
    def calls(self) -> LayerCalls: ...
    @property
    def placement(self) -> ExpertPlacement | None: ...
    def placed(self, placement: ExpertPlacement | None) -> "ExpertsState": ...


@dataclass(frozen=True)
class SpreadExperts:
    """The experts of one layer, by the name of their module in the model."""

    name: str
    module: nn.Module
    num_experts: int
    """E, over all ranks."""
    sharding: Sharding
    calls: LayerCalls
    factors: tuple[nn.Module, ...]
    """The modules of PEFT's adapters of these experts of which each rank holds its part."""

    @property
    def transport(self) -> Transport:
        """The transport of all ranks, which has one level."""
        return self.sharding.transport.single_level

    @property
    def placement(self) -> ExpertPlacement:
        module = self.module
        placement = module.placement if isinstance(module, GroupedExperts) else module.__dict__[STATE].placement
        return ExpertPlacement.contiguous(self.num_experts, self.transport.size) if placement is None else placement

    def marked(self) -> list[tuple[str, nn.Module, ShardedNames]]:
        """Return the module, and those of its adapters, with the names of the parameters that are this rank's."""
        return [
            (self.name if number == 0 else f"adapter {number} of {self.name}", module, module.__dict__[MARK])
            for number, module in enumerate((self.module, *self.factors))
            if MARK in module.__dict__
        ]

    def place(self, placement: ExpertPlacement) -> None:
        """Note that the rows of all parameters are these experts' from now on."""
        kept = None if placement.is_contiguous else placement
        if isinstance(self.module, GroupedExperts):
            self.module.take_placement(kept)
        else:
            state: ExpertsState = self.module.__dict__[STATE]
            setattr(self.module, STATE, state.placed(kept))
        for _, module, _ in self.marked():
            note_order(module, placement.experts_of_rank)


def find_spread_experts(model: nn.Module) -> list[SpreadExperts]:
    """Return the experts in `model` that are spread over ranks, each with the adapters on them."""
    factors: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        found = factors_of(module)
        if found is not None:
            factors.setdefault(id(found[0]), []).extend(found[1])
    every = []
    for name, module in model.named_modules():
        state: ExpertsState | None = module.__dict__.get(STATE)
        if isinstance(module, GroupedExperts) and module.sharding is not None and module.calls is not None:
            num_experts, sharding, calls = module.config.num_experts, module.sharding, module.calls
        elif state is not None:
            num_experts, sharding, calls = state.num_experts, state.sharding, state.calls
        else:
            continue
        own = tuple(linear for linear in factors.get(id(module), ()) if MARK in linear.__dict__)
        every.append(SpreadExperts(name or type(module).__name__, module, num_experts, sharding, calls, own))
    return every
