"""rebalance(): experts move to other ranks where the load of the last steps says that this pays."""

import logging
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from weakref import ref

import torch
from torch import Tensor, nn

from tritonmoe.config.numbers import is_integer
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.errors import PeerFailure
from tritonmoe.layer.rebalancing.better_placement import best_placement, experts_time, ns_of_a_megabyte, source_of
from tritonmoe.layer.rebalancing.carried import (
    carried_tensors,
    check_optimizers,
    digest,
    expert_bytes,
    refuse_elsewhere,
    refuse_shared_states,
)
from tritonmoe.layer.rebalancing.rebalanced import Look, Rebalanced
from tritonmoe.layer.rebalancing.spread_experts import SpreadExperts, find_spread_experts
from tritonmoe.placement.expert_shards import Sharding
from tritonmoe.transports import Transport, as_transport
from tritonmoe.transports.base import fail_peers_on_error
from tritonmoe.transports.waiting import Doing

__all__ = ["Rebalancer", "rebalance"]

log = logging.getLogger("tritonmoe")
MEGABYTE = 2**20


def rebalance(
    model: nn.Module, *optimizers: torch.optim.Optimizer, every: int = 100, history: int | None = None
) -> "Rebalancer":
    """Prepare the experts in `model` that are spread over ranks to move to where the busiest rank has least to do.

    Every rank calls it, once the experts are spread and the optimizers made, and then step() of what it gives, between
    two steps of the training. Each `every` steps the ranks sum how many pairs every expert had in the last `history`
    steps, in passes of layers in training mode alone, and each layer's experts move if that pays before the next look:
    rows of parameters, gradients, main_grad, the optimizers' states and PEFT's adapters. A layer keeps its number of
    slots: with more slots than experts (a placement that gives some two) hot experts get the replicas. What a step
    computes stays the same, up to the order of sums over ranks. state_dict() of the model and the optimizers,
    torch.distributed.checkpoint, gather_state_dicts and save_pretrained keep the model's names and order. On ranks that
    torch.distributed doesn't know, state_dict() of the model and the optimizers, and copies of these, raise until
    restore().

    Args:
        optimizers: all that have experts' parameters. What one keeps of a parameter elsewhere than in its `state`
            (momenta in an attribute of its own, say) can't be found, and stays where the experts were.
        every: after how many steps to look.
        history: of how many last steps the load counts; None for `every`.
    Raises:
        ValueError: there are no such experts; something belongs to them of which nothing says how it moves: states of
            an optimizer that are not by expert (LBFGS keeps one for all its parameters), an optimizer that is not
            given, weights that are computed from other parameters (a parametrization) or share memory with those of
            another module, adapters given to calls, a deepcopy of a layer, experts that FSDP2 shards over replicas, a
            CUDA graph with a call of theirs. Every rank raises.
        TypeError: an optimizer that is none of torch's.
    Example:
        rebalancer = tm.rebalance(model, optimizer, every=100, history=50)
        for batch in batches:
            loss(model(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            rebalancer.step()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_optimizers(optimizers)
    for name, number in (("every", every), ("history", every if history is None else history)):
        if not is_integer(number) or number < 1:
            raise ValueError(f"{name} must be a number of steps of at least 1, got {number!r}")
    found = find_spread_experts(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts that are spread over ranks: parallelize() it first")
    if len({experts.shards.transport for experts in found}) > 1:
        raise ValueError(
            "the layers of this model are spread over several transports, and each of them has a busiest rank of its "
            "own: call tm.rebalance for the layers of each"
        )
    return Rebalancer(model, found, optimizers, every, every if history is None else history)


class Rebalancer:
    """The experts of a model's layers, the load of their last steps, and where they stand; rebalance() makes it."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[SpreadExperts],
        optimizers: tuple[torch.optim.Optimizer, ...],
        every: int,
        history: int,
    ) -> None:
        self.last: Rebalanced | None = None
        """What the last look has decided."""
        self._model, self._layers, self._optimizers, self._every = model, layers, optimizers, every
        self._first = [experts.placement for experts in layers]
        self._num_steps = 0
        self._ns_of_megabyte = 0
        self._check()
        device = next(layers[0].module.parameters()).device
        self._load = torch.zeros(
            sum(experts.shards.num_experts + 1 for experts in layers), dtype=torch.int64, device=device
        )
        for experts, counted in zip(layers, self._by_layer(self._load), strict=True):
            experts.shards.calls.load, experts.shards.calls.counted = counted, ref(experts.module)
        self._history: deque[Tensor] = deque(maxlen=history)

    def step(self) -> Rebalanced | None:
        """Count a step and, after each `every` of them, look, and move where that pays; give what was decided.

        Every rank calls it between two steps, when no forward waits for its backward: best behind zero_grad(), since
        gradients that are there move too.

        Raises:
            ValueError: as rebalance(). CountMismatch: a rank makes another call. TransportError: an exchange failed; in
                the middle of a move, the experts have to be loaded from a checkpoint.
        """
        self._num_steps += 1
        self._history.append(self._load.clone())
        self._load.zero_()
        if self._num_steps % self._every:
            return None
        with Doing(lambda: "Rebalancer.step()"), torch.no_grad():
            self.last = self._look()
        log.info("tm.rebalance, %s", self.last)
        return self.last

    @torch.no_grad()
    def restore(self) -> None:
        """Move all experts back to where they stood when rebalance() was called; every rank calls it."""
        tensors = self._check()
        for experts, first, own in zip(self._layers, self._first, tensors, strict=True):
            self._move(experts, own, first)

    def _look(self) -> Rebalanced:
        tensors = self._check(is_moving=False)
        loads, ns_of_pair = self._agreed_loads()
        may_move = any(ns_of_pair) and self._layers[0].transport.size > 1
        ns_of_byte = self._agreed_ns_of_megabyte(tensors) / MEGABYTE if may_move else 0.0
        looks = []
        for experts, load, own, ns in zip(self._layers, loads, tensors, ns_of_pair, strict=True):
            before = experts.placement
            num_bytes = expert_bytes(own.values(), before.num_slots)
            after = best_placement(load, before, ns, ns_of_byte * num_bytes, self._every) if may_move else None
            looks.append(Look(experts.name, load, ns, num_bytes, before, before if after is None else after))
        decided = Look.decided(self._num_steps, looks, ns_of_byte)
        if not decided.moved:
            return decided
        tensors = self._check()
        began = time.perf_counter()
        for experts, own, look in zip(self._layers, tensors, looks, strict=True):
            self._move(experts, own, look.after)
        for own in tensors:
            next(iter(own.values())).flatten()[:1].cpu()  # a device may still be at it
        took_s = time.perf_counter() - began
        self._ns_of_megabyte = self._largest(self._ns_of_megabyte * took_s / decided.expected_move_s)
        return replace(decided, took_s=took_s)

    def _move(self, experts: SpreadExperts, tensors: Mapping[str, Tensor], placement: ExpertPlacement) -> None:
        before = experts.placement
        if placement != before:
            move(tensors, before, placement, experts.transport, experts.name)
            experts.place(placement)

    def _by_layer(self, counted: Tensor) -> tuple[Tensor, ...]:
        """Return the (E + 1,) counts of every layer: of its experts, and of skipped pairs."""
        return counted.split([experts.shards.num_experts + 1 for experts in self._layers])

    # What ranks agree on

    def _check(self, *, is_moving: bool = True) -> list[dict[str, Tensor]]:
        """Return what moves of each layer; ValueError on every rank where it can't move on one, or differs.

        is_moving: whether to look for what would go on with the old places, too, in all that this process has.
        """
        error: Exception | None = None
        tensors: list[dict[str, Tensor]] = []
        number = -1
        try:
            found = {id(experts.module): experts for experts in find_spread_experts(self._model)}
            self._layers = [found.get(id(experts.module), experts) for experts in self._layers]  # adapters may be new
            tensors = [carried_tensors(experts, self._optimizers) for experts in self._layers]
            refuse_shared_states(self._layers, self._optimizers)
            if is_moving:
                refuse_elsewhere(self._layers, self._optimizers)
            placements = [experts.placement.experts_of_rank for experts in self._layers]
            of_all = str((self._num_steps, self._every, placements, list(map(digest, tensors))))
            number = zlib.crc32(of_all.encode())
        except Exception as refused:  # whatever it is, the other ranks wait for this one's word
            error = refused
        agree(self._layers[0].shards.sharding, number, error)
        return tensors

    def _agreed_loads(self) -> tuple[list[list[int]], list[float]]:
        """Return the pairs of each layer's experts, and the nanoseconds that one of them costs the average step.

        The pairs are those of all ranks in all steps of the history. Layers whose experts have the same shapes share
        the time of a pair: that of one call is a rough measure.
        """
        counted = torch.stack(list(self._history)).sum(0)
        times = [number for experts in self._layers for number in experts_time(experts)]
        numbers = torch.cat([counted, torch.tensor(times, dtype=torch.int64, device=counted.device)])
        sharding = self._layers[0].shards.sharding
        own, agreed = sharding.sum_over_ranks(numbers).split([len(counted), len(times)])
        steps = len(self._history) * (1 if sharding.replicas is None else sharding.replicas.size())
        loads = [layer[:-1].tolist() for layer in self._by_layer(own)]
        of_shape: dict[object, tuple[int, int]] = {}
        for experts, (ns, pairs) in zip(self._layers, agreed.view(-1, 2).tolist(), strict=True):
            before = of_shape.get(_shape(experts), (0, 0))
            of_shape[_shape(experts)] = before[0] + ns, before[1] + pairs
        totals = [of_shape[_shape(experts)] for experts in self._layers]
        return loads, [ns / pairs / steps if pairs else 0.0 for ns, pairs in totals]

    def _agreed_ns_of_megabyte(self, tensors: Sequence[Mapping[str, Tensor]]) -> int:
        """Return in how many nanoseconds a megabyte moves on the slowest rank: in the last move, else in a probe.

        tensors: what moves of each layer.
        """
        if not self._ns_of_megabyte:
            first = self._layers[0]
            probed = ns_of_a_megabyte(first.transport, tensors[0], first.placement.num_slots)
            self._ns_of_megabyte = self._largest(probed)
        return self._ns_of_megabyte

    def _largest(self, number: float) -> int:
        """Return the largest of all ranks' numbers, as an integer of at least 1."""
        largest = torch.tensor(max(1, round(number)), device="cpu")
        sharding = self._layers[0].shards.sharding
        sharding.transport.all_reduce(largest, "max")
        if sharding.replicas is not None:
            as_transport(sharding.replicas).all_reduce(largest, "max")
        return int(largest)


def _shape(experts: SpreadExperts) -> tuple[object, ...]:
    return tuple(
        (name, tuple(parameter.shape[1:])) for name, parameter in experts.module.named_parameters(recurse=False)
    )


REFUSED = -1


def agree(sharding: Sharding, number: int, error: Exception | None) -> None:
    """Raise on every rank where a rank has an error, or another number than the others; every rank calls it.

    Args:
        number: of at least 0, by which ranks know that they would do the same.
    Raises:
        The error on the rank that has one. ValueError: another rank has one, or other numbers.
    """
    transports = [sharding.transport]
    if sharding.replicas is not None:  # and what is found among these goes to all the others
        transports += [as_transport(sharding.replicas), sharding.transport]
    for transport in transports:
        numbers = transport.share_number(number if error is None else REFUSED)
        ranks = transport.job_ranks or range(transport.size)
        refused = [rank for rank, said in zip(ranks, numbers, strict=True) if said == REFUSED]
        others = [rank for rank, said in zip(ranks, numbers, strict=True) if said != numbers[0]]
        if error is None and refused:
            error = ValueError(f"ranks {refused} can't move their experts, so that none does: their own errors say why")
            error.__cause__ = PeerFailure(f"ranks {refused} refused")
        elif error is None and others:
            error = ValueError(
                f"what moves with the experts is not the same on ranks {others} as on rank {ranks[0]} (steps so far, "
                "layers, gradients that are there, or states of optimizers): call step() on every rank behind the same "
                "step, after zero_grad()"
            )
    if error is not None:
        raise error


def move(
    tensors: Mapping[str, Tensor], before: ExpertPlacement, after: ExpertPlacement, transport: Transport, layer: str
) -> None:
    """Write the rows of this rank's experts under `after` into tensors that hold those under `before`, on every rank.

    Args:
        tensors: (L * rows of an expert, ...), the same on every rank but for their values.
        layer: its name, for whoever waits long.
    """
    rank, size = transport.rank, transport.size
    sent = _moving(before, after, rank, is_sender=True)
    received = _moving(before, after, rank, is_sender=False)
    kept = [
        (slot, new_slot)
        for new_slot, expert in enumerate(after.experts_of_rank[rank])
        for source, slot in [source_of(expert, rank, before)]
        if source == rank and slot != new_slot
    ]
    sent_to, received_from = ([len(slots[other]) for other in range(size)] for slots in (sent, received))
    with fail_peers_on_error(transport), Doing(lambda: f"the move of the experts of {layer}"):
        views = [tensor.unflatten(0, (before.num_slots, -1)) for tensor in tensors.values()]
        leaving = [slot for slots in sent for slot in slots]
        pending = [transport.exchange(view[leaving].contiguous(), sent_to, received_from) for view in views]
        for view, rows in zip(views, pending, strict=True):
            arrived = rows.wait()
            stayed = view[[slot for slot, _ in kept]]  # a copy, before anything is written
            view[[slot for slots in received for slot in slots]] = arrived
            view[[slot for _, slot in kept]] = stayed


def _moving(before: ExpertPlacement, after: ExpertPlacement, rank: int, *, is_sender: bool) -> Sequence[list[int]]:
    """Return for every other rank the slots that `rank` sends to it, or receives from it, in the receiver's order."""
    slots: list[list[int]] = [[] for _ in range(before.size)]
    for receiver, held in enumerate(after.experts_of_rank):
        for new_slot, expert in enumerate(held):
            source, slot = source_of(expert, receiver, before)
            if source == receiver:
                continue
            if is_sender and source == rank:
                slots[receiver].append(slot)
            elif not is_sender and receiver == rank:
                slots[source].append(new_slot)
    return slots
