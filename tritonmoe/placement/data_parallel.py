"""Sharded parameters under DistributedDataParallel, which has to be told to leave them alone."""

import contextlib
import functools
import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tritonmoe.placement.expert_shards import sharded_modules, warn_of_sums
from tritonmoe.placement.marks import MARK, OWN_BUFFERS, own_buffers
from tritonmoe.routing import TopKRouter
from tritonmoe.runtime.wrappers import refuse_computed
from tritonmoe.transports import Ranks, as_transport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "counts_by_wrapper",
    "ignore_sharded_parameters",
    "is_averaged_by_ddp",
    "mark_own_buffers",
    "name_ignored",
]

OF_NOBODY = "_tritonmoe_of_nobody"
_averaged: "WeakKeyDictionary[DistributedDataParallel, frozenset[int]]" = WeakKeyDictionary()
"""The id() of each parameter that a living one averages, which keeps it; a weakref to a parameter forbids its swap."""
_averaged_lock = threading.Lock()


class SumOverRanks:
    """Sums a tensor over ranks, in place, and gives it back.

    A copy of what has it shares it; a file keeps None, since whoever reads it may have other ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._transport = as_transport(ranks)

    def __call__(self, tensor: Tensor) -> Tensor:
        return self._transport.all_reduce(tensor)

    def __deepcopy__(self, memo: dict) -> "SumOverRanks":
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def _nothing() -> None:
    """Stand for a SumOverRanks in a file."""


def mark_own_buffers(module: nn.Module, names: tuple[str, ...]) -> None:
    """Mark these buffers of the module itself as others on every rank, which are to stay so."""
    setattr(module, OWN_BUFFERS, names)
    ignore_sharded_parameters()


def ignore_sharded_parameters() -> None:
    """Make DistributedDataParallel neither broadcast nor average marked parameters, from now on.

    It reads the names to ignore from the module that it is given, which knows nothing of marks inside it. Its join()
    is refused where a rank without batches would leave the others waiting for its experts.
    """
    from torch.distributed.algorithms.join import Join, Joinable
    from torch.nn.parallel import DistributedDataParallel

    original: Callable[..., None] = DistributedDataParallel.__init__
    if hasattr(original, MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: DistributedDataParallel, *arguments: object, **keywords: object) -> None:
        given = signature.bind(self, *arguments, **keywords).arguments
        module, group, mesh = given["module"], given.get("process_group"), given.get("device_mesh")
        name_ignored(module, group, mesh)
        if given.get("mixed_precision") is not None and _averages_nothing(module):
            raise ValueError(
                "all trained parameters of this module are experts, of which every rank has others, so "
                "DistributedDataParallel averages nothing; but its mixed_precision restores parameters only when it "
                "averages: leave mixed_precision out, and run the model under torch.autocast"
            )
        with _something_to_average(module):
            original(self, *arguments, **keywords)
        _note_averaged(self)
        _count_over(module, self.process_group if mesh is None else mesh)

    set_state: Callable[..., None] = DistributedDataParallel.__setstate__

    @functools.wraps(set_state)
    def restore(self: DistributedDataParallel, state: dict[str, Any]) -> None:
        with _something_to_average(state["_modules"]["module"]):
            set_state(self, state)
        _note_averaged(self)
        _count_over(self.module, self.process_group)

    make_join: Callable[..., None] = Join.__init__

    @functools.wraps(make_join)
    def init_join(
        self: Join,
        joinables: list[Joinable],
        enable: bool = True,
        throw_on_early_termination: bool = False,
        **keywords: object,
    ) -> None:
        if enable and not throw_on_early_termination:
            for joined in joinables:
                if isinstance(joined, nn.Module):
                    _refuse_uneven(joined)
        make_join(self, joinables, enable, throw_on_early_termination, **keywords)

    setattr(init, MARK, True)
    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]  # docs/patches.md
    DistributedDataParallel.__setstate__ = restore  # type: ignore[method-assign]  # docs/patches.md
    Join.__init__ = init_join  # type: ignore[method-assign]  # docs/patches.md


def _refuse_uneven(module: nn.Module) -> None:
    """Raise ValueError if the module's layers exchange rows: join() stands in for a rank only in what it averages."""
    for name, child, shards in sharded_modules(module):
        members = shards.sharding.members
        if members is not None and len(members) > 1:
            raise ValueError(
                f"the experts of {name or type(child).__name__} are spread over the ranks {sorted(members)}, "
                "and every call needs all of these ranks, but join() lets a rank without batches stop: give every "
                "rank the same number of batches (one may have no tokens), or let all ranks stop with the first one, "
                "by join(throw_on_early_termination=True)"
            )


def _count_over(module: nn.Module, ranks: Ranks) -> None:
    """Make routers of layers that know of no ranks sum over these the load that moves their selection bias.

    Each rank would move its own bias otherwise, or rank 0's load alone that of all, whose buffers are copied. What an
    earlier DistributedDataParallel has set is replaced: its ranks may be others.
    """
    routers = [child for child in module.modules() if isinstance(child, TopKRouter) and OWN_BUFFERS in vars(child)]
    for router in routers:
        if counts_by_wrapper(router):
            router.reduce_load = SumOverRanks(ranks)


def counts_by_wrapper(router: TopKRouter) -> bool:
    """Return whether at most a DistributedDataParallel has set over which ranks a router sums its load."""
    return router.reduce_load is None or isinstance(router.reduce_load, SumOverRanks)


def _note_averaged(wrapped: "DistributedDataParallel") -> None:
    """Remember what DistributedDataParallel averages of its module."""
    module, averaged = wrapped.module, set()
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.requires_grad and f"{prefix}.{name}" not in ignored:  # as it spells them
                averaged.add(id(parameter))
    with _averaged_lock:
        _averaged[wrapped] = frozenset(averaged)


def is_averaged_by_ddp(parameter: Tensor) -> bool:
    """Return whether a living DistributedDataParallel was made with this parameter, and averages its gradient."""
    if not _is_noted(parameter):
        return False
    gc.collect()  # it may be about to be freed
    return _is_noted(parameter)


def _is_noted(parameter: Tensor) -> bool:
    if not _averaged:
        return False
    with _averaged_lock:
        return any(id(parameter) in averaged for averaged in _averaged.values())


def _averages_nothing(module: nn.Module) -> bool:
    """Return whether each rank trains only parameters of its own, as with adapters of experts alone."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return bool(trained) and ignored.issuperset(trained) and any(True for _ in sharded_modules(module))


@contextlib.contextmanager
def _something_to_average(module: nn.Module) -> "Iterator[None]":
    """Provide DistributedDataParallel with a parameter to average in a module in which it ignores all that is trained.

    It refuses a module without one, though Trainer wraps all. The parameter is in no graph, so that nothing is averaged
    but in the first step of a static graph; all else that it does, with frozen parameters and buffers too, it does.
    """
    if not _averages_nothing(module):
        yield
        return
    of_nobody = nn.Parameter(torch.zeros(1, device=next(module.parameters()).device))
    module.register_parameter(OF_NOBODY, of_nobody)
    try:
        yield
    finally:
        delattr(module, OF_NOBODY)


def name_ignored(module: nn.Module, group: "ProcessGroup | None" = None, mesh: "DeviceMesh | None" = None) -> None:
    """Name what is marked where DistributedDataParallel looks, after checking that it averages as experts do."""
    import torch.distributed as dist

    for name, parameter in module.named_parameters():
        if hasattr(getattr(getattr(parameter, "_st_info", None), "mesh", None), MARK):
            raise ValueError(
                f"torch.distributed's replicate() has made a plain tensor of {name}, of which every rank holds other "
                "experts, and would average them: use DistributedDataParallel"
            )
    ignored = own_buffers(module)
    for prefix, child, shards in sharded_modules(module):
        if (members := shards.sharding.members) is None:
            raise ValueError(
                f"the experts of {prefix or type(child).__name__} are spread over ranks that torch.distributed does "
                "not know, and DistributedDataParallel would mix the experts of its ranks: make the layer with a "
                "ProcessGroup or a DeviceMesh"
            )
        ranks = dist.get_process_group_ranks(mesh.get_group() if mesh is not None else group)
        if set(ranks) != set(members):
            raise ValueError(
                f"DistributedDataParallel averages over the ranks {sorted(ranks)}, but gradients of the experts of "
                f"{prefix or type(child).__name__} are averaged over the ranks {sorted(members)}: spread them "
                'over the same ranks, with a DeviceMesh of the dimensions "replica" and "expert" where each expert '
                "has copies"
            )
        warn_of_sums("DistributedDataParallel", prefix or type(child).__name__, shards)
        refuse_computed(prefix or type(child).__name__, child, shards.names, "DistributedDataParallel")
        for name in shards.names:
            parameter = getattr(child, name)
            if parameter is not None:
                parameter._ddp_ignored = True  # DistributedDataParallel's mixed precision asks for this mark
                # Both spellings: it joins a module's name and a parameter's with a dot, the name "" of itself too.
                ignored += [f"{prefix}.{name}", f"{prefix}.{name}".lstrip(".")]
    if ignored:
        module._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]  # PyTorch reads this name
            *getattr(module, "_ddp_params_and_buffers_to_ignore", ()),
            *ignored,
        ]
