"""EmulatedWorld: what emulated ranks share, their exchanges, ports, faults and ends; EmulatedTransport: one of them.

Exchanges are matched by number: the s-th one of a rank belongs to the s-th one of every other rank. Only wait() ever
waits for a peer.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tritonmoe.errors import PeerFailure, TransportError
from tritonmoe.transports.base import PendingExchange, Transport
from tritonmoe.transports.emulated.delivery import Delivery, EmulatedExchange
from tritonmoe.transports.emulated.faults import Death, Delay, FaultScript
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.exchange_arguments import as_counts, check_counts, check_exchange, raise_in_child
from tritonmoe.transports.waiting import LongWait, wait_aloud

__all__ = ["EmulatedTransport", "EmulatedWorld"]


class EmulatedWorld:
    """What the ranks share: their exchanges, their ports and the thread that delivers.

    Args:
        num_ranks: W, at least 1.
        device: where the rows live; count exchanges and other CPU rows work in every world.
        link: None delivers as fast as the copies go.
        faults: Delay and Death, at most one of a kind for a rank and exchange.
        timeout_s: how long wait() waits before it raises TransportError.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        device: torch.device | str = "cpu",
        link: LinkModel | None = None,
        faults: Sequence[Delay | Death] = (),
        timeout_s: float = 30.0,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f'ranks are emulated on "cpu" or "cuda", got "{self.device}"')
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f'device="{self.device}" needs a CUDA device and there is none: use device="cpu"')
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self.lock = threading.Lock()
        self.transports = [EmulatedTransport(self, rank) for rank in range(num_ranks)]
        self._faults = FaultScript(faults, num_ranks)
        self._num_posted = [0] * num_ranks
        self.delivery = Delivery(num_ranks, self.device, link, self.lock)
        self._posted: dict[int, list[EmulatedExchange]] = {}  # by number; goes when every rank is in it
        self._ended: dict[int, str | None] = {}  # what the rank raised, if it did; in the order of their ends
        self._given_up: dict[int, str] = {}  # what the rank did, in this generation
        self._wants_rebuild: set[int] = set()
        self._has_met = threading.Condition(self.lock)
        self.pid = os.getpid()
        self._closed_because: str | None = None
        self._is_closed = threading.Event()

    @property
    def link(self) -> LinkModel | None:
        """What exchanges posted from now on travel over."""
        return self.delivery.link

    def set_link(self, link: LinkModel | None) -> None:
        """Put exchanges from now on over another link; what is under way goes on."""
        with self.lock:
            self.delivery.link = link

    def act_out_faults(self, rank: int) -> None:
        """Hold up or stop the calling rank if its next exchange is to fail."""
        number = self._num_posted[rank]
        death = self._faults.death(rank, number)
        if death is not None:
            self.end_rank(rank, death)
            raise death
        delay_s = self._faults.delay_s(rank, number)
        if delay_s is not None:
            self._is_closed.wait(delay_s)

    def faults_that_never_happened(self) -> list[str]:
        """Return which faults never happened, and why."""
        return self._faults.never_happened(self._num_posted)

    def post(self, exchange: EmulatedExchange) -> None:
        """Number an exchange and pair it with those that its peers have posted."""
        with self.lock:
            self._post(exchange)  # what it holds of the peers' exchanges is gone when they go on

    def wait(self, exchange: EmulatedExchange) -> None:
        """Block until the exchange is complete; raise TransportError when it can't be, or takes too long."""
        with self.lock:
            is_over = functools.partial(
                exchange.has_changed.wait_for,
                lambda: exchange.finished is not None or exchange.failure is not None or self._closed_because,
            )
            whom = functools.partial(self._whom, exchange)
            wait_aloud(is_over, self._long_wait(exchange.rank, whom, exchange.words), self.timeout_s)
            if exchange.finished is not None:
                return
            error = self._error_of(exchange)
            self._give_up(exchange.rank, f"gave up: {error}")
            raise error

    def give_up(self, rank: int, what: str) -> None:
        """Fail the exchanges that wait for a rank until all ranks have come to rebuild(). The first call counts."""
        with self.lock:
            self._give_up(rank, what)

    def rebuild(self, rank: int) -> None:
        """Wait until all ranks are here, then forget the exchanges of this generation."""
        with self.lock:
            if self._closed_because is not None:
                raise TransportError(f"rebuild() on closed emulated ranks: {self._closed_because}")
            self._give_up(rank, "called rebuild()")
            generation = self.transports[rank].generation
            self._wants_rebuild.add(rank)
            if len(self._wants_rebuild) == self.num_ranks:
                self._begin_generation()
            self._has_met.notify_all()
            transport = self.transports[rank]
            is_over = functools.partial(
                self._has_met.wait_for,
                lambda: transport.generation > generation or self._ended or self._closed_because,
            )
            wait_aloud(is_over, self._long_wait(rank, lambda: f"ranks {self._absent()}", "rebuild()"), self.timeout_s)
            if transport.generation > generation:
                return
            self._wants_rebuild.discard(rank)
            said = f"rebuild() failed on rank {rank} of {self.num_ranks}"
            if self._ended:
                raise PeerFailure(f"{said}: {' and '.join(map(self._end_of, self._ended))}")
            if self._closed_because is not None:
                raise TransportError(f"{said}: {self._closed_because}")
            absent = [peer for peer in self._absent() if peer != rank]
            raise TransportError(
                f"{said}: ranks {absent} did not come within timeout_s = {self.timeout_s}. Call it again on all ranks"
            )

    def end_rank(self, rank: int, error: BaseException | None) -> None:
        """Note that a rank posts no more, and fail the exchanges that wait for it. The first call counts."""
        with self.lock:
            if rank in self._ended:
                return
            # Words only: the error's traceback holds the rank's tensors, and this world.
            self._ended[rank] = None if error is None else f"{type(error).__name__}: {error}"
            for exchange in list(self.delivery.unfinished):
                self._fail_if_waiting_for(exchange, rank)
            self._has_met.notify_all()
            all_have_ended = len(self._ended) == self.num_ranks
        if all_have_ended:
            self.close("all ranks have ended")

    def close(self, reason: str = "the emulated ranks were closed") -> None:
        """End the delivery; exchanges under way and later ones raise TransportError."""
        with self.lock:
            if self._closed_because is None:
                self._closed_because = reason
            self._is_closed.set()
            self._posted.clear()
            self.delivery.close()
            self._has_met.notify_all()
        self.delivery.join()

    # The methods below are called with the lock held.

    def _post(self, exchange: EmulatedExchange) -> None:
        rank = exchange.rank
        if self._closed_because is not None:
            raise TransportError(f"exchange on closed emulated ranks: {self._closed_because} ({exchange.words})")
        if rank in self._ended:
            raise TransportError(f"exchange on a rank that has ended ({exchange.words})")
        if rank in self._given_up:
            raise TransportError(
                f"this EmulatedTransport is broken since its first failure: rank {rank} {self._given_up[rank]}. "
                f"Call transport.rebuild() on all ranks ({exchange.words})"
            )
        exchange.number = number = self._num_posted[rank]
        self._num_posted[rank] += 1
        self.delivery.post(exchange)
        peers = self._posted.setdefault(number, [])
        for peer in peers:
            self._pair(exchange, peer)
        peers.append(exchange)
        if len(peers) == self.num_ranks:
            del self._posted[number]
        for stopped_rank in (*self._ended, *self._given_up):
            self._fail_if_waiting_for(exchange, stopped_rank)
        exchange.finish_if_complete()

    def _long_wait(self, rank: int, whom: Callable[[], str], what: str) -> LongWait:
        return LongWait(f"rank {rank} of {self.num_ranks}", whom, what, self.timeout_s)

    def _whom(self, exchange: EmulatedExchange) -> str:
        absent = [rank for rank in exchange.incoming if self._num_posted[rank] <= exchange.number]
        return f"ranks {absent or sorted({*exchange.incoming, *exchange.outgoing})}"

    def _absent(self) -> list[int]:
        """Return the ranks that have not called rebuild()."""
        return [rank for rank in range(self.num_ranks) if rank not in self._wants_rebuild]

    def _error_of(self, exchange: EmulatedExchange) -> TransportError:
        """Return the error of an exchange that is not complete."""
        if exchange.failure is not None:
            return type(exchange.failure)(*exchange.failure.args)
        if self._closed_because is not None:
            return TransportError(f"exchange {exchange.number} was cut off: {self._closed_because} ({exchange.words})")
        absent = [rank for rank in exchange.incoming if self._num_posted[rank] <= exchange.number]
        if absent:
            reason = f"has not heard from ranks {absent}"
        else:
            under_way = sorted({*exchange.incoming, *exchange.outgoing})
            reason = f"still has rows under way from or to ranks {under_way}: give a longer timeout_s"
        return TransportError(
            f"exchange {exchange.number} took longer than timeout_s = {self.timeout_s}: "
            f"rank {exchange.rank} {reason} ({exchange.words})"
        )

    def _give_up(self, rank: int, what: str) -> None:
        if rank in self._given_up or self.num_ranks == 1:
            return
        self._given_up[rank] = what
        for exchange in list(self.delivery.unfinished):
            self._fail_if_waiting_for(exchange, rank)

    def _begin_generation(self) -> None:
        for exchange in list(self.delivery.unfinished):
            exchange.fail(TransportError(f"exchange {exchange.number} was dropped by rebuild() ({exchange.words})"))
        self._posted.clear()
        self._given_up.clear()
        self._wants_rebuild.clear()
        self._num_posted = [max(self._num_posted)] * self.num_ranks
        for transport in self.transports:
            transport.generation += 1

    def _end_of(self, rank: int) -> str:
        error = self._ended[rank]
        return f"rank {rank} returned or closed" if error is None else f"rank {rank} failed with {error}"

    def _pair(self, one: EmulatedExchange, other: EmulatedExchange) -> None:
        """Send the two messages between two ranks on their way, or fail both ranks where they disagree."""
        where = f"exchange {one.number}"
        if one.format != other.format:
            disagreement = f"{where}: rank {one.rank} made {one.format}, rank {other.rank} made {other.format}"
        else:
            disagreement = " and ".join(
                f"rank {sender.rank} sends {sender.input_splits[receiver.rank]} rows to rank {receiver.rank}, "
                f"which expects {receiver.output_splits[sender.rank]}"
                for sender, receiver in ((one, other), (other, one))
                if sender.input_splits[receiver.rank] != receiver.output_splits[sender.rank]
            )
            disagreement = disagreement and f"{where}: {disagreement}"
        if disagreement:
            for exchange in (one, other):
                exchange.fail(TransportError(f"{disagreement} ({exchange.words})"))
            return
        self.delivery.connect(one, other)

    def _fail_if_waiting_for(self, exchange: EmulatedExchange, rank: int) -> None:
        if rank == exchange.rank or self._num_posted[rank] > exchange.number:
            return
        where = f"exchange {exchange.number}"
        if rank in self._given_up:  # the first that it did
            failure: TransportError = PeerFailure(f"{where}: rank {rank} {self._given_up[rank]} ({exchange.words})")
        elif self._ended[rank] is None:
            failure = TransportError(
                f"{where}: rank {rank} returned or closed after {self._num_posted[rank]} exchanges, "
                f"but every rank must make the same ones ({exchange.words})"
            )
        else:
            failure = PeerFailure(f"{where}: {self._end_of(rank)} ({exchange.words})")
        exchange.fail(failure)


class PendingEmulatedExchange(PendingExchange):
    """An exchange that a rank has posted."""

    def __init__(self, world: EmulatedWorld, posted: EmulatedExchange, out: Tensor) -> None:
        self.posted = posted
        self._world, self._out = world, out

    def wait(self) -> Tensor:
        self._world.wait(self.posted)
        if self._out.is_cuda:
            stream = torch.cuda.current_stream(self._out.device)
            for event in self.posted.copied:
                stream.wait_event(event)
        return self._out

    def finished_at(self) -> float | None:
        # On CUDA the host knows only when the copies were enqueued.
        return None if self._out.is_cuda else self.posted.finished

    def arrivals(self) -> tuple[float | None, ...] | None:
        return None if self._out.is_cuda else tuple(map(self.posted.arrived.get, range(self._world.num_ranks)))


class EmulatedTransport(Transport):
    """One rank of an EmulatedWorld; run_on_emulated_ranks() makes one for each thread.

    It may be used by one thread at a time. On CUDA all ranks share the device, each on a stream of its own: wait()
    blocks the host until the peers have posted and the modelled time is over, then orders the current stream. Under a
    link model that time starts when the device has computed the rows, and exchanges take their turn as posted.
    """

    def __init__(self, world: EmulatedWorld, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.size = world.num_ranks

    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        return self._exchange("exchange", rows, input_splits, output_splits, out)

    def post_counts(self, counts: Tensor) -> PendingExchange:
        check_counts(self, counts)
        ones = [1] * self.size
        return self._exchange("exchange_counts", counts.contiguous(), ones, ones, None)

    def give_up(self, what: str) -> None:
        self.world.give_up(self.rank, what)

    def rebuild(self) -> None:
        """Meet the other ranks, as Transport.rebuild() says; exchanges of faults are counted from the largest number.

        A rank that has ended can't come any more.
        """
        self._check_process()
        self.world.rebuild(self.rank)

    def close(self) -> None:
        """Note that this rank makes no further exchanges; the last rank to do so ends the world."""
        self.world.end_rank(self.rank, None)

    def _exchange(
        self,
        call: str,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None,
    ) -> PendingEmulatedExchange:
        self._check_process()
        input_splits, output_splits = as_counts(input_splits), as_counts(output_splits)
        out = check_exchange(self, rows, input_splits, output_splits, out)
        if rows.is_cuda and rows.device != self.world.device:
            raise ValueError(
                f"rows are on {rows.device}, but these ranks were made for {self.world.device}: "
                f'run_on_emulated_ranks(..., device="{rows.device}")'
            )
        self.world.act_out_faults(self.rank)
        with torch.no_grad():
            posted = EmulatedExchange(self.world.delivery, self, call, rows, input_splits, output_splits, out)
        self.world.post(posted)
        return PendingEmulatedExchange(self.world, posted, out)

    def _check_process(self) -> None:
        if self.world.pid != os.getpid():
            raise_in_child(self, self.world.pid)
