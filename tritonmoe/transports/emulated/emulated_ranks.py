"""run_on_emulated_ranks: the same function on N ranks, as threads of one process, on one GPU or on a CPU."""

import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Generic, TypeVar

import torch

from tritonmoe.config.numbers import is_integer
from tritonmoe.errors import PeerFailure, TransportError
from tritonmoe.transports.base import Transport
from tritonmoe.transports.emulated.faults import Death, Delay, RankStopped
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.emulated.world import EmulatedWorld

__all__ = ["run_on_emulated_ranks"]

Result = TypeVar("Result")

SECONDS_TO_STOP = 1.0
"""How long an interrupted caller waits for the ranks' threads; one that is busy in its own code can't be stopped."""


def run_on_emulated_ranks(
    fn: Callable[[Transport], Result],
    num_ranks: int,
    *,
    device: torch.device | str = "cpu",
    link: LinkModel | None = None,
    faults: Sequence[Delay | Death] = (),
    timeout_s: float = 30.0,
) -> list[Result]:
    """Run fn(transport) once per rank, each in a thread of its own, and give what the ranks returned, in rank order.

    The threads have the caller's grad mode, inference mode and autocast state (the default dtype is the process's
    own), a share of the caller's torch.get_num_threads(), and on CUDA a stream each, ordered behind the caller's
    before and ahead of it after. Backward runs in the rank's own thread. The global random generators are shared by
    all threads: draw from a torch.Generator per rank, or draw before the ranks start.

    Args:
        fn: called with the rank's transport; all ranks must make the same exchanges in the same order.
        num_ranks: W, at least 1.
        device: "cpu", or one CUDA device that all ranks share.
        link: how long rows travel; None is as fast as memory.
        faults: Delay and Death; one that never happens is a warning at the end, unless a Death did.
        timeout_s: how long a rank waits for an exchange before it raises TransportError. Code between exchanges has
            no limit: the call returns when every rank's thread has ended.
    Raises:
        Exception: what a rank raised, the same object, with an attribute `emulated_rank` and a note; where several
            ranks did, the first that was not the consequence of another's failure.
        TransportError: an exchange failed, ranks disagreed, a rank returned early, or was stopped by a Death.
    Example:
        run_on_emulated_ranks(lambda transport: transport.rank, num_ranks=3) gives [0, 1, 2].
    """
    _check_arguments(fn, num_ranks, link, faults, timeout_s)
    world = EmulatedWorld(num_ranks, device=device, link=link, faults=faults, timeout_s=timeout_s)
    return _RankThreads(fn, world).run()


def _check_arguments(fn: object, num_ranks: object, link: object, faults: object, timeout_s: object) -> None:
    """Raise TypeError for what run_on_emulated_ranks can't take; the world checks the values."""
    if not is_integer(num_ranks):
        raise TypeError(f"num_ranks must be a whole number, got {num_ranks!r}")
    if not callable(fn):
        raise TypeError(f"fn must be a function of a transport, got {fn!r}")
    if link is not None and not isinstance(link, LinkModel):
        raise TypeError(
            f"link must be a LinkModel or None, got {link!r}: use LinkModel(bandwidth_gb_per_s={link!r}), say"
        )
    if not isinstance(faults, Sequence):
        raise TypeError(f"faults must be a list of Delay and Death, got {faults!r}")
    if not isinstance(timeout_s, (int, float)):
        raise TypeError(f"timeout_s must be a number of seconds, got {timeout_s!r}")


class _RankThreads(Generic[Result]):
    """The threads of all ranks of a world, which run one function in the caller's state."""

    def __init__(self, fn: Callable[[Transport], Result], world: EmulatedWorld) -> None:
        self._fn, self._world = fn, world
        self._results: dict[int, Result] = {}
        self._errors: list[tuple[int, BaseException]] = []  # in the order in which they were raised
        self._enter_caller_state = _capture_caller_state(world.device)
        self._num_threads = torch.get_num_threads()
        self._streams: list[torch.cuda.Stream] = []
        if world.device.type == "cuda":
            self._streams = [torch.cuda.Stream(world.device) for _ in range(world.num_ranks)]
        # Not Thread.join(): where Ctrl-C interrupts it, Python before 3.13 takes the thread for ended.
        self._ended = [threading.Event() for _ in range(world.num_ranks)]

    def run(self) -> list[Result]:
        """Run all ranks and give what they returned, or raise the first cause of what they raised."""
        ranks = range(self._world.num_ranks)
        threads = [
            threading.Thread(target=self._run_rank, args=(rank,), name=f"emulated-rank-{rank}", daemon=True)
            for rank in ranks
        ]
        try:
            if self._streams:
                caller_stream = torch.cuda.current_stream(self._world.device)
                for stream in self._streams:
                    stream.wait_stream(caller_stream)
            for thread in threads:
                thread.start()
            for event in self._ended:
                event.wait()
        except BaseException as interruption:
            self._world.close(f"the caller was interrupted by {type(interruption).__name__}")
            deadline = time.perf_counter() + SECONDS_TO_STOP
            for thread, event in zip(threads, self._ended, strict=True):
                if thread.ident is not None:
                    event.wait(max(0.0, deadline - time.perf_counter()))
            raise
        finally:
            self._world.close()
            for thread, event in zip(threads, self._ended, strict=True):
                if event.is_set():  # all that is left is Python's own end of the thread
                    thread.join()
            # The setting is the process's, not the thread's: what the ranks set is the caller's now.
            torch.set_num_threads(self._num_threads)
            for stream in self._streams:
                torch.cuda.current_stream(self._world.device).wait_stream(stream)
        if self._errors:
            _raise_first_cause(self._errors, self._world.num_ranks)
        for words in self._world.faults_that_never_happened():
            warnings.warn(f"{words}; give a fault an exchange that its rank makes", stacklevel=3)
        return [self._results[rank] for rank in ranks]

    def _run_rank(self, rank: int) -> None:
        """Run the function as one rank, in that rank's own thread."""
        world = self._world
        try:
            with ExitStack() as stack:
                torch.set_num_threads(max(1, self._num_threads // world.num_ranks))
                if self._streams:
                    stack.enter_context(torch.cuda.stream(self._streams[rank]))
                self._enter_caller_state(stack)
                self._results[rank] = self._fn(world.transports[rank])
        except BaseException as error:
            self._errors.append((rank, error))
            world.end_rank(rank, error)
        else:
            world.end_rank(rank, None)
        finally:
            self._ended[rank].set()


def _capture_caller_state(device: torch.device) -> Callable[[ExitStack], None]:
    """Return a function that puts the calling thread into the state that this thread has now."""
    is_inference = torch.is_inference_mode_enabled()
    is_grad_enabled = torch.is_grad_enabled()
    is_cache_enabled = torch.is_autocast_cache_enabled()
    autocast = {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}
    }

    def enter(stack: ExitStack) -> None:
        # With torch's own backward threads, one rank that blocks in backward would hold up all the others.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if is_inference:
            stack.enter_context(torch.inference_mode())
        else:
            stack.enter_context(torch.set_grad_enabled(is_grad_enabled))
        for kind, (is_enabled, dtype) in autocast.items():
            stack.enter_context(torch.autocast(kind, dtype, enabled=is_enabled, cache_enabled=is_cache_enabled))

    return enter


def _raise_first_cause(errors: list[tuple[int, BaseException]], num_ranks: int) -> None:
    rank, error = next(((rank, error) for rank, error in errors if not _is_consequence(error)), errors[0])
    errors.clear()  # their tracebacks lead back to this list
    if isinstance(error, RankStopped):
        error = TransportError(str(error))
    error.emulated_rank = rank  # type: ignore[attr-defined]
    note = f"on emulated rank {rank} of {num_ranks}"
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
    raise error


def _is_consequence(error: BaseException | None) -> bool:
    """Return whether another rank's failure stands anywhere in the chain that led to this error."""
    while error is not None:
        if isinstance(error, PeerFailure):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
