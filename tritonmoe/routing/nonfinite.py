"""NonFiniteCheck: raises for tokens whose router scores are NaN or infinite, in their call or in the next one.

It is for one device. Over ranks the count exchange does the same, always in the call itself.
"""

from typing import Literal

import torch
from torch import Tensor

from tritonmoe.errors import NonFiniteScores
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.runtime.transforms import below_transforms, unwrapped

__all__ = ["NonFiniteCheck"]

WHERE_TO_LOOK = "(those tokens went to no expert): look for an overflow in the activations before the router"


@torch.library.custom_op("tritonmoe::check_scores", mutates_args=())
def _check_scores(topk_ids: Tensor, num_nonfinite_rows: Tensor) -> Tensor:
    """Return a copy of topk_ids, on which what follows depends, or raise NonFiniteScores. Waits for the device."""
    _raise_now(num_nonfinite_rows)
    return topk_ids.clone()


@_check_scores.register_fake
def _checked_shape(topk_ids: Tensor, num_nonfinite_rows: Tensor) -> Tensor:
    return torch.empty_like(topk_ids)


def _raise_now(num_nonfinite_rows: Tensor) -> None:
    if is_captured(num_nonfinite_rows.device):
        raise ValueError(
            "check='now' reads the router's flag on the host, which a CUDA graph can't capture: use check='next'"
        )
    count = int(num_nonfinite_rows)
    if count:
        raise NonFiniteScores(f"router scores of {count} tokens are NaN or infinite {WHERE_TO_LOOK}")


class NonFiniteCheck:
    """Looks at the router's count of skipped tokens, without waiting for the device unless asked to.

    Args:
        when: "next": the count is copied to the host, and the next eager call reads it; a call inside compiled code
            neither copies nor reads. "now": this call waits for the router and raises, in compiled code too.
    """

    def __init__(self, when: Literal["next", "now"]) -> None:
        if when not in ("next", "now"):
            raise ValueError(f"check must be 'next' or 'now', got {when!r}")
        self.when = when
        self._counters: dict[torch.device, _Counter] = {}  # of several where DataParallel copies the layer

    def __getstate__(self) -> dict[str, object]:
        return {"when": self.when, "_counters": {}}

    def raise_earlier(self) -> None:
        """Raise NonFiniteScores if an earlier call had such tokens and nobody has heard of it."""
        if torch.compiler.is_compiling() or is_recomputing():
            return
        count = sum(counter.unheard() for counter in list(self._counters.values()))
        if count > 0:
            raise NonFiniteScores(
                f"router scores of {count} tokens were NaN or infinite in an earlier forward of this layer "
                f"{WHERE_TO_LOOK}. check='now' raises in the forward itself"
            )

    def look(self, topk_ids: Tensor, num_nonfinite_rows: Tensor) -> Tensor:
        """Return topk_ids, to go on with; raises NonFiniteScores now, or remembers the count for raise_earlier()."""
        if self.when == "now" and (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0):
            return _check_scores(topk_ids, num_nonfinite_rows)
        if torch.compiler.is_compiling():
            return topk_ids
        count = unwrapped(num_nonfinite_rows)
        if count.is_meta or type(count) is not Tensor:  # has no value
            return topk_ids
        if self.when == "now":
            _raise_now(count)
        elif not is_recomputing():  # which would count the forward's tokens again
            with below_transforms():
                counter = self._counters.get(count.device) or self._counters.setdefault(count.device, _Counter(count))
                counter.add(count)
        return topk_ids


class _Counter:
    """Adds counts up on their device, and tells the host what is new of the sum, without waiting for the device.

    The host may read late, when counts of several calls have come: a sum holds them all.
    """

    def __init__(self, like: Tensor) -> None:
        # Made in inference mode, they could not be written outside of it.
        with torch.inference_mode(False):
            self.total = torch.zeros((), dtype=like.dtype, device=like.device)
            self._on_host = torch.zeros((), dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
        self._heard = 0

    def add(self, count: Tensor) -> None:
        self.total.add_(count)
        self._on_host.copy_(self.total, non_blocking=True)

    def unheard(self) -> int:
        """Return what has come to the host since the last time."""
        sum_so_far = int(self._on_host)
        new, self._heard = sum_so_far - self._heard, sum_so_far
        return new
