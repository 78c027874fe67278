"""save_topk(): activation checkpointing whose recompute sends every token where the forward sent it."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from torch._ops import OpOverload

__all__ = ["save_topk"]


def save_topk() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts in which activation checkpointing keeps every top-k and recomputes everything else.

    A recompute that rounds a score differently would send a near-tie token to other experts than the forward did, and
    its gradients would belong to no forward. The ids are kept, 8 bytes each. A recompute looks the scores up at these
    ids, in tensors of its own: transformers divides them by their sum in place. Compiled code keeps all that a router's
    kernels give. For users:

        save_topk = tritonmoe.routing.save_topk
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=save_topk)
    """
    if torch.compiler.is_compiling():  # tracers know torch's own contexts only; nothing is in place in a graph
        return create_selective_checkpoint_contexts([torch.ops.aten.topk.default, torch.ops.tritonmoe.route.default])
    kept: list[Tensor] = []
    return _KeepTopK(kept), _ReuseTopK(kept)


class _KeepTopK(TorchDispatchMode):
    """Keep the ids of every top-k of a forward."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(
        self,
        func: "OpOverload",
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            self.kept.append(result[1].clone())
        return result


class _ReuseTopK(TorchDispatchMode):
    """In a recompute of that forward, answer every top-k with the kept ids and the new scores at them."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> "_ReuseTopK":
        self.position = 0  # a second backward recomputes from the start again
        return super().__enter__()

    def __torch_dispatch__(
        self,
        func: "OpOverload",
        types: object,
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.topk.default:
            return func(*args, **kwargs)
        if self.position == len(self.kept):
            raise RuntimeError(
                f"the recompute calls torch.topk more often than the forward did ({len(self.kept)} times): a function "
                "under activation checkpointing must make the same calls each time"
            )
        ids = self.kept[self.position]
        self.position += 1
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return args[0].gather(dim, ids), ids.clone()
