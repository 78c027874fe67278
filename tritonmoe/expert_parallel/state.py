"""What lives as long as a transport: how many layers and calls it has seen, and what its calls have learnt."""

import copy
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.count_exchange import refuse_call
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.tuning.tuner import PlanChooser
from tritonmoe.runtime.autograd import checkpointed_region
from tritonmoe.runtime.handles import Handled
from tritonmoe.runtime.other_ranks import in_dummy_forward
from tritonmoe.transports import Transport

__all__ = ["LayerCalls", "TransportState", "UnderWay", "abort_call", "state_of"]

MAX_UNDER_WAY = 4096
CALLS_OF_GENERATION = 10**9
"""rebuild() adds this to the numbers of calls, so that no call from before it is taken for a later one."""


class UnderWay(NamedTuple):
    """A forward inside a checkpoint, whose recompute and backward are still to come."""

    kind: tuple
    """Of the call, as in TransportState.choosers."""
    plan: OverlapPlan
    of_kind: object
    """What the call's kind of plan repeats: PlanKind.repeated."""
    region: "ref[object] | None"
    """checkpointed_region() of the forward."""


@dataclass
class TransportState:
    """What all layer calls on one transport share: counters by which ranks know their place, and tuned plans."""

    generation: int = 0
    """Of the transport, to which the rest belongs."""
    num_calls: int = 0
    num_layers: int = 0
    layers: "WeakSet[LayerCalls]" = field(default_factory=WeakSet)
    """Those that live."""
    num_backwards: int = 0
    last_backward: int = -1
    """The number of the call whose backward was the latest."""
    backwards: int = 0
    """A checksum of the numbers of all calls whose backwards have run, in their order."""
    choosers: dict[tuple, PlanChooser] = field(default_factory=dict)
    """By kind of call: what calls have in common that may take the same plan."""
    learnt: dict[tuple, object] = field(default_factory=dict)
    """What kinds of plans know of earlier calls, by the name of the kind of plan and the kind of call."""
    captured_flags: list[Tensor] = field(default_factory=list)
    """Of calls with a capacity that CUDA graphs have captured: (1,) bool on the host, set by a replay that gave NaN."""
    under_way: dict[int, UnderWay] = field(default_factory=dict)
    """By number of the call."""
    kept_bytes: dict[int, int] = field(default_factory=dict)
    """With a memory budget: what calls keep for their backwards, by number of the call, as predicted."""
    recompute: tuple["ref[object] | None", int, int] = (None, -1, 0)
    """The region and backward of the latest recomputed call, and how many calls of the region came before it."""

    def history(self) -> dict[str, int]:
        """Return what a header says of the layers and backwards so far."""
        return {
            "layers_made": self.num_layers,
            "layers_alive": len(self.layers),
            "num_backwards": self.num_backwards,
            "last_backward": self.last_backward,
            "backwards": self.backwards,
        }

    def next_call(self) -> int:
        """Return the number of the call that begins now."""
        self.num_calls += 1
        return self.num_calls - 1

    def uncount_call(self) -> None:
        """Take back the number of the call that began last: other ranks made a collective then, and counted nothing."""
        self.num_calls -= 1

    def note_backward(self, sequence: int) -> None:
        """Remember that a call's backward has run."""
        self.forget(sequence)
        self.num_backwards += 1
        self.last_backward = sequence
        self.backwards = zlib.crc32(sequence.to_bytes(8, "little"), self.backwards)

    def forget(self, sequence: int) -> None:
        """Forget what was noted of a call for its backward."""
        self.under_way.pop(sequence, None)
        self.kept_bytes.pop(sequence, None)

    def begin_generation(self, generation: int) -> None:
        """Forget what ranks have counted and learnt differently before the transport was rebuilt."""
        kept = {name: getattr(self, name) for name in ("num_layers", "layers", "captured_flags")}
        fresh = TransportState(generation, num_calls=generation * CALLS_OF_GENERATION, **kept)
        vars(self).update(vars(fresh))

    def start(self, sequence: int, kind: tuple, plan: OverlapPlan, of_kind: object) -> None:
        """Remember a forward, if it is one that will be recomputed."""
        region = checkpointed_region()
        if region is not None:
            self.under_way[sequence] = UnderWay(kind, plan, of_kind, region)
        if len(self.under_way) > MAX_UNDER_WAY:  # of forwards whose backward never came
            del self.under_way[next(iter(self.under_way))]

    def forward_to_recompute(self, kind: tuple) -> UnderWay | None:
        """Return the forward that this call recomputes: the n-th call of a region repeats its n-th forward.

        None in reentrant checkpointing, where the recompute is the only call that keeps anything.
        """
        region, backward = checkpointed_region(), torch._C._current_graph_task_id()
        number = self.recompute[2] + 1 if self.recompute[:2] == (region, backward) else 0
        self.recompute = region, backward, number
        calls = [call for call in self.under_way.values() if call.region == region]
        return calls[number] if number < len(calls) and calls[number].kind == kind else None


_states: "WeakKeyDictionary[Transport, TransportState]" = WeakKeyDictionary()


def state_of(transport: Transport) -> TransportState:
    state = _states.setdefault(transport, TransportState())
    if state.generation != transport.generation:
        state.begin_generation(transport.generation)
    return state


class LayerCalls(Handled):
    """What a layer's calls have in common: its place among the layers on its transport, and the latest report.

    A copy of a layer has other weights, so it has a number of its own, among the copies of its original: a copy made on
    one rank alone shifts the numbers of no other layer, but those of later copies of the same original.
    """

    def __init__(self, transport: Transport, expert_gradients: str = "sum") -> None:
        state = state_of(transport)
        self.layer = state.num_layers
        """Layer id; with `copy` it verifies that all ranks call the same layer."""
        self.copy = 0
        """Which copy of that layer it is, copies of copies included; 0: the layer itself."""
        self.number = self.layer
        """One number for both."""
        self.copies = [0]
        """How many there are, in a list that all of them share."""
        self.load: Tensor | None = None
        """(E + 1,) int64: the pairs that this rank's tokens gave each expert, and skipped ones, where someone asks."""
        self.counted: ref[nn.Module] | None = None
        """The module whose calls are counted in `load`, as long as it is in training mode."""
        self.takes_adapters = False
        """Whether it was called with adapters that are nobody's but the caller's."""
        self.expert_gradients = expert_gradients
        """What becomes of its gradients: sums over the ranks stay ("sum"), or are divided by their number ("mean")."""
        self.last_report: LayerReport | None = None
        self.load_balance_loss_weight: float | None = None
        """That of the MoELayer whose experts these are; None where another router gives the tokens to them."""
        state.num_layers += 1
        state.layers.add(self)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "last_report": None, "load": None, "counted": None}

    def __deepcopy__(self, memo: dict[int, object]) -> "LayerCalls":
        copied = copy.copy(self)
        self.copies[0] += 1
        copied.copy, copied.load = self.copies[0], None
        copied.number = copied.copy << 32 | copied.layer
        return copied

    def count(self, topk_ids: Tensor) -> None:
        """Add a training call's pairs to the load of their experts; a recompute's are counted already."""
        module = None if self.counted is None else self.counted()
        if self.load is None or module is None or not module.training:
            return
        if torch._C._current_graph_task_id() != -1 or in_dummy_forward():
            return
        num_experts = len(self.load) - 1
        ids = topk_ids.flatten().long()
        ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts).to(self.load.device)
        self.load.scatter_add_(0, ids, torch.ones_like(ids))


def abort_call(transport: Transport) -> None:
    """Make the other ranks fail, since this rank raises before its part of a layer call."""
    state = state_of(transport)
    if not refuse_call(transport, state.next_call()):
        state.uncount_call()
