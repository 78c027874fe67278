"""Experts on a CPU's threads: each thread has its own block of pairs, instead of a share of every operation.

Its operands then stay in its core's cache, it never waits for the others inside an operation, and Python prepares one
block while another computes.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

__all__ = ["for_each", "num_workers"]

MOST_WORKERS = 4
"""Workers share the interpreter's lock, so that more of them gain nothing; further threads go to their operations."""

Item = TypeVar("Item")

_starting = threading.Lock()
"""Held while workers start: a thread that starts meanwhile begins with another number of threads than its caller's."""


def num_workers(device: torch.device) -> int:
    """Return how many items for_each works on at a time: as many as the caller's operations have threads, at most 4."""
    return min(MOST_WORKERS, torch.get_num_threads()) if device.type == "cpu" else 1


def for_each(function: Callable[[Item], object], items: Sequence[Item], device: torch.device) -> None:
    """Call `function` on every item, on a CPU several at a time, without gradients; return when all are done.

    What it raises for an item is raised here when the others are done. It is a plain loop on a GPU, where there is one
    thread, and where a mode watches operations (FlopCounterMode), which would see none of another thread.
    """
    count = min(num_workers(device), len(items))
    if count < 2 or torch._C._len_torch_dispatch_stack() > 0:
        for item in items:
            function(item)
        return
    remaining = iter(items)
    is_inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            for item in remaining:
                function(item)

    with _starting:
        workers = _workers(count, torch.get_num_threads() // count)
    futures = [workers.submit(work) for _ in range(count)]
    wait(futures)  # result() raises at once, while other workers still write
    for future in futures:
        future.result()


@cache
def _workers(count: int, threads_each: int) -> ThreadPoolExecutor:
    """Start `count` threads whose operations have threads_each threads.

    set_num_threads() in one thread also sets with how many threads later ones begin; that is put back.
    """
    executor = ThreadPoolExecutor(count, thread_name_prefix="tritonmoe-experts")
    started = threading.Barrier(count)

    def start() -> int:
        default = torch.get_num_threads()
        started.wait()
        # One operation with a team of threads, after which OpenMP counts more threads than there are cores: those that
        # wait for work then sleep soon, instead of spinning for milliseconds on cores that workers need.
        torch.ones(2**20, device="cpu").add_(1)
        torch.set_num_threads(threads_each)
        return default

    defaults = [future.result() for future in [executor.submit(start) for _ in range(count)]]
    restoring = threading.Thread(target=torch.set_num_threads, args=(defaults[0],))
    restoring.start()
    restoring.join()
    return executor


if hasattr(os, "register_at_fork"):  # threads don't survive a fork
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)
    os.register_at_fork(after_in_child=_workers.cache_clear)
