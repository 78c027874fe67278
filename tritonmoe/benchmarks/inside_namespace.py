"""What a process in a network namespace sees of its link, and what rank 0 asks of the process that made them all."""

import os
import socket

__all__ = ["CONTROL", "INTERFACE", "ask", "interface_bytes"]

CONTROL = "TRITONMOE_NAMESPACES_CONTROL"
"""The environment variable that holds the number of the open socket over which rank 0 asks."""
INTERFACE = "eth0"
"""What the end of a rank's link is called in its namespace."""


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


def interface_bytes(interface: str = INTERFACE) -> tuple[int, int]:
    """Give the bytes that an interface of this process's own namespace has received and sent, by its counters."""
    # Not /sys: it shows the namespace in which it was mounted.
    with open("/proc/self/net/dev") as file:
        for line in file:
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                fields = counters.split()
                return int(fields[0]), int(fields[8])
    raise ValueError(f"this process's network namespace has no interface {interface}")
