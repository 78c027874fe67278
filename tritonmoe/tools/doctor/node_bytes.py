"""NodeBytes: what two levels would send between hosts and inside of them, of a layer whose rows go straight to ranks.

On two levels a token goes once to each host that has any of its experts, and from there to their ranks. No trace says
which tokens need several experts of a host: so there are bounds. A rank sends a host no more rows than it has tokens,
and no more than it sends there now; and no fewer than one for as many rows as a token has experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph, Key, Member
from tritonmoe.tools.doctor.moe_layers import LayerPass
from tritonmoe.tools.recording.call_recording import node_size_of

__all__ = ["NodeBytes", "inside_byte_s", "node_bytes"]

EARLY = 0.1
"""Of the times that bound what a byte takes, all but this part are longer."""
MOVING_ALL = ("all_reduce", "all_gather", "reduce_scatter")
"""Exchanges in which every rank moves at least the bytes that a file gives it, but for its own share."""


class NodeBytes(NamedTuple):
    """Bytes of the busiest port of a layer's exchange."""

    far: float
    """Between hosts, as it is."""
    near: float
    """Inside of hosts, as it is."""
    far_then: tuple[float, float, float]
    """Between hosts on two levels: at least, as expected with experts chosen independently, at most."""
    near_then: float
    """Inside of hosts on two levels."""


def node_bytes(graph: Graph, layer: LayerPass) -> NodeBytes | None:
    """Return the bytes of a pass; None where hosts or tokens are not known, or the ranks are no equal nodes."""
    members = [graph.members[one] for one in layer.there]
    if not graph.hosts or not graph.routed:
        return None
    node_size = node_size_of([graph.hosts[member.rank] for member in members])
    row_bytes = max((member.row_bytes for member in members), default=0)
    if node_size is None or not row_bytes:
        return None
    tokens, chosen = (torch.tensor([graph.routed[of.rank][place] for of in members]).double() for place in (0, 1))
    # A pass that brings gradients home is the same with senders and receivers swapped.
    sent = torch.tensor(layer.sent, dtype=torch.float64, device="cpu")
    num_nodes = len(sent) // node_size
    if bool((sent.sum(1) > tokens * chosen * row_bytes).any()):
        return None  # what chooses so many of so many is not this layer's router
    by_node = sent.view(num_nodes, node_size, num_nodes, node_size)
    is_far = ~torch.eye(num_nodes, dtype=torch.bool)[:, None, :]
    to_node = by_node.sum(3) * is_far
    of_tokens, of_chosen = ((of.view(num_nodes, node_size, 1)) for of in (tokens * row_bytes, chosen))
    most = torch.minimum(to_node, of_tokens)
    least = torch.minimum(to_node / of_chosen, most)
    by_chance = of_tokens * (1 - (1 - to_node / (of_tokens * of_chosen)).clamp(min=0) ** of_chosen)
    expected = torch.minimum(torch.maximum(by_chance, least), most)
    from_hosts = (by_node * is_far[..., None]).sum((0, 1))
    inside = torch.stack([by_node[node, :, node] for node in range(num_nodes)])
    passed_on = by_node.sum(0).transpose(0, 1) * ~torch.eye(node_size, dtype=torch.bool)
    return NodeBytes(
        far=_busiest(to_node.sum(2), from_hosts),
        near=_busiest(inside.sum(2), inside.sum(1)),
        far_then=tuple(_busiest(of.sum(2), of.sum(0).T) for of in (least, expected, most)),  # type: ignore[arg-type]
        near_then=_busiest(passed_on.sum(2), passed_on.sum(1)),
    )


def _busiest(out: Tensor, into: Tensor) -> float:
    return float(torch.maximum(out, into).max())


def inside_byte_s(graph: Graph, layers: Sequence[LayerPass], sizes: Sequence[NodeBytes]) -> float:
    """Return what a byte takes inside a host at most, in seconds.

    Exchanges of ranks of one host tell it; and of those of several hosts, that what stays inside of one takes no longer
    than all.
    """
    known = []
    for layer, of in zip(layers, sizes, strict=True):
        if of.near > 0:
            known.append(max(graph.members[one].transfer_s for one in layer.there) / of.near)
    found = float(torch.tensor(known).quantile(EARLY)) if known else float("inf")
    by_key: dict[Key, list[float]] = {}
    for members in graph.exchanges:
        own = [graph.members[one] for one in members]
        moved = max(_moved(one, len(own)) for one in own)
        if moved > 0 and len({graph.hosts[one.rank] for one in own}) == 1:
            by_key.setdefault(own[0].key, []).append(max(one.transfer_s for one in own) / moved)
    return min([found, *(float(torch.tensor(times).quantile(0.5)) for times in by_key.values())])


def _moved(member: Member, num_ranks: int) -> float:
    """Return the bytes that a rank moves in an exchange at least; 0 where that is not known."""
    kind = str(member.key[1]).partition(" ")[0]
    if kind == "all_to_all":
        return float(sum(member.sent or ()))
    return (member.num_bytes or 0) * (num_ranks - 1) / num_ranks if kind in MOVING_ALL else 0.0
