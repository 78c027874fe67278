"""Reader of what the NCCL Inspector writes: how long each exchange took on each rank, and with verbose output when.

An all-to-all of NCCL is a group of sends and receives, and the Inspector has each with its peer; so it is known how
long every link took. Ranks in its records are those of a communicator: files of one communicator have one id.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tritonmoe.runtime.files import MAX_LINES_BYTES, Json, check_size
from tritonmoe.tools.doctor.exchange_names import kind_of_name
from tritonmoe.tools.doctor.trace import Part, RankTrace
from tritonmoe.tools.doctor.trace_files import damaged, number, open_text

__all__ = ["is_inspector_line", "name_ranks", "on_one_clock", "read_inspector"]

LINE_KEYS = ('"header"', '"dump_stats"', '"coll_perf"', '"p2p_perf"', '"proxy_trace"')
COUNTS = {"coll_perf": "coll_records", "p2p_perf": "p2p_records", "proxy_trace": "proxy_records"}
"""What a record is, and how the head of a dump of format 4.3 calls the number of them."""
_Name: TypeAlias = tuple[int, str | None, bool]
"""Number, group, and whether it is of sends and receives, which are counted apart."""


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


def as_exchanges(pairs: Sequence[Pair], group: str, rank: int, size: int) -> list[Part]:
    """Return the exchanges of one communicator.

    A group of them goes on until the same peer comes again in the same direction; with several peers it is an
    all-to-all.
    """
    found: list[Part] = []
    own: list[Pair] = []
    seen: set[tuple[str, int]] = set()
    for pair in sorted(pairs, key=lambda pair: pair.sequence):
        if (pair.way, pair.peer) in seen:
            found += _as_parts(own, len(found) + 1, group, rank, size)
            own, seen = [], set()
        own.append(pair)
        seen.add((pair.way, pair.peer))
    return found + _as_parts(own, len(found) + 1, group, rank, size)


def _as_parts(own: Sequence[Pair], sequence: int, group: str, rank: int, size: int) -> list[Part]:
    if len({pair.peer for pair in own}) < 2 and size > 2:
        return [_part(pair.way, [pair], sequence + count, group) for count, pair in enumerate(own)]
    part = _part("all_to_all", own, sequence, group)
    sums = {"send": [0] * size, "recv": [0] * size}
    for pair in own:
        if 0 <= pair.peer < size and pair.peer != rank:
            sums[pair.way][pair.peer] += pair.num_bytes
    part.sent, part.received = tuple(sums["send"]), tuple(sums["recv"])
    return [part]


def _part(kind: str, pairs: Sequence[Pair], sequence: int, group: str) -> Part:
    seconds = max(pair.seconds for pair in pairs)
    starts = [pair.start_s for pair in pairs if pair.start_s is not None]
    part = Part(kind, 0.0, 0.0, seconds, group=group, sequence=sequence)
    part.num_bytes = sum(pair.num_bytes for pair in pairs if pair.way == "send") or pairs[0].num_bytes
    part.peer = pairs[0].peer if len(pairs) == 1 else None
    part.links = tuple((pair.way, pair.peer, pair.num_bytes, pair.seconds) for pair in pairs)
    part.is_timed = len(starts) == len(pairs)
    if part.is_timed:
        part.posted_s = part.start_s = min(starts)
        part.end_s = max(pair.start_s + pair.seconds for pair in pairs if pair.start_s is not None)
    return part


def is_inspector_line(begin: bytes) -> bool:
    """Return whether a file that begins so is of the Inspector."""
    text = begin.decode("utf-8", "replace")
    return text[:1] == "{" and any(text[1:40].lstrip().startswith(key) for key in LINE_KEYS)


class _File:
    """What one file says, record after record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Json = {}
        self.host = ""
        self.communicators: dict[str, tuple[int, int]] = {}
        """Rank and number of ranks in each."""
        self.dropped = self.missing = self.num_records = 0
        self.still = 0
        """Records that this dump should still have."""
        self.parts: list[Part] = []
        self.pairs: dict[str, list[Pair]] = defaultdict(list)
        self.wires: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        """Bytes and seconds on the wire by the network's proxy, of (communicator, send or recv, peer)."""

    def take(self, record: Json) -> None:
        self.num_records += 1
        where = f"record {self.num_records}"
        if isinstance(record.get("header"), dict):
            self.header = record["header"]
        metadata = record.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("hostname"), str):
            self.host = metadata["hostname"]
        stats = record.get("dump_stats")
        if isinstance(stats, dict):
            self.missing += self.still
            self.still = sum(int(number(self.path, where, stats, key, 0)) for key in COUNTS.values())
            for key in ("coll_dropped_since_last_dump", "p2p_dropped_since_last_dump"):
                self.dropped += int(number(self.path, where, stats, key, 0))
        for key in COUNTS:
            content = record.get(key)
            if isinstance(content, dict):
                self.still = max(0, self.still - 1)
                group = self._communicator(where)
                if key == "coll_perf":
                    self.parts.append(_collective(self.path, where, content, group))
                elif key == "p2p_perf":
                    self.pairs[group].append(_pair(self.path, where, content))
                else:
                    self._on_the_wire(where, content, group)

    def _communicator(self, where: str) -> str:
        name = str(self.header.get("id"))
        rank, size = (int(number(self.path, f"{where}: header", self.header, key)) for key in ("rank", "n_ranks"))
        if not 0 <= rank < size < 1 << 24:
            raise damaged(self.path, f"{where}: header: rank {rank} of {size}")
        self.communicators[name] = (rank, size)
        return name

    def _on_the_wire(self, where: str, content: Json, group: str) -> None:
        steps = content.get("steps")
        way = content.get("direction")
        if way not in ("send", "recv") or "peer" not in content:
            return
        peer = int(number(self.path, where, content, "peer"))
        for step in steps if isinstance(steps, list) else [content]:
            if isinstance(step, dict) and "wire_us" in step:
                sums = self.wires[group, way, peer]
                sums[0] += number(self.path, where, step, "trans_size_bytes", 0)
                sums[1] += number(self.path, where, step, "wire_us") / 1e6


def read_inspector(path: Path) -> RankTrace:
    """Read a file of the Inspector: records of format 4.3, or of older ones in which each has its own header.

    Raises:
        ValueError: a line is damaged, or there is no exchange.
    """
    found = _File(path)
    for record in _records(path):
        found.take(record)
    found.missing += found.still
    if not found.parts and not found.pairs:
        raise ValueError(f"{path} can't be judged: the Inspector wrote no exchange into it")
    rank, world = max(found.communicators.values(), key=lambda one: one[1])
    trace = RankTrace(str(path), rank, world, "inspector", found.host)
    trace.rank_in = {name: own for name, (own, _) in found.communicators.items()}
    for name, pairs in found.pairs.items():
        found.parts += as_exchanges(pairs, name, *found.communicators[name])
    trace.wires = [(*of, num_bytes, seconds) for of, (num_bytes, seconds) in found.wires.items()]
    trace.parts = sorted(found.parts, key=lambda part: part.posted_s)
    trace.is_unix_clock = all(part.is_timed for part in trace.parts)
    if found.dropped:
        trace.limits.append(
            f"the Inspector dropped {found.dropped} records: set NCCL_INSPECTOR_DUMP_COLL_RING_SIZE higher, and "
            "NCCL_INSPECTOR_DUMP_P2P_RING_SIZE"
        )
    if found.missing:
        trace.limits.append(f"{found.missing} records are missing in the Inspector's dumps, which are cut")
    if not trace.is_unix_clock:
        trace.limits.append(
            "the Inspector wrote how long exchanges took, not when: the files tell which rank comes last, but "
            "not what ranks compute (NCCL_INSPECTOR_DUMP_VERBOSE=1 writes when)"
        )
    trace.limits.append("the Inspector records exchanges only: whether a rank computes long or is late can't be told")
    return trace


def _records(path: Path) -> Iterator[Json]:
    decode = json.JSONDecoder().raw_decode
    check_size(path, MAX_LINES_BYTES, "dump fewer records, NCCL_INSPECTOR_DUMP_COLL_RING_SIZE has their number")
    with open_text(path) as file:
        try:
            text = file.read(MAX_LINES_BYTES + 1)
        except (UnicodeDecodeError, EOFError, OSError) as error:
            raise damaged(path, f"it is no text: {error}") from None
    if len(text) > MAX_LINES_BYTES:
        raise damaged(path, f"it has more than {MAX_LINES_BYTES} characters once unpacked: dump fewer records")
    at, count = 0, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text):
            return
        count += 1
        try:
            record, at = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"record {count}: {str(error)[:80]}") from None
        if not isinstance(record, dict):
            raise damaged(path, f"record {count} is no object")
        yield record


def _times(path: Path, where: str, content: Json, prefix: str) -> tuple[float, float | None]:
    """Return how long an exchange took, and when it started, if that is there."""
    seconds = number(path, where, content, f"{prefix}_exec_time_us") / 1e6
    if seconds < 0:
        raise damaged(path, f"{where}: an exchange takes less than no time")
    times = content.get("event_trace_ts")
    kernels = times.get("kernel_events") if isinstance(times, dict) else None
    if not isinstance(kernels, list) or not kernels or not all(isinstance(one, dict) for one in kernels):
        return seconds, None
    return seconds, min(number(path, where, one, "kernel_start_ts") for one in kernels) / 1e6


def _collective(path: Path, where: str, content: Json, group: str) -> Part:
    seconds, start_s = _times(path, where, content, "coll")
    part = Part(kind_of_name(str(content.get("coll", ""))) or "exchange", 0.0, 0.0, seconds, group=group)
    part.is_timed = start_s is not None
    if start_s is not None:
        part.posted_s = part.start_s = start_s
        part.end_s = start_s + seconds
    part.sequence = int(number(path, where, content, "coll_sn"))
    part.num_bytes = int(number(path, where, content, "coll_msg_size_bytes", 0))
    return part


def _pair(path: Path, where: str, content: Json) -> Pair:
    way = str(content.get("p2p", "")).lower()
    if way not in ("send", "recv"):
        raise damaged(path, f"{where}: {way[:40]!r} is neither a send nor a receive")
    seconds, start_s = _times(path, where, content, "p2p")
    peer, size, sequence = (
        int(number(path, where, content, key)) for key in ("p2p_peer", "p2p_msg_size_bytes", "p2p_sn")
    )
    return Pair(way, peer, max(0, size), seconds, start_s, sequence)


def name_ranks(traces: Sequence[RankTrace]) -> None:
    """Name the ranks of each communicator: those whose files have its id."""
    ranks: dict[str, dict[int, int]] = defaultdict(dict)
    for trace in traces:
        for name, own in trace.rank_in.items():
            if trace.rank is not None:
                ranks[name][own] = trace.rank
    for trace in traces:
        for name in trace.rank_in:
            if sorted(ranks[name]) == list(range(len(ranks[name]))):
                trace.groups[name] = tuple(ranks[name][one] for one in range(len(ranks[name])))


def on_one_clock(traces: Sequence[RankTrace]) -> None:
    """Place exchanges without times one after the other, and in each its ranks.

    All leave a collective together, so who took less came later. A send and its receive end together: where there are
    both, they tell by how much one rank came later than the other, whenever each of them was done.
    """
    traces = [trace for trace in traces if trace.lanes == "inspector" and not trace.is_unix_clock]
    parts: dict[_Name, dict[int, Part]] = defaultdict(dict)
    last: dict[tuple, int] = defaultdict(int)
    for index, trace in enumerate(traces):
        for part in trace.parts:
            name = (part.sequence or 0, part.group, part.kind in ("all_to_all", "send", "recv"))
            parts[name][index] = part
            last[name[1:]] = max(last[name[1:]], name[0])
    now_s = 0.0
    # Collectives and pairs are taken to be spread alike over the run.
    for name in sorted(parts, key=lambda name: (name[0] / (last[name[1:]] or 1), not name[2], str(name[1]))):
        own = parts[name]
        starts = _starts(own, {index: traces[index].rank_in.get(str(name[1])) for index in own})
        first = min(starts.values())
        for index, part in own.items():
            seconds = (part.end_s or 0.0) - part.start_s
            part.posted_s = part.start_s = now_s + starts[index] - first
            part.end_s = part.start_s + seconds
        now_s = max(part.end_s or 0.0 for part in own.values())
    for trace in traces:
        trace.parts.sort(key=lambda part: part.posted_s)


def _starts(parts: Mapping[int, Part], number: Mapping[int, int | None]) -> dict[int, float]:
    """Return when each rank came to an exchange, from some moment on."""
    if all(part.links for part in parts.values()):
        took = {(index, way, peer): seconds for index, part in parts.items() for way, peer, _, seconds in part.links}
        first = min(parts)
        starts = {first: 0.0}
        for index in parts:
            later = [
                took[first, way, number[index]] - took[index, back, number[first]]  # type: ignore[index]
                for way, back in (("send", "recv"), ("recv", "send"))
                if (first, way, number[index]) in took and (index, back, number[first]) in took
            ]
            if index != first and later:
                starts[index] = statistics.fmean(later)
        if len(starts) == len(parts):
            return starts
    return {index: part.start_s - (part.end_s or 0.0) for index, part in parts.items()}
