"""rebalance(): experts move to other ranks where the load of the last steps says that this pays."""

import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tritonmoe.config.numbers import is_integer
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.rebalancing.better_placement import busiest, moved_experts
from tritonmoe.rebalancing.carried import (
    carried_tensors,
    check_optimizers,
    digest,
    expert_bytes,
    refuse_elsewhere,
)
from tritonmoe.rebalancing.costs import best_placement, experts_time, ns_of_a_megabyte
from tritonmoe.rebalancing.moving import move
from tritonmoe.rebalancing.spread_experts import SpreadExperts, find_spread_experts
from tritonmoe.transports import as_transport
from tritonmoe.transports.waiting import Doing

__all__ = ["Rebalanced", "Rebalancer", "rebalance"]

log = logging.getLogger("tritonmoe")
MEGABYTE = 2**20


@dataclass(frozen=True)
class Rebalanced:
    """What Rebalancer.step() has decided: the same on every rank, apart from took_s."""

    step: int
    """The number of the call of step(), from 1."""
    moved: tuple[str, ...]
    """The layers whose experts have moved; none where that would not have paid."""
    imbalance_before: float
    """The pairs of the busiest rank over the mean of all, over all layers, in the steps of the history."""
    imbalance_after: float
    """The same of the same steps with the new placements."""
    moved_bytes: int
    """What the ranks sent in all."""
    expected_move_s: float
    expected_gain_s: float
    """How much shorter the experts of one step compute on the busiest ranks."""
    took_s: float
    """How long the move took on this rank."""

    @property
    def paid_after_steps(self) -> int | None:
        """After how many steps the move has paid; None where nothing moved."""
        return math.ceil(self.expected_move_s / self.expected_gain_s) if self.moved else None

    def __str__(self) -> str:
        if not self.moved:
            return (
                f"step {self.step}: the busiest rank has {self.imbalance_before:.2f} times the mean, and no move of "
                "experts would pay before the next look"
            )
        return (
            f"step {self.step}: the busiest rank had {self.imbalance_before:.2f} times the mean and has "
            f"{self.imbalance_after:.2f}; experts of {len(self.moved)} layers moved, {self.moved_bytes / 1e6:.1f} MB in "
            f"all, expected to take {self.expected_move_s * 1e3:.1f} ms (took {self.took_s * 1e3:.1f} ms) and to be "
            f"paid after {self.paid_after_steps} steps"
        )


def rebalance(
    model: nn.Module, *optimizers: torch.optim.Optimizer, every: int = 100, history: int | None = None
) -> "Rebalancer":
    """Let the experts in `model` that are spread over ranks move to where the busiest rank has least to do.

    Every rank calls it, once the experts are spread and the optimizers made, and then step() of what it gives, between
    two steps of the training. Each `every` steps the ranks sum how many pairs every expert had in the last `history`
    steps, and each layer's experts move if that pays before the next look: rows of parameters, gradients, main_grad,
    the optimizers' states and PEFT's adapters. A layer keeps its number of slots: with more slots than experts (a
    placement that gives some two) hot experts get the replicas. What a step computes stays the same, up to the order of
    sums over ranks. state_dict() of the model and the optimizers, torch.distributed.checkpoint, gather_state_dicts and
    save_pretrained keep the model's names and order.

    Args:
        optimizers: all that have experts' parameters.
        every: after how many steps to look.
        history: of how many last steps the load counts; None for `every`.
    Raises:
        ValueError: there are no such experts; something belongs to them of which nothing says how it moves: states of
            an optimizer that are not by expert, an optimizer that is not given, adapters given to calls, a deepcopy of a
            layer, experts that FSDP2 shards over replicas, a CUDA graph with a call of theirs. Every rank raises.
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
    if len({experts.sharding.transport for experts in found}) > 1:
        raise ValueError(
            "the layers of this model are spread over several transports, and each of them has a busiest rank of its "
            "own: call tm.rebalance for the layers of each"
        )
    return Rebalancer(found, optimizers, every, every if history is None else history)


class Rebalancer:
    """The experts of a model's layers, the load of their last steps, and where they stand; rebalance() makes it."""

    def __init__(
        self, layers: list[SpreadExperts], optimizers: tuple[torch.optim.Optimizer, ...], every: int, history: int
    ) -> None:
        self.last: Rebalanced | None = None
        """What the last look has decided."""
        self._layers, self._optimizers, self._every = layers, optimizers, every
        self._first = [experts.placement for experts in layers]
        self._num_steps = 0
        self._ns_of_megabyte = 0
        self._check()
        device = next(layers[0].module.parameters()).device
        self._load = torch.zeros(sum(experts.num_experts + 1 for experts in layers), dtype=torch.int64, device=device)
        for experts, counted in zip(layers, self._by_layer(self._load), strict=True):
            experts.calls.load = counted
        self._history: deque[Tensor] = deque(maxlen=history)
        for experts, first in zip(layers, self._first, strict=True):
            if experts.sharding.mesh is None:
                refuse = partial(_refuse_state_of_moved, experts, first)
                experts.module.register_state_dict_pre_hook(refuse)
                experts.module.register_load_state_dict_pre_hook(refuse)

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
        tensors = self._check()
        loads, ns_of_pair = self._agreed_loads()
        before = [experts.placement for experts in self._layers]
        wanted: list[ExpertPlacement | None] = [None] * len(before)
        if any(ns_of_pair) and self._layers[0].transport.size > 1:
            ns_of_byte = self._agreed_ns_of_megabyte() / MEGABYTE
            for number, (load, placement, own, ns) in enumerate(zip(loads, before, tensors, ns_of_pair, strict=True)):
                ns_of_expert = ns_of_byte * expert_bytes(own.values(), placement.num_slots)
                wanted[number] = best_placement(load, placement, ns, ns_of_expert, self._every)
        after = [old if new is None else new for old, new in zip(before, wanted, strict=True)]
        decided = self._decided(loads, ns_of_pair, before, after, tensors)
        if not decided.moved:
            return decided
        began = time.perf_counter()
        for experts, own, placement in zip(self._layers, tensors, after, strict=True):
            self._move(experts, own, placement)
        for own in tensors:  # on a device, wait for it
            next(iter(own.values())).flatten()[:1].cpu()
        took_s = time.perf_counter() - began
        return replace(decided, took_s=took_s)

    def _decided(
        self,
        loads: list[list[int]],
        ns_of_pair: list[float],
        before: list[ExpertPlacement],
        after: list[ExpertPlacement],
        tensors: list[dict[str, Tensor]],
    ) -> Rebalanced:
        size = before[0].size
        mean = sum(sum(load) for load in loads) / size
        busiest_before, busiest_after = ([busiest(*of) for of in zip(loads, where, strict=True)] for where in (before, after))
        ports, moved_bytes, names = [0] * size, 0, []
        for experts, old, new, own in zip(self._layers, before, after, tensors, strict=True):
            sent, received = moved_experts(old, new)
            num_bytes = expert_bytes(own.values(), old.num_slots)
            moved_bytes += sum(sent) * num_bytes
            ports = [port + max(pair) * num_bytes for port, pair in zip(ports, zip(sent, received, strict=True), strict=True)]
            names += [experts.name] if old != new else []
        gains = [(b - a) * ns for b, a, ns in zip(busiest_before, busiest_after, ns_of_pair, strict=True)]
        return Rebalanced(
            step=self._num_steps,
            moved=tuple(names),
            imbalance_before=sum(busiest_before) / mean if mean else 1.0,
            imbalance_after=sum(busiest_after) / mean if mean else 1.0,
            moved_bytes=moved_bytes,
            expected_move_s=max(ports) * self._ns_of_megabyte / MEGABYTE / 1e9,
            expected_gain_s=sum(gains) / 1e9,
            took_s=0.0,
        )

    def _move(self, experts: SpreadExperts, tensors: Mapping[str, Tensor], placement: ExpertPlacement) -> None:
        before = experts.placement
        if placement != before:
            move(tensors, before, placement, experts.transport, experts.name)
            experts.place(placement)

    def _by_layer(self, counted: Tensor) -> tuple[Tensor, ...]:
        """Return the (E + 1,) counts of every layer: of its experts, and of skipped pairs."""
        return counted.split([experts.num_experts + 1 for experts in self._layers])

    # What ranks agree on

    def _check(self) -> list[dict[str, Tensor]]:
        """Return what moves of each layer; ValueError on every rank where it can't move on one, or differs."""
        error: Exception | None = None
        tensors: list[dict[str, Tensor]] = []
        number = -1
        try:
            refuse_elsewhere(self._layers, self._optimizers)
            tensors = [carried_tensors(experts, self._optimizers) for experts in self._layers]
            placements = [experts.placement.experts_of_rank for experts in self._layers]
            of_all = str((self._num_steps, self._every, placements, list(map(digest, tensors))))
            number = zlib.crc32(of_all.encode())
        except Exception as refused:  # whatever it is, the other ranks wait for this one's word
            error = refused
        sharding = self._layers[0].sharding
        transports = [self._layers[0].transport]
        if sharding.replicas is not None:  # and what is found among these goes to all the others
            transports += [as_transport(sharding.replicas), transports[0]]
        for transport in transports:
            numbers = transport.share_number(-1 if error is not None else number)
            ranks = transport.job_ranks or range(transport.size)
            refused_on = [rank for rank, said in zip(ranks, numbers, strict=True) if said < 0]
            others = [rank for rank, said in zip(ranks, numbers, strict=True) if said not in (numbers[0], -1)]
            if error is None and refused_on:
                error = ValueError(
                    f"ranks {refused_on} can't move their experts, so that none does: their own errors say why"
                )
            elif error is None and others:
                error = ValueError(
                    f"what moves with the experts is not the same on ranks {others} as on rank {ranks[0]} (steps so "
                    "far, layers, gradients that are there, or states of optimizers): call step() on every rank behind "
                    "the same step, after zero_grad()"
                )
        if error is not None:
            raise error
        return tensors

    def _agreed_loads(self) -> tuple[list[list[int]], list[float]]:
        """Return the pairs of each layer's experts, and the nanoseconds that one of them costs the average step.

        The pairs are those of all ranks in all steps of the history. Layers whose experts have the same shapes share the time of a pair: that of one call is a rough measure.
        """
        counted = torch.stack(list(self._history)).sum(0)
        times = [time for experts in self._layers for time in experts_time(experts)]
        numbers = torch.cat([counted, torch.tensor(times, dtype=torch.int64, device=counted.device)])
        sharding = self._layers[0].sharding
        own, *agreed = self._layers[0].transport.all_reduce(numbers).split([len(counted), len(times)])
        copies = 1
        if sharding.replicas is not None:
            as_transport(sharding.replicas).all_reduce(numbers)
            copies = sharding.replicas.size()
        steps = len(self._history) * copies
        loads = [layer[:-1].tolist() for layer in self._by_layer(own)]
        of_shape: dict[object, list[int]] = {}
        for experts, (ns, pairs) in zip(self._layers, agreed[0].view(-1, 2).tolist(), strict=True):
            total = of_shape.setdefault(_shape(experts), [0, 0])
            total[0] += ns
            total[1] += pairs
        totals = [of_shape[_shape(experts)] for experts in self._layers]
        return loads, [ns / pairs / steps if pairs else 0.0 for ns, pairs in totals]

    def _agreed_ns_of_megabyte(self) -> int:
        """Return the nanoseconds in which the slowest rank sends a megabyte, measured once."""
        if not self._ns_of_megabyte:
            transport = self._layers[0].transport
            numbers = torch.tensor([ns_of_a_megabyte(transport, self._load.device)], device="cpu")
            self._layers[0].sharding.transport.all_reduce(numbers, "max")
            if self._layers[0].sharding.replicas is not None:
                as_transport(self._layers[0].sharding.replicas).all_reduce(numbers, "max")
            self._ns_of_megabyte = int(numbers)
        return self._ns_of_megabyte


def _shape(experts: SpreadExperts) -> tuple[object, ...]:
    return tuple((name, tuple(parameter.shape[1:])) for name, parameter in experts.module.named_parameters(recurse=False))


def _refuse_state_of_moved(experts: SpreadExperts, first: ExpertPlacement, *_: object) -> None:
    """Raise ValueError where a rank's own state dict would hold other experts than one that was taken at first."""
    if experts.placement != first:
        raise ValueError(
            f"the experts of {experts.name} have moved between ranks that torch.distributed doesn't know, whose state "
            "dicts hold each rank's own experts: call restore() of the Rebalancer on every rank first, which moves them "
            "back"
        )
