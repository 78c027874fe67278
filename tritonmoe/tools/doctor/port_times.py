"""busy_times: when the port of each rank had messages without a pause, and how many bytes these were."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.tools.doctor.messages import Messages

__all__ = ["busy_times", "typical_times"]


def busy_times(
    sent: Messages, begun: Tensor, ended: Tensor, counts: Tensor, peers: int, is_slow: Tensor
) -> list[list[tuple[float, float]]]:
    """Return by rank the bytes and seconds of the times in which its port has messages.

    Args:
        begun, ended: (M, W, W), when the messages were under way, their latency apart.
        counts: (M, W, W), the messages that count.
        peers: the axis of the other end.
        is_slow: (W,), the ports that alone decide how long their messages take; else the busier of two decides,
            whose bytes count where all messages of an exchange are in one such time.
    """
    ended = torch.maximum(ended, begun)

    def by_port(values: Tensor, otherwise: float) -> Tensor:
        """Return (M, other end, port) of the messages that count."""
        values = torch.where(counts, values, otherwise)
        return values if peers == 1 else values.transpose(1, 2)

    begins, ends = by_port(begun, torch.inf), by_port(ended, -torch.inf)
    ordered, order = begins.flatten(0, 1).sort(0)
    reached = ends.flatten(0, 1).gather(0, order).cummax(0).values
    follows_pause = torch.ones_like(ordered, dtype=torch.bool)
    follows_pause[1:] = ordered[1:] >= reached[:-1]
    number = torch.empty_like(order).scatter_(0, order, follows_pause.cumsum(0) - 1).view(begins.shape)
    is_counted = begins < torch.inf
    first = torch.where(is_counted, number, number.numel()).amin(1, keepdim=True)
    last = torch.where(is_counted, number, -1).amax(1, keepdim=True)
    own_bytes = by_port(sent.sent_bytes, 0.0)
    own, most = own_bytes.sum(1, keepdim=True), by_port(sent.port_bytes, 0.0).amax(1, keepdim=True)
    is_of_busier = (first == last) & ~is_slow & (own > 0)
    sizes = torch.where(is_of_busier, own_bytes * (most / own.clamp(min=1)), own_bytes)

    def of_times(values: Tensor, reduce: str) -> Tensor:
        values, numbers = values.flatten(0, 1), number.flatten(0, 1)
        return torch.zeros_like(values).scatter_reduce(0, numbers, values, reduce, include_self=False)

    seconds = of_times(ends, "amax") - of_times(begins, "amin")
    lists = zip(of_times(sizes, "sum").T.tolist(), seconds.T.tolist(), strict=True)
    return [[(b, s) for b, s in zip(*of, strict=True) if b > 0] for of in lists]


def typical_times(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return (bytes, seconds) of busy times, those of about one size as one, with the time in the middle."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] <= 1.1 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [(statistics.fmean(b for b, _ in group), statistics.median_low(s for _, s in group)) for group in groups]
