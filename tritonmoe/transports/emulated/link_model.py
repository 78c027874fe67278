"""LinkModel: how long rows would travel over a link that isn't there."""

from dataclasses import dataclass

from tritonmoe.config.layer import is_number

__all__ = ["LinkModel"]


@dataclass(frozen=True)
class LinkModel:
    """A link of every rank: so many bytes a second in each direction, and a fixed time for each message.

    Args:
        bandwidth_gb_per_s: 1e9 bytes a second, per rank and direction; None is infinitely fast.
        latency_us: microseconds that every message takes on top.
    """

    bandwidth_gb_per_s: float | None
    latency_us: float = 0.0

    def __post_init__(self) -> None:
        bandwidth = self.bandwidth_gb_per_s
        if bandwidth is not None and not (is_number(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth_gb_per_s must be a positive number, or None for no limit, got {bandwidth!r}")
        if not (is_number(self.latency_us) and self.latency_us >= 0):
            raise ValueError(f"latency_us must be a finite number that is not negative, got {self.latency_us!r}")

    def transfer_s(self, num_bytes: int) -> float:
        """Give the seconds for which num_bytes occupy a port; the latency is not in it."""
        return 0.0 if self.bandwidth_gb_per_s is None else num_bytes / (self.bandwidth_gb_per_s * 1e9)
