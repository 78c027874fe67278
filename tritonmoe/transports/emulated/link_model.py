"""LinkModel: how long rows would travel over a link that isn't there."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tritonmoe.config.numbers import is_number

__all__ = ["LinkModel"]


@dataclass(frozen=True)
class LinkModel:
    """A link of every rank: so many bytes a second in each direction, and a fixed time for each message.

    Args:
        bandwidth_gb_per_s: 1e9 bytes a second, per rank and direction; None is infinitely fast.
        latency_us: microseconds that every message takes on top.
        slow_ports: by rank, how many times as long a byte occupies its port as it does the others'.
        slow_links: by sender and receiver, how many times as long a byte is under way between these two. Their other
            messages go on meanwhile.
        late_links_us: by sender and receiver, microseconds that every message between these two takes beside
            latency_us; no other message waits for it.
    Example:
        LinkModel(1.0, slow_links={(2, 5): 4.0}): what rank 2 sends to rank 5 travels at a quarter of the bandwidth.
    """

    bandwidth_gb_per_s: float | None
    latency_us: float = 0.0
    slow_ports: Mapping[int, float] = field(default_factory=dict, hash=False)
    slow_links: Mapping[tuple[int, int], float] = field(default_factory=dict, hash=False)
    late_links_us: Mapping[tuple[int, int], float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        bandwidth = self.bandwidth_gb_per_s
        if bandwidth is not None and not (is_number(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth_gb_per_s must be a positive number, or None for no limit, got {bandwidth!r}")
        if not (is_number(self.latency_us) and self.latency_us >= 0):
            raise ValueError(f"latency_us must be a finite number that is not negative, got {self.latency_us!r}")
        for name, slow in (("slow_ports", self.slow_ports), ("slow_links", self.slow_links)):
            if not all(is_number(times) and times > 0 for times in slow.values()):
                raise ValueError(f"{name} must have positive, finite factors by which bytes take longer, got {slow!r}")
        if not all(is_number(late_us) and late_us >= 0 for late_us in self.late_links_us.values()):
            raise ValueError(f"late_links_us must say how many microseconds messages take, got {self.late_links_us!r}")

    def transfer_s(self, num_bytes: int, rank: int | None = None) -> float:
        """Return the seconds for which num_bytes occupy a port, `rank`'s if it is given; the latency is not in it."""
        if self.bandwidth_gb_per_s is None:
            return 0.0
        times = 1.0 if rank is None else self.slow_ports.get(rank, 1.0)
        return num_bytes * times / (self.bandwidth_gb_per_s * 1e9)

    def link_s(self, num_bytes: int, sender: int, receiver: int) -> float:
        """Return the seconds for which num_bytes are on a slow link between two ranks; 0 where it is not slow."""
        return self.transfer_s(num_bytes) * self.slow_links.get((sender, receiver), 0.0)

    def message_s(self, sender: int, receiver: int) -> float:
        """Return the seconds that every message from one rank to another takes, however small it is."""
        return (self.latency_us + self.late_links_us.get((sender, receiver), 0.0)) * 1e-6
