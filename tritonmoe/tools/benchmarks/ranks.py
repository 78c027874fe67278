"""What the ranks of a benchmark tell each other outside of what is measured."""

import json
import os
from typing import Any

import torch
from torch import Tensor

from tritonmoe.tools.planner.probe_costs import slowest
from tritonmoe.transports import Transport

__all__ = ["device_and_backend", "gather", "slowest"]


def device_and_backend() -> tuple[str, str]:
    """Return this process's device under torchrun, a GPU of its own where there are any, and what exchanges run on.

    A GPU becomes the current device.
    """
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
        return device, "NCCL"
    return "cpu", "gloo"


def gather(transport: Transport, value: object) -> list[Any]:
    """Return every rank's value, on every rank, in rank order.

    It travels as JSON, for what a peer sends must not be unpickled: numbers, text and None, in lists and in
    dictionaries whose keys are text. Tuples arrive as lists.

    Raises:
        TypeError: it is something else. ValueError: what a peer sent is no JSON.
    """
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = transport.size
    lengths = transport.exchange_counts(torch.full((size, 1), len(own), dtype=torch.int64))[:, 0].tolist()
    received: Tensor = transport.exchange(own.repeat(size), [len(own)] * size, lengths).wait()
    found = []
    for rank, piece in enumerate(received.split(lengths)):
        try:
            found.append(json.loads(piece.numpy().tobytes()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"rank {rank} sent a text that is not JSON: {error}") from error
    return found
