"""Listeners: who hears of every layer call of this process, before it and after each pass, as a recording does."""

from typing import Protocol

import torch

from tritonmoe.dispatch.header import CallHeader
from tritonmoe.ops.grouping import Grouping
from tritonmoe.overlap.report import LayerReport
from tritonmoe.transports import Transport

__all__ = ["CallListener", "listeners"]


class CallListener(Protocol):
    """What hears of calls; it is called on the thread that ran the pass, and reads nothing of the device there."""

    def before_forward(self, transport: Transport, device: torch.device) -> None:
        """Hear that a call begins, of which no rank has sent anything yet; not inside of a CUDA graph.

        What it raises the call raises, and the other ranks hear of it.
        """
        ...

    def after_forward(self, transport: Transport, header: CallHeader, report: LayerReport, grouping: Grouping) -> None:
        """Hear of a forward. With a capacity that was too small it is told of both runs of a call, the last one second.

        Args:
            transport: of all ranks. header: what this rank told the others of the call.
            grouping: of the pairs that this rank computes, on the layer's device; it lives as long as the call's graph,
                whose backward may come.
        """
        ...

    def after_backward(self, transport: Transport, header: CallHeader, report: LayerReport) -> None:
        """Hear of the backward of the call with this header, which `report` has the times of."""
        ...


listeners: list[CallListener] = []
"""Everybody who listens."""
