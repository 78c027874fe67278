"""Exchanges between the processes of a gloo group; rows travel as one message from each rank to each other.

Not gloo's all_to_all, which posts its sends before its receives: on the rank that comes later the sent rows then stand
before the note that lets the peer send, on the one connection between the two, and the directions take turns.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.progress import ThreadedExchange

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GlooExchange", "let_compute_go_on"]

TAG = 0x6D6F65
"""Of all exchanges: gloo keeps the order of messages with one tag from one rank to another."""


THREAD_NAME = "gloo_tcp_loop"


def let_compute_go_on() -> None:
    """Let gloo's own threads wait for the end of a time slice instead of interrupting compute (SCHED_BATCH on Linux).

    Woken for every few packets, such a thread would interrupt, and where compute was just handing rows over to gloo,
    spin for the lock that the interrupted thread holds. A core that is idle still runs it at once.
    Older gloos (torch 2.10) don't name their threads, which then stay as they are.
    """
    if sys.platform == "linux":
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or this user may not
                if (task / "comm").read_text().strip() == THREAD_NAME:
                    os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


class GlooExchange(ThreadedExchange):
    """Messages under way: those that post_rows() has posted, or the work of one collective."""

    def post_rows(
        self,
        group: "ProcessGroup | None",
        rank: int,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor,
    ) -> None:
        """Post all messages.

        Args: as in Transport.exchange, checked, in a dtype that travels; rank: of this process in the group.
        Raises:
            TransportError: a peer's connection is closed.
        """
        dist = torch.distributed
        try:
            self.post(
                rank,
                rows.split(list(input_splits)),
                out.split(list(output_splits)),
                lambda part, peer: dist.irecv(part, group=group, group_src=peer, tag=TAG),
                lambda part, peer: dist.isend(part, group=group, group_dst=peer, tag=TAG),
            )
        except RuntimeError as error:
            raise TransportError(f"exchange could not be posted ({self.what}): {error}") from error

    def block(self) -> None:
        try:
            for number, message in enumerate(self.messages, 1):
                message.wait()
                if number == self.num_receives:
                    self.arrived_at = time.perf_counter()
        except RuntimeError as error:
            self.failure = str(error)
        self.messages.clear()

    def fail(self, reason: str) -> NoReturn:
        elapsed = time.perf_counter() - self.posted_at
        raise TransportError(f"exchange failed {elapsed:.2f} s after it was posted ({self.what}): {reason}")
