"""move: the rows of experts go from the ranks of one placement to those of another, in place."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.layer.rebalancing.better_placement import source_of
from tritonmoe.transports import Transport
from tritonmoe.transports.base import leaving_nobody_waiting
from tritonmoe.transports.waiting import Doing

__all__ = ["move"]


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
    with leaving_nobody_waiting(transport), Doing(lambda: f"the move of the experts of {layer}"):
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
