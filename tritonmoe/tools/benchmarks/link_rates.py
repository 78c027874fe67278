"""Rates of links as the commands of tc shape them, and the addresses that they are shaped for."""

from collections.abc import Mapping

from tritonmoe.tools.benchmarks.inside_namespace import INTERFACE

__all__ = ["address", "bucket", "parse_rate", "shaping"]

UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_rate(text: str) -> float:
    """Return bits per second of a rate as tc writes it: "1gbit" gives 1e9.

    Raises:
        ValueError: the text is not a positive number with one of the units bit, kbit, mbit, gbit.
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        rate = float(number) * UNITS[text[len(number) :]]
    except (ValueError, KeyError):
        rate = 0.0
    if not 0 < rate < 1e15:
        raise ValueError(f"a rate is a positive number with bit, kbit, mbit or gbit, as in 1gbit, got {text!r}")
    return rate


def address(rank: int) -> str:
    """Return the address of a rank's end of its link."""
    return f"10.77.{rank // 200}.{rank % 200 + 1}"


def bucket(rate: float) -> str:
    """Return tc's token bucket; a burst of 1 ms, and a queue that is long enough to lose nothing."""
    burst = max(128 * 1024, int(rate / 8 * 1e-3))
    return f"tbf rate {int(rate)}bit burst {burst} limit {max(8 << 20, int(rate / 8 * 0.5))}"


def shaping(rate: float, slow: Mapping[int, float]) -> list[str]:
    """Return the commands that shape what a rank sends: all of it, and within that what goes to some ranks."""
    device = f"dev {INTERFACE}"
    if not slow:
        return [f"tc qdisc replace {device} root {bucket(rate)}"]
    commands = [
        f"tc qdisc del {device} root",
        f"tc qdisc add {device} root handle 1: htb default 10",
        f"tc class add {device} parent 1: classid 1:1 htb rate {int(rate)}bit",
        f"tc class add {device} parent 1:1 classid 1:10 htb rate {int(rate)}bit",
    ]
    for receiver, bits in slow.items():
        commands += [
            f"tc class add {device} parent 1:1 classid 1:{20 + receiver} htb rate {int(bits)}bit",
            f"tc filter add {device} parent 1: protocol ip prio 1 u32 match ip dst {address(receiver)}/32 "
            f"flowid 1:{20 + receiver}",
        ]
    return commands
