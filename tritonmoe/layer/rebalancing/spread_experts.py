"""SpreadExperts: the experts of one layer that is spread over ranks, and the adapters that move with them."""

from dataclasses import dataclass

from torch import nn

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.experts.adapters import factors_of
from tritonmoe.placement.expert_shards import ExpertShards, sharded_modules, shards_of
from tritonmoe.placement.offloaded import offloaded_of
from tritonmoe.placement.placed_states import note_order
from tritonmoe.transports import Transport

__all__ = ["SpreadExperts", "find_spread_experts"]


@dataclass(frozen=True)
class SpreadExperts:
    """The experts of one layer, by the name of their module in the model."""

    name: str
    module: nn.Module
    shards: ExpertShards
    factors: tuple[nn.Module, ...]
    """The modules of PEFT's adapters of these experts of which each rank holds its part."""

    @property
    def transport(self) -> Transport:
        """The transport of all ranks, which has one level."""
        return self.shards.transport.single_level

    @property
    def placement(self) -> ExpertPlacement:
        return ExpertPlacement(self.shards.experts_of_rank)

    def sharded(self) -> list[tuple[str, nn.Module, ExpertShards]]:
        """Return the module, and those of its adapters, if their parameters are this rank's, each with its shards."""
        names = [self.name, *(f"adapter {number} of {self.name}" for number in range(1, 1 + len(self.factors)))]
        return [
            (name, module, shards)
            for name, module in zip(names, (self.module, *self.factors), strict=True)
            if (shards := shards_of(module)) is not None and shards.is_spread
        ]

    def place(self, placement: ExpertPlacement) -> None:
        """Note that the rows of all parameters are these experts' from now on."""
        for module in (self.module, *self.factors):
            if (shards := shards_of(module)) is not None:
                shards.move(None if placement.is_contiguous else placement)
                note_order(module)


def find_spread_experts(model: nn.Module) -> list[SpreadExperts]:
    """Return the experts in `model` that are spread over ranks, each with the adapters on them."""
    factors: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        found = factors_of(module)
        if found is not None:
            factors.setdefault(id(found[0]), []).extend(found[1])
    of_adapters = {id(linear) for linears in factors.values() for linear in linears}
    every = []
    for name, module in model.named_modules():
        shards = shards_of(module)
        if shards is not None and (offloaded := offloaded_of(module)) is not None:
            raise ValueError(
                f"the experts of {name or type(module).__name__} stay in {offloaded.place} since offload_experts(), "
                "and don't move: call rebalance() and its step() first, and offload_experts() where they are then"
            )
        if shards is None or not shards.names or id(module) in of_adapters:
            continue
        own = tuple(linear for linear in factors.get(id(module), ()) if any(sharded_modules(linear)))
        every.append(SpreadExperts(name or type(module).__name__, module, shards, own))
    return every
