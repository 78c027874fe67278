"""Two hosts for `python -m bench.foreign_traces --hosts`: what is wrong with them, and clocks that don't agree.

Ranks of a host share a namespace's name and an uplink, and write files as tensorboard_trace_handler names them. All
run on this machine, so their clocks agree: files of the second host are moved by seconds, and more from step to step,
which stands for a clock of its own.
"""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

from bench.faults import Fault
from bench.foreign_scenarios import NODE_SIZE, Scenario

__all__ = ["HOST_TRAINERS", "TWO_LEVELS", "move_clocks", "of_hosts"]

HOST_TRAINERS = ("ddp", "transformers")
UPLINK_BITS, SLOW_UPLINK_BITS = 1e9, 100e6
TWO_LEVELS = "hosts, slow uplink"
"""Nothing is wrong, and two levels would help."""
CREATED = ("time_created_ns", "time_discovered_started_ns", "time_discovered_completed_ns")
MOST_APART_S, MOST_DRIFT = 3.0, 50e-6
TOP_K = 4
"""With so many experts of a token, two levels send less between hosts however the tokens choose."""


def of_hosts(trainers: Sequence[str], seeds: Sequence[int]) -> list[Scenario]:
    """Return a scenario of two hosts for each of these trainers, what is wrong, and seed."""
    return [one for trainer in trainers if trainer in HOST_TRAINERS for seed in seeds for one in _drawn(trainer, seed)]


def _drawn(trainer: str, seed: int) -> list[Scenario]:
    draw = random.Random(f"{trainer} hosts {seed}")
    size = 2 * NODE_SIZE
    late, rank = draw.choice((0.06, 0.1)), draw.randrange(size)
    one, other = draw.randrange(NODE_SIZE), NODE_SIZE + draw.randrange(NODE_SIZE)
    link = draw.choice(((one, other), (other, one)))
    ways = [(sender, receiver) for sender in range(NODE_SIZE) for receiver in range(NODE_SIZE, size)]
    way = sum(ways if draw.random() < 0.5 else [pair[::-1] for pair in ways], ())
    faults: dict[str, tuple[Fault, ...]] = {
        "hosts, healthy": (),
        "hosts, late rank": (Fault("late rank", (rank,), late),),
        "hosts, slow rank": (Fault("slow rank", (draw.randrange(size),), 3.0),),
        "hosts, slow link between": (Fault("slow link", link, 8.0),),
        "hosts, slow way between": (Fault("slow link", way, 8.0),),
    }
    top_k = 2
    if trainer == "transformers":  # its router tells the tokens
        faults[TWO_LEVELS], top_k = (), TOP_K
    return [
        Scenario(
            name, seed, size, 2, 12, own, trainer, num_hosts=2, top_k=top_k,
            uplink_bits=SLOW_UPLINK_BITS if name == TWO_LEVELS else UPLINK_BITS,
        )
        for name, own in faults.items()
    ]  # fmt: skip


def move_clocks(folder: Path, seed: int) -> tuple[float, float]:
    """Move the traces of a folder's second host onto a clock of its own; return by how many seconds, and its drift."""
    draw = random.Random(f"clocks {seed}")
    apart_s, drift = draw.uniform(-MOST_APART_S, MOST_APART_S), draw.uniform(-MOST_DRIFT, MOST_DRIFT)
    files = {file: json.loads(gzip.decompress(file.read_bytes())) for file in sorted(folder.glob("*.trace.json.gz"))}
    *_, second = sorted({trace["host_name"] for trace in files.values()})
    for file, trace in files.items():
        if trace["host_name"] == second:
            times = [event["ts"] for event in trace["traceEvents"] if "ts" in event]
            begin = min(times)
            for event in trace["traceEvents"]:
                if "ts" in event:
                    event["ts"] += apart_s * 1e6 + drift * (event["ts"] - begin)
                if "dur" in event:
                    event["dur"] *= 1 + drift
            file.write_bytes(gzip.compress(json.dumps(trace).encode(), 1))
            _move_record(file.with_name(file.name.replace(".trace.json.gz", ".flight.json")), apart_s, drift)
    return apart_s, drift


def _move_record(file: Path, apart_s: float, drift: float) -> None:
    """Move the flight record beside a trace, if there is one, as far."""
    if not file.exists():
        return
    record = json.loads(file.read_text())
    begin = min((entry["time_created_ns"] for entry in record["entries"]), default=0)
    for entry in record["entries"]:
        for name in CREATED:
            if entry.get(name):
                entry[name] += round(apart_s * 1e9 + drift * (entry[name] - begin))
    file.write_text(json.dumps(record))
