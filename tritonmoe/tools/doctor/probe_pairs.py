"""probe_pairs: the link between every two ranks measured alone, where exchanges don't tell when whose rows arrived."""

import math
import statistics
import time
from dataclasses import dataclass
from itertools import permutations

import torch

from tritonmoe.overlap.simulation.cost_model import fit_line
from tritonmoe.tools.doctor.link_fit import SMALLEST_RATIO
from tritonmoe.transports import Transport

__all__ = ["PairTimes", "probe_pairs"]

PAIR_BYTES = (2**12, 2**20, 2**22)
PAIR_ROUNDS = 5
ROW_BYTES = 256


@dataclass(frozen=True)
class PairTimes:
    """What a message from rank i to rank k takes, nothing else being under way."""

    latency_s: list[list[float]]
    """[i][k]; 0 on the diagonal."""
    byte_s: list[list[float]]
    """[i][k] seconds of each further byte."""

    def slow(self) -> list[tuple[int, int, float]]:
        """Return (i, k, how many times as long as on the typical link a byte takes) of slow pairs, the worst first."""
        size = len(self.byte_s)
        links = list(permutations(range(size), 2))
        typical = statistics.median_low([self.byte_s[i][k] for i, k in links])
        found = [(i, k, self.byte_s[i][k] / typical) for i, k in links if typical > 0]
        return sorted((one for one in found if one[2] > SMALLEST_RATIO), key=lambda one: -one[2])

    def __str__(self) -> str:
        size = len(self.byte_s)
        lines = ["GB/s from rank (row) to rank (column):", "      " + "".join(f"{k:>9}" for k in range(size))]
        for i, of in enumerate(self.byte_s):
            rates = ("-" if i == k else "inf" if not s else f"{1e-9 / s:.3g}" for k, s in enumerate(of))
            lines.append(f"{i:>6}" + "".join(f"{rate:>9}" for rate in rates))
        slow = [f"rank {i} to rank {k}: {times:.1f} times as long a byte" for i, k, times in self.slow()[:8]]
        return "\n".join([*lines, *(slow or ["no link is slower than the others by 15 %"])])


def probe_pairs(transport: Transport, device: torch.device | str = "cpu") -> PairTimes:
    """Measure the links between all pairs of ranks, one direction at a time; every rank makes the call.

    At a time a rank sends to one other, or receives from one, or rests: an exchange ends when its rows have left, too,
    so that a slow way to another rank would look like a slow way from one. The median of five rounds of three sizes
    counts, by the clock of the rank that receives, from when all ranks are ready; all ranks get the same figures.
    """
    size, own = transport.size, transport.rank
    seconds = torch.zeros(len(PAIR_BYTES), size, size, dtype=torch.int64, device="cpu")
    for distance in range(1, size):
        for receiver_of in _turns(size, distance):
            for number, num_bytes in enumerate(PAIR_BYTES):
                times = [_send(transport, receiver_of, num_bytes, device) for _ in range(PAIR_ROUNDS)]
                for sender, receiver in receiver_of.items():
                    if receiver == own:
                        seconds[number, sender, own] = round(1e9 * statistics.median(times))
    told = transport.exchange_counts(seconds[:, :, own].flatten().expand(size, -1).contiguous())
    everybody = told.view(size, len(PAIR_BYTES), size).permute(1, 2, 0).to(torch.float64) / 1e9  # (sizes, W, W)
    latency, byte = [[0.0] * size for _ in range(size)], [[0.0] * size for _ in range(size)]
    for i, k in permutations(range(size), 2):
        points = zip(map(float, PAIR_BYTES), everybody[:, i, k].tolist(), strict=True)
        latency[i][k], byte[i][k] = fit_line(list(points))
    return PairTimes(latency, byte)


def _turns(size: int, distance: int) -> list[dict[int, int]]:
    """Return who sends to whom at a time (sender: receiver), `distance` ranks further, until every rank has sent once.

    Example:
        3 ranks, to the next one: rank 0 to 1, then rank 1 to 2, then rank 2 to 0.
    """
    turns: list[dict[int, int]] = [{}, {}, {}]
    length = size // math.gcd(size, distance)  # of the circles in which the ranks pass something on
    for first in range(size // length):
        for place in range(length):
            sender = (first + place * distance) % size
            turn = 2 if length % 2 and place == length - 1 else place % 2
            turns[turn][sender] = (sender + distance) % size
    return [turn for turn in turns if turn]


def _send(transport: Transport, receiver_of: dict[int, int], num_bytes: int, device: torch.device | str) -> float:
    """Send so many bytes from every sender to its receiver, and return the seconds of this rank's exchange."""
    size, own = transport.size, transport.rank
    there, here = [0] * size, [0] * size
    for sender, receiver in receiver_of.items():
        if sender == own:
            there[receiver] = num_bytes // ROW_BYTES
        if receiver == own:
            here[sender] = num_bytes // ROW_BYTES
    rows = torch.zeros(sum(there), ROW_BYTES, dtype=torch.uint8, device=device)
    transport.barrier()
    started = time.perf_counter()
    pending = transport.exchange(rows, there, here)
    pending.wait()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return (pending.finished_at() or time.perf_counter()) - started
