"""ProcessGroupTransport: rows between processes, through torch.distributed (NCCL on GPUs, gloo on CPUs)."""

import functools
import os
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.errors import TransportError
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.breakdown import Breakdown
from tritonmoe.transports.exchange_arguments import (
    as_counts,
    as_wire,
    check_counts,
    check_exchange,
    describe,
    raise_in_child,
)
from tritonmoe.transports.gloo import GlooExchange, GlooLinks, end_links
from tritonmoe.transports.notices import Missed, Notices
from tritonmoe.transports.progress_thread import ProgressThread
from tritonmoe.transports.torch_groups import backends_of, group_of_devices, next_number, own_group, timeout_of
from tritonmoe.transports.two_level_transport import TwoLevelTransport, check_nodes
from tritonmoe.transports.waiting import LongWait

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work
if TYPE_CHECKING:
    from torch.distributed import Work

__all__ = ["CollectiveExchange", "ProcessGroupTransport"]


class ProcessGroupTransport(Transport):
    """Rows between the processes of a torch.distributed group.

    CPU tensors and counts travel over gloo if the group has gloo or no backend for the CPU, on connections that the
    transport makes with its first exchange. CUDA tensors travel on the group's CUDA backend (NCCL). close() doesn't
    destroy the group. exchange() doesn't compare splits between ranks: if they disagree, gloo waits until the timeout
    and NCCL for ever, so callers agree on splits through exchange_counts first. The exchanges of two transports of one
    group never meet: make the transports, and call them, in the same order on every rank.

    Args:
        group: a ProcessGroup that this process belongs to; None is the default group.
        timeout_s: how long wait(), exchange_counts() and rebuild() wait for gloo before they raise; None is the
            group's own timeout. Over NCCL only the device waits for rows: a host that waits for its device in a layer
            call raises after timeout_s too, unless NCCL's watchdog ends the process before, at the group's timeout.
    Raises:
        ValueError: torch.distributed is not available or not initialised, this process is not in the group, or no
            backend carries CPU tensors.
    """

    def __init__(self, group: "ProcessGroup | None" = None, *, timeout_s: float | None = None) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive or None, got {timeout_s}")
        group = own_group(group)
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group: ProcessGroup = group
        self._device_group: ProcessGroup = group
        self._backends = backends_of(group)
        self._timeout_s = timeout_of(group) if timeout_s is None else timeout_s
        self._pid = os.getpid()
        self._store = dist.PrefixStore("tritonmoe", dist.distributed_c10d._get_process_group_store(group))
        self._notices = Notices(self._store, self.rank, self.size, next_number(group))
        self.is_closed = False
        self._begin_generation(0)

    def _begin_generation(self, generation: int) -> None:
        self.generation = generation
        self._breakdown = Breakdown(self._notices, self.rank, generation)
        self._links: GlooLinks | None = None
        self._num_posted = 0

    @property
    def group(self) -> "ProcessGroup":
        """The group that the transport was made on."""
        return self._group

    @property
    def job_ranks(self) -> tuple[int, ...] | None:
        import torch.distributed as dist

        ranks = tuple(dist.get_process_group_ranks(self._group))
        return None if len(ranks) == dist.get_world_size() else ranks

    def with_nodes(self, node_size: int) -> TwoLevelTransport:
        """Return this transport in nodes of node_size neighbours, a group for each level; every rank makes the call.

        Raises:
            ValueError: the ranks don't make whole nodes, or aren't the whole job.
        """
        import torch.distributed as dist

        check_nodes(self.size, node_size)
        ranks = dist.get_process_group_ranks(self._group)
        if self.job_ranks is not None:  # in new_group() all processes of the job name the same groups
            raise ValueError(
                f"with_nodes() needs a group of the whole job, got ranks {ranks}: make groups for the "
                "levels of every part of the job, and a TwoLevelTransport of their transports"
            )
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
        self._check_usable()
        input_splits, output_splits = as_counts(input_splits), as_counts(output_splits)
        out = check_exchange(self, rows, input_splits, output_splits, out)
        backend = self._backends.get(rows.device.type)
        if backend is None:
            raise ValueError(
                f"this group has no backend for tensors on {rows.device}, only {self._backends}: "
                f'initialise it with backend="cpu:gloo,cuda:nccl", or move the rows'
            )
        what = f"{backend}, {describe(self, input_splits, output_splits)}"
        if not self._is_gloo(rows.device):
            return CollectiveExchange(self, self._post(out, rows, output_splits, input_splits, what), rows, out, what)
        links = self._links or self._meet_first(what)
        exchange = GlooExchange(links, self._breakdown, rows, out, what, self._timeout_s)
        wire_rows, wire_out = as_wire(rows.detach()), as_wire(out.detach())
        self._num_posted += 1
        exchange.post_rows(self.rank, self._num_posted, wire_rows, input_splits, output_splits, wire_out)
        if self.records_arrivals and self.size > 2:
            exchange.watch(self._progress)
        self._progress.add(exchange)
        return exchange

    def uses_rendezvous(self, device: torch.device) -> bool:
        return self._is_gloo(device)

    def post_counts(self, counts: Tensor) -> PendingExchange:
        self._check_usable()
        check_counts(self, counts)
        ones = [1] * self.size
        return self.exchange(counts.contiguous(), ones, ones)

    def wait_for_copy(self, copy: HostCopy) -> list[Tensor]:
        if self.size == 1:
            return copy.wait()
        others = [rank for rank in range(self.size) if rank != self.rank]
        long = LongWait(
            f"rank {self.rank} of {self.size}",
            lambda: f"its device, which may wait for rows of ranks {others},",
            "a copy to the host",
            self._timeout_s,
        )
        return copy.wait(functools.partial(self._look_around, long))

    def _look_around(self, long: LongWait, waited_s: float) -> None:
        """Raise TransportError where this rank's device may wait for ever, over NCCL: nothing else tells the host."""
        long.look(waited_s)
        broken = self._notices.find_broken(self.generation)
        if broken is None and waited_s < self._timeout_s and not self._breakdown.has_happened:
            return
        self._give_up(f"waited {waited_s:.1f} s for its device", () if broken is None else (broken,))
        raise TransportError(
            f"rank {self.rank} of {self.size} waits for its device, and the device may wait for rows that will never "
            f"come: {self._breakdown.explain()}"
        )

    def give_up(self, what: str) -> None:
        if self.size > 1 and self._pid == os.getpid():
            self._give_up(what)

    def _give_up(self, what: str, because_of: Sequence[int] = ()) -> None:
        if self._breakdown.claim():
            self._breakdown.note(what, because_of)
            if self._links is not None:
                self._links.cut()

    def rebuild(self) -> None:
        """Connect anew, as Transport.rebuild() says.

        With NCCL the old communicator is aborted, the group's own too: nothing else can use that any more, so give
        the transport a group of its own. Later exchanges of CUDA tensors use a new group over the same ranks.
        """
        self._check_open()
        unknown = set(self._backends.values()) - {"gloo", "nccl"}
        if unknown:
            raise TransportError(f"a group of {unknown} can't be rebuilt after a failure: make a new group")
        self.give_up("called rebuild()")
        before = time.perf_counter()
        has_device = "cuda" in self._backends and torch.cuda.is_available()
        try:
            if has_device and self._backends["cuda"] == "nccl":
                self._device_group._get_backend(torch.device("cuda")).abort()
            generation = self._notices.meet(self.generation + 1, self._timeout_s, self._breakdown.ended())
            left_s = self._timeout_s - (time.perf_counter() - before)
            links = self._connect(generation, left_s) if self._is_gloo(torch.device("cpu")) else None
            if has_device:
                self._device_group = group_of_devices(self._group, self._backends["cuda"], self._timeout_s)
        except RuntimeError as error:
            raise TransportError(
                f"rebuild() failed on rank {self.rank} of {self.size}: {error}. If all ranks are alive, call "
                "rebuild() again on all of them; otherwise start the job again"
            ) from error
        self._drop_links()
        self._begin_generation(generation)
        if links is not None:
            self._keep_links(links)
        self._notices.take_down()

    def close(self) -> None:
        if self.is_closed or self._pid != os.getpid():
            return
        if self._links is not None:
            self.give_up("closed its transport")
        self.is_closed = True
        self._drop_links()

    def _meet_first(self, what: str) -> GlooLinks:
        """Connect to the other ranks, for the first exchange of all."""
        before = time.perf_counter()
        try:
            self._notices.meet(self.generation, self._timeout_s, is_rebuild=False)
            return self._keep_links(self._connect(self.generation, self._timeout_s - (time.perf_counter() - before)))
        except RuntimeError as error:
            if self._breakdown.claim():
                self._breakdown.note(f"could not connect: {error}", error.ranks if isinstance(error, Missed) else ())
            raise TransportError(f"exchange could not be posted ({what}): {self._breakdown.explain()}") from error

    def _connect(self, generation: int, timeout_s: float) -> GlooLinks:
        """Make the gloo connections of a generation to ranks that have met for it."""
        import torch.distributed as dist

        name = f"{self._notices.number}/{generation}"
        store = dist.PrefixStore(name, self._store)
        ranks = dist.get_process_group_ranks(self._group)
        return GlooLinks(store, self.rank, self.size, max(1.0, timeout_s), (name, ranks))

    def _keep_links(self, links: GlooLinks) -> GlooLinks:
        """Make exchanges use these connections from now on, and return them."""
        self._links = links
        self._progress = ProgressThread("gloo-progress")
        # Also runs when the process ends.
        self._end = weakref.finalize(self, end_links, self._pid, self._progress, links, self._breakdown)
        return links

    def _drop_links(self) -> None:
        if self._links is not None:
            self._end()
            self._links = None

    def _is_gloo(self, device: torch.device) -> bool:
        return device.type == "cpu" and self._backends.get("cpu") == "gloo"

    def _post(self, out: Tensor, rows: Tensor, output_splits: list[int], input_splits: list[int], what: str) -> "Work":
        import torch.distributed as dist

        wire_out, wire_rows = as_wire(out.detach()), as_wire(rows.detach())
        try:
            work = dist.all_to_all_single(
                wire_out, wire_rows, output_splits, input_splits, group=self._device_group, async_op=True
            )
        except RuntimeError as error:
            self.give_up(f"could not post an exchange: {error}")
            raise TransportError(f"exchange could not be posted ({what}): {error}") from error
        return work

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise_in_child(self, self._pid)
        if self.is_closed:
            raise TransportError("this ProcessGroupTransport is closed: make a new one")

    def _check_usable(self) -> None:
        self._check_open()
        if self._breakdown.has_happened:
            raise TransportError(
                f"this ProcessGroupTransport is broken on rank {self.rank} of {self.size} since its first failure: "
                f"{self._breakdown.explain()}. Call transport.rebuild() on all ranks, or make one on a new group"
            )


class CollectiveExchange(PendingExchange):
    """An asynchronous all_to_all_single of a backend that only the current stream waits for, and its two tensors."""

    def __init__(self, transport: Transport, work: "Work", rows: Tensor, out: Tensor, what: str) -> None:
        self._transport, self._generation = transport, transport.generation
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
            if self._generation == self._transport.generation:  # otherwise it was rebuilt since
                self._transport.give_up(f"lost an exchange: {error}")
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
