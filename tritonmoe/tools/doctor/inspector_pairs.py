"""as_exchanges: the Inspector's sends and receives, each with its peer, put together to exchanges."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.tools.doctor.trace import Part

__all__ = ["Pair", "as_exchanges"]


@dataclass(frozen=True)
class Pair:
    """A send or a receive."""

    way: str
    peer: int
    """The other rank, by its number in the communicator."""
    num_bytes: int
    seconds: float
    start_s: float | None
    sequence: int


def as_exchanges(pairs: Sequence[Pair], group: str, rank: int, size: int) -> list[tuple[Part, bool]]:
    """Return the exchanges of one communicator, and of each whether it is known when it was.

    A group of them goes on until the same peer comes again in the same direction; with several peers it is an
    all-to-all.
    """
    found: list[tuple[Part, bool]] = []
    own: list[Pair] = []
    seen: set[tuple[str, int]] = set()
    for pair in sorted(pairs, key=lambda pair: pair.sequence):
        if (pair.way, pair.peer) in seen:
            found += _as_parts(own, len(found) + 1, group, rank, size)
            own, seen = [], set()
        own.append(pair)
        seen.add((pair.way, pair.peer))
    return found + _as_parts(own, len(found) + 1, group, rank, size)


def _as_parts(own: Sequence[Pair], sequence: int, group: str, rank: int, size: int) -> list[tuple[Part, bool]]:
    if len({pair.peer for pair in own}) < 2 and size > 2:
        return [_part(pair.way, [pair], sequence + count, group) for count, pair in enumerate(own)]
    part, is_timed = _part("all_to_all", own, sequence, group)
    sums = {"send": [0] * size, "recv": [0] * size}
    for pair in own:
        if 0 <= pair.peer < size and pair.peer != rank:
            sums[pair.way][pair.peer] += pair.num_bytes
    part.sent, part.received = tuple(sums["send"]), tuple(sums["recv"])
    return [(part, is_timed)]


def _part(kind: str, pairs: Sequence[Pair], sequence: int, group: str) -> tuple[Part, bool]:
    seconds = max(pair.seconds for pair in pairs)
    starts = [pair.start_s for pair in pairs if pair.start_s is not None]
    part = Part(kind, 0.0, 0.0, seconds, group=group, sequence=sequence)
    part.num_bytes = sum(pair.num_bytes for pair in pairs if pair.way == "send") or pairs[0].num_bytes
    part.peer = pairs[0].peer if len(pairs) == 1 else None
    part.links = tuple((pair.way, pair.peer, pair.num_bytes, pair.seconds) for pair in pairs)
    if len(starts) == len(pairs):
        part.posted_s = part.start_s = min(starts)
        part.end_s = max(pair.start_s + pair.seconds for pair in pairs if pair.start_s is not None)
    return part, len(starts) == len(pairs)
