"""Transports: how rows travel between ranks. None of them knows of experts."""

from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.emulated import Death, Delay, EmulatedTransport, EmulatedWorld, LinkModel
from tritonmoe.transports.local import LocalTransport
from tritonmoe.transports.process_group import ProcessGroupTransport

__all__ = [
    "Death",
    "Delay",
    "EmulatedTransport",
    "EmulatedWorld",
    "LinkModel",
    "LocalTransport",
    "PendingExchange",
    "ProcessGroupTransport",
    "Transport",
]
