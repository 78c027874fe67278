"""ProcessGroupTransport: rows between processes, through torch.distributed (NCCL on GPUs, gloo on CPUs)."""

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.transports.base import (
    PendingExchange,
    Transport,
    as_counts,
    as_wire,
    check_counts,
    check_exchange,
    describe,
)
from tritonmoe.transports.gloo import GlooExchange, let_compute_go_on
from tritonmoe.transports.local import CompletedExchange
from tritonmoe.transports.progress import ProgressThread
from tritonmoe.transports.two_level import TwoLevelTransport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ProcessGroupTransport", "available", "torchrun_ranks"]


def available() -> dict[str, str | None]:
    """Say of gloo and nccl why ranks in several processes can't use it here; None where they can."""
    reasons: dict[str, str | None]
    if not torch.distributed.is_available():
        built_without = "this torch was built without torch.distributed"
        reasons = {"gloo": built_without, "nccl": built_without}
    else:
        import torch.distributed as dist

        nccl = None
        if not dist.is_nccl_available():
            nccl = "this torch was built without NCCL"
        elif not torch.cuda.is_available():
            nccl = "there is no CUDA device"
        reasons = {"gloo": None if dist.is_gloo_available() else "this torch was built without gloo", "nccl": nccl}
    return reasons


@contextmanager
def torchrun_ranks(*, timeout_s: float) -> "Iterator[ProcessGroupTransport]":
    """Join the processes that torchrun has started: gloo for the CPU and, with a CUDA device, NCCL for that.

    The group ends with the context; after an exception it is left as it is, for the process to end.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise TransportError(f"the ranks did not meet within {timeout_s:g} s: {error}") from error
    yield ProcessGroupTransport(timeout_s=timeout_s)
    dist.destroy_process_group()


class CollectiveExchange(PendingExchange):
    """An asynchronous all_to_all_single of a backend that only the current stream waits for, and its two tensors."""

    def __init__(self, work: Any, rows: Tensor, out: Tensor, what: str) -> None:
        self._work = work
        self._rows: Tensor | None = rows  # the collective reads it until wait() has returned
        self._out = out
        self._what = what
        self._posted_at = time.perf_counter()

    def wait(self) -> Tensor:
        try:
            # It only orders the current stream, so it is repeated for a caller on another stream.
            self._work.wait()
        except RuntimeError as error:
            elapsed = time.perf_counter() - self._posted_at
            raise TransportError(
                f"exchange failed {elapsed:.2f} s after it was posted ({self._what}): {error}"
            ) from error
        if self._out.is_cuda:
            stream = torch.cuda.current_stream(self._out.device)
            self._out.record_stream(stream)
            if self._rows is not None:
                self._rows.record_stream(stream)
        self._rows = None
        return self._out


class ProcessGroupTransport(Transport):
    """Rows between the processes of a torch.distributed group.

    CPU tensors travel on the group's CPU backend (gloo), CUDA tensors on its CUDA backend (NCCL), so a group of
    "cpu:gloo,cuda:nccl" serves both. The group stays its maker's: close() doesn't destroy it.
    Splits are not compared between ranks here: NCCL hangs and gloo reads untouched memory or aborts the process where
    they disagree, so callers agree on them through exchange_counts first.

    Args:
        group: a ProcessGroup that this process belongs to; None is the default group.
        timeout_s: how long wait() and exchange_counts() wait for CPU tensors on gloo before they raise; None is the
            group's own timeout. NCCL ignores it, since waiting there blocks only the stream: its watchdog ends the
            process. For CUDA tensors on gloo it is the group's own timeout.
    Raises:
        ValueError: torch.distributed is not available or not initialised, or this process is not in the group.
    """

    def __init__(self, group: "ProcessGroup | None" = None, *, timeout_s: float | None = None) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive or None, got {timeout_s}")
        if not torch.distributed.is_available():
            raise ValueError("this torch was built without torch.distributed: use LocalTransport()")
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ValueError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group() first, "
                "or use LocalTransport()"
            )
        if group is None:
            group = dist.group.WORLD
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("this process is not a member of the group: make the transport on the members only")
        self.size = dist.get_world_size(group)
        self._group = group
        self._timeout_s = timeout_s
        # get_backend_config gives "cpu:gloo,cuda:nccl"
        self._backends = dict(pair.split(":", 1) for pair in dist.get_backend_config(group).split(","))
        self._staging: dict[int, tuple[Tensor, Tensor]] = {}
        self._counts_stream: torch.cuda.Stream | None = None
        self._progress = ProgressThread("gloo-progress")
        self._end = weakref.finalize(self, self._progress.end)
        if "gloo" in self._backends.values():
            let_compute_go_on()

    @property
    def group(self) -> "ProcessGroup":
        """The group that it was made on."""
        group = torch.distributed.group.WORLD if self._group is None else self._group
        assert group is not None
        return group

    def with_nodes(self, node_size: int) -> TwoLevelTransport:
        """Give this transport in nodes of node_size neighbours, a group for each level; every rank makes the call."""
        import torch.distributed as dist

        ranks = dist.get_process_group_ranks(self._group)
        groups = [[*range(n, n + node_size)] for n in range(0, self.size, node_size)]
        groups += [[*range(place, self.size, node_size)] for place in range(node_size)]
        made = [dist.new_group([ranks[member] for member in members]) for members in groups]
        inside, between = (
            ProcessGroupTransport(group, timeout_s=self._timeout_s)
            for group, members in zip(made, groups, strict=True)
            if self.rank in members
        )
        return TwoLevelTransport(self, node_size, between_nodes=between, inside_node=inside)

    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        self._check_open()
        input_splits, output_splits = as_counts(input_splits), as_counts(output_splits)
        out = check_exchange(self, rows, input_splits, output_splits, out)
        backend = self._backends.get(rows.device.type)
        if backend is None:
            raise ValueError(
                f"this group has no backend for tensors on {rows.device}, only {self._backends}: "
                f'initialise it with backend="cpu:gloo,cuda:nccl", or move the rows'
            )
        what = f"{backend}, {describe(self, input_splits, output_splits)}"
        if self._is_gloo(rows.device):
            exchange = GlooExchange(rows, out, what, self._timeout_s)
            wire_rows, wire_out = as_wire(rows.detach()), as_wire(out.detach())
            exchange.post_rows(self._group, self.rank, wire_rows, input_splits, output_splits, wire_out)
            self._progress.add(exchange)
            return exchange
        return CollectiveExchange(self._post(out, rows, output_splits, input_splits, what), rows, out, what)

    @property
    def counts_cross_device(self) -> bool:
        return "cpu" not in self._backends

    def post_counts(self, counts: Tensor) -> PendingExchange:
        self._check_open()
        check_counts(self, counts)
        if self.counts_cross_device:
            return CompletedExchange(self._exchange_counts_on_device(counts))
        ones = [1] * self.size
        counts = counts.contiguous()
        if not self._is_gloo(counts.device):
            return self.exchange(counts, ones, ones)
        # One collective: with thousands of ranks, posting a message for each takes longer than these few bytes.
        received = torch.empty_like(counts)
        what = f"gloo, {describe(self, ones, ones)}"
        exchange = GlooExchange(counts, received, what, self._timeout_s)
        exchange.messages.append(self._post(received, counts, ones, ones, what))
        self._progress.add(exchange)
        return exchange

    def close(self) -> None:
        self._end()
        self._staging.clear()
        self._counts_stream = None

    def _is_gloo(self, device: torch.device) -> bool:
        return device.type == "cpu" and self._backends.get("cpu") == "gloo"

    def _post(self, out: Tensor, rows: Tensor, output_splits: list[int], input_splits: list[int], what: str) -> Any:
        import torch.distributed as dist

        wire_out, wire_rows = as_wire(out.detach()), as_wire(rows.detach())
        try:
            return dist.all_to_all_single(
                wire_out, wire_rows, output_splits, input_splits, group=self._group, async_op=True
            )
        except RuntimeError as error:
            raise TransportError(f"exchange could not be posted ({what}): {error}") from error

    def _exchange_counts_on_device(self, counts: Tensor) -> Tensor:
        """Send counts through a group that has only NCCL: pinned memory to the device, and back."""
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "counts can't cross NCCL while a CUDA graph is captured, since the host waits for them: initialise the "
                'group with backend="cpu:gloo,cuda:nccl"'
            )
        if self._counts_stream is None:
            self._counts_stream = torch.cuda.Stream()
        length = counts.shape[1]
        if length not in self._staging:
            pinned = torch.empty(2, self.size, length, dtype=torch.int64, pin_memory=True, device="cpu")
            self._staging[length] = (pinned[0], pinned[1])
        pinned_in, pinned_out = self._staging[length]
        pinned_in.copy_(counts)
        ones = [1] * self.size
        # A stream of its own: on the current one the host would wait for all compute that is queued there.
        with torch.cuda.stream(self._counts_stream):
            sent = pinned_in.to(self._counts_stream.device, non_blocking=True)
            received = self.exchange(sent, ones, ones).wait()
            pinned_out.copy_(received, non_blocking=True)
        self._counts_stream.synchronize()
        return pinned_out.clone()

    def _check_open(self) -> None:
        if not self._end.alive:
            raise TransportError("this ProcessGroupTransport is closed: make a new one")
