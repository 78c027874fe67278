"""What a process in a network namespace sees of its link, and what rank 0 asks of the process that made them all."""

import os
import socket
from collections.abc import Mapping

__all__ = ["CONTROL", "INSIDE", "INTERFACE", "ask", "check_start", "interface_bytes", "is_inside"]

INSIDE = "TRITONMOE_INSIDE_NAMESPACES"
"""The environment variable that every process in the namespaces has; torchrun's RANK alone says nothing of its link."""

CONTROL = "TRITONMOE_NAMESPACES_CONTROL"
"""The environment variable that holds the number of the open socket over which rank 0 asks."""
INTERFACE = "eth0"
"""What the end of a rank's link is called in its namespace."""


def is_inside() -> bool:
    """Say whether this process was started in a network namespace of its own."""
    return INSIDE in os.environ


def check_start(netns: int | None, link_options: Mapping[str, object]) -> None:
    """Refuse --netns under torchrun, and there what is said of a link that nothing shapes.

    link_options: by option what was given for it, or None.
    Raises:
        ValueError: the option that would have no effect, and the way out.
    """
    if "RANK" not in os.environ or is_inside():
        return
    if netns is not None:
        raise ValueError(
            f"--netns {netns} starts processes of its own, and the environment has RANK={os.environ['RANK']}, as under "
            "torchrun: start it without torchrun (unset RANK), or leave out --netns to measure torchrun's ranks"
        )
    for option, given in link_options.items():
        if given is not None:
            raise ValueError(
                f"{option} shapes the links that --netns makes, and can't shape the link between ranks of torchrun. "
                "Leave the option out, or start with --netns N and without torchrun"
            )


def ask(question: str) -> str | None:
    """Ask, on rank 0, the process that made the namespaces; None where there is none."""
    number = os.environ.get(CONTROL)
    if number is None:
        return None
    control = socket.socket(fileno=int(number))
    try:
        control.sendall(question.encode() + b"\n")
        return control.recv(4096).decode().strip()
    finally:
        control.detach()


def interface_bytes() -> tuple[int, int]:
    """Return the bytes that the interface of this process's own namespace has received and sent, by its counters."""
    # Not /sys: it shows the namespace in which it was mounted.
    with open("/proc/self/net/dev") as file:
        for line in file:
            name, _, counters = line.partition(":")
            if name.strip() == INTERFACE:
                fields = counters.split()
                return int(fields[0]), int(fields[8])
    raise ValueError(f"this process's network namespace has no interface {INTERFACE}")
