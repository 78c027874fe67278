"""two_batches(): both halves of a batch at once, so that each computes while the other's rows are under way."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tritonmoe.expert_parallel.halves import current_half, run_in_turns
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.transforms import NOT_EXPERT_PARALLEL, is_transformed

__all__ = ["two_batches"]

MIXED = "mixed torch.Tensor and DTensor"
"""What PyTorch says of an operation on parameters of which FSDP2 has gathered some only."""
LET_GO = (
    "two_batches met a parameter that isn't gathered. FSDP2 lets go of a block's parameters when the first half leaves "
    "the block, while the second one is still in it: where a block uses parameters behind its experts, shard it with "
    "fully_shard(block, reshard_after_forward=False), or apart from its experts"
)

Part = TypeVar("Part")
Result = TypeVar("Result")


def two_batches(function: Callable[[Part], Result], *halves: Part) -> tuple[Result, ...]:
    """Return function(half) of both halves of a batch, computed in turns: one while rows of the other are under way.

    The function may be any model's forward, or a part of it, with expert-parallel layers in it. It runs in two
    greenlets that hand over to each other inside these layers, at fixed places; so does the backward of what both give,
    where one backward() goes through both, as that of the sum of two losses. Results and gradients are those of two
    calls. A layer's aux_loss and last_routing are, inside the function, those of the half that reads them, and None
    afterwards.

    Random numbers: the first half goes on with the global generators, the second one has its own, seeded from them.
    Every rank makes the call alike; how large its halves are is its own matter.

    Args:
        function: takes a half, calls the same layers in the same order for both, and changes nothing that the other
            half's call reads.
        halves: two. One alone is just computed.
    Raises:
        ValueError: there are no halves or more than two, or they call different layers.
        RuntimeError: this can't be done inside a half, in the backward of activation checkpointing, under torch.func's
            transforms, in a CUDA graph, or with the layers in a compiled graph or under reentrant checkpointing.
        ImportError: the package greenlet is not installed.
    Example:
        first, second = tm.two_batches(lambda x: model(x).square().sum(), x[:4], x[4:])
        (first + second).backward()
    """
    if not 1 <= len(halves) <= 2:
        raise ValueError(
            f"two_batches takes two halves of a batch, got {len(halves)}: while one half computes, the rows of the "
            "other travel, so a third would hide nothing more"
        )
    if len(halves) == 1:
        return (function(halves[0]),)
    if current_half() is not None:
        raise RuntimeError("two_batches was called inside half a batch: call it once, around the whole model")
    if is_recomputing():
        raise RuntimeError(
            "activation checkpointing around two_batches would run it again in a backward, which it can't do: put "
            "the checkpoints inside the function that two_batches calls"
        )
    if is_transformed():
        raise RuntimeError(NOT_EXPERT_PARALLEL)
    if importlib.util.find_spec("greenlet") is None:
        raise ImportError("two_batches needs the package greenlet: pip install 'tritonmoe[two-batches]'")
    try:
        return run_in_turns([partial(function, half) for half in halves])
    except RuntimeError as error:
        if MIXED in str(error):
            raise RuntimeError(LET_GO) from error
        raise
