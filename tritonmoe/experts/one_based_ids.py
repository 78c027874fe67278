"""A warning, once, where the first calls with so many experts look as if ids were counted from 1."""

import logging

import torch
from torch import Tensor

from tritonmoe.runtime.host_device import is_captured

__all__ = ["warn_of_one_based_ids"]

log = logging.getLogger(__name__)
PAIRS_PER_EXPERT = 3
"""Ids in [1, E) that must have come, for each expert, before it is strange that 0 has not."""
MAX_CALLS = 64
UNKNOWN = -1
_settled: set[int] = set()
_watched: dict[int, "_Watched"] = {}


class _Watched:
    """What the calls with E experts had so far, counted on their device and read on the host without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.counts = torch.zeros(3, dtype=torch.int64, device=device)
            """Ids below 1 or above E, ids equal to E, and ids between."""
            self.on_host = torch.full((3,), UNKNOWN, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.num_calls = 0


def warn_of_one_based_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Count the ids (T, K) of a call, until it is known whether the first ones run from 1 to E; then warn, if they do.

    Ids outside [0, E) are skipped pairs, which callers make on purpose: -1, E or any other number as a mark, experts of
    other ranks. So it is a sign of a mistake only where all ids lie in [1, E], E among them, and so many that 0 should
    have come. On a GPU a later call says it, so that none waits for the device.
    """
    if num_experts in _settled or torch.compiler.is_compiling():
        return
    if type(topk_ids) is not Tensor or torch._C._len_torch_dispatch_stack() > 0 or is_captured(topk_ids.device):
        return
    if topk_ids.is_meta or torch._C._are_functorch_transforms_active():
        return
    watched = _watched.get(num_experts)
    if watched is None:
        watched = _watched[num_experts] = _Watched(topk_ids.device)
    if watched.num_calls and _is_known(watched, num_experts):
        return
    if watched.counts.device != topk_ids.device:
        return
    is_last = topk_ids == num_experts
    is_between = (topk_ids > 0) & (topk_ids < num_experts)
    counts = torch.stack([(~(is_last | is_between)).sum(), is_last.sum(), is_between.sum()])
    watched.counts = watched.counts + counts
    watched.on_host.copy_(watched.counts, non_blocking=True)
    watched.num_calls += 1
    if not topk_ids.is_cuda:
        _is_known(watched, num_experts)


def _is_known(watched: _Watched, num_experts: int) -> bool:
    """Return whether nothing more needs to be counted, and warn if ids run from 1 to E."""
    num_others, num_last, num_between = watched.on_host.tolist()
    if num_others == UNKNOWN:
        return False
    is_suspicious = num_others == 0 and num_last > 0 and num_between >= PAIRS_PER_EXPERT * num_experts
    if not is_suspicious and num_others == 0 and watched.num_calls < MAX_CALLS:
        return False
    is_suspicious = is_suspicious and num_experts not in _settled  # by another thread, an emulated rank
    _settled.add(num_experts)
    _watched.pop(num_experts, None)
    if is_suspicious:
        log.warning(
            "the first %d topk_ids of calls with E = %d experts lie in [1, %d], and none is 0: are they counted "
            "from 1? Experts are 0 to %d, and the %d pairs with id %d were skipped. Subtract 1; or mark pairs that are "
            "to be skipped with -1. (This is said once)",
            num_last + num_between,
            num_experts,
            num_experts,
            num_experts - 1,
            num_last,
            num_experts,
        )
    return True
