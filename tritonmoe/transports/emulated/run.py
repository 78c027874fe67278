"""run_on_emulated_ranks: the same function on N ranks, as threads of one process, on one GPU or on a CPU."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch

from tritonmoe.config.layer import is_integer
from tritonmoe.errors import TransportError
from tritonmoe.transports.base import Transport
from tritonmoe.transports.emulated.faults import Death, Delay, PeerFailure, RankStopped
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
        faults: Delay and Death.
        timeout_s: how long a rank waits for an exchange before it raises TransportError. Code between exchanges has
            no limit: the call returns when every rank's thread has ended.
    Raises:
        Exception: what a rank raised, the same object, with an attribute `emulated_rank` and a note; where several
            ranks did, the first that was not the consequence of another's failure.
        TransportError: an exchange failed, ranks disagreed, a rank returned early, or was stopped by a Death.
    Example:
        run_on_emulated_ranks(lambda transport: transport.rank, num_ranks=3) gives [0, 1, 2].
    """
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
    world = EmulatedWorld(num_ranks, device=device, link=link, faults=faults, timeout_s=timeout_s)
    results: dict[int, Result] = {}
    errors: list[tuple[int, BaseException]] = []  # in the order in which they were raised
    enter_caller_state = _capture_caller_state(world.device)
    num_threads = torch.get_num_threads()
    streams: list[torch.cuda.Stream] = []
    if world.device.type == "cuda":
        streams = [torch.cuda.Stream(world.device) for _ in range(num_ranks)]

    def run_rank(rank: int) -> None:
        try:
            with ExitStack() as stack:
                torch.set_num_threads(max(1, num_threads // num_ranks))
                if streams:
                    stack.enter_context(torch.cuda.stream(streams[rank]))
                enter_caller_state(stack)
                results[rank] = fn(world.transports[rank])
        except BaseException as error:
            errors.append((rank, error))
            world.end_rank(rank, error)
        else:
            world.end_rank(rank, None)
        finally:
            ended[rank].set()

    # Not Thread.join(): where Ctrl-C interrupts it, Python before 3.13 takes the thread for ended.
    ended = [threading.Event() for _ in range(num_ranks)]
    threads = [
        threading.Thread(target=run_rank, args=(rank,), name=f"emulated-rank-{rank}", daemon=True)
        for rank in range(num_ranks)
    ]
    try:
        if streams:
            caller_stream = torch.cuda.current_stream(world.device)
            for stream in streams:
                stream.wait_stream(caller_stream)
        for thread in threads:
            thread.start()
        for event in ended:
            event.wait()
    except BaseException as interruption:
        world.close(f"the caller was interrupted by {type(interruption).__name__}")
        deadline = time.perf_counter() + SECONDS_TO_STOP
        for thread, event in zip(threads, ended, strict=True):
            if thread.ident is not None:
                event.wait(max(0.0, deadline - time.perf_counter()))
        raise
    finally:
        world.close()
        # The setting is the process's, not the thread's: what the ranks set is the caller's now.
        torch.set_num_threads(num_threads)
        for stream in streams:
            torch.cuda.current_stream(world.device).wait_stream(stream)
    if errors:
        _raise_first_cause(errors, num_ranks)
    return [results[rank] for rank in range(num_ranks)]


def _capture_caller_state(device: torch.device) -> Callable[[ExitStack], None]:
    """Give a function that puts the calling thread into the state that this thread has now."""
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
    """Say whether another rank's failure stands anywhere in the chain that led to this error."""
    while error is not None:
        if isinstance(error, PeerFailure):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
