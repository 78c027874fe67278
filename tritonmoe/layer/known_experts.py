"""Whose a parameter is: the living GroupedExperts, and the factors of adapters that their calls were given."""

import threading
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tritonmoe.experts.adapters import ExpertAdapters
from tritonmoe.runtime.autograd import leaf_of
from tritonmoe.sharding.data_parallel import is_averaged_by_ddp
from tritonmoe.transports import Transport

if TYPE_CHECKING:
    from tritonmoe.layer.grouped_experts import GroupedExperts

__all__ = ["experts_of_parameters", "know_experts", "note_factors", "transports_of"]

_known: "WeakValueDictionary[str, GroupedExperts]" = WeakValueDictionary()
_lock = threading.Lock()  # emulated ranks are threads
ADAPTS = "_tritonmoe_adapts"
"""What a factor of a call's adapters notes: the key of the module that was called (no weakref: those forbid swaps)."""


def know_experts(module: "GroupedExperts") -> str:
    """Remember a module as long as it lives, and return its key, which no other process has: a file may keep it."""
    key = uuid.uuid4().hex
    with _lock:
        _known[key] = module
    return key


def experts_of_parameters(parameters: Iterable[Tensor]) -> "list[GroupedExperts | None]":
    """Return, for each parameter, the GroupedExperts over ranks of which it is a plain tensor; None for all others.

    The living modules are asked. A note on their parameters would be lost where they are exchanged for others: by
    deepcopy, load_state_dict with assign=True, parametrizations. Factors of adapters that were given to an eager call
    over ranks, themselves or cast, reshaped or scaled, count as parameters of the module that was called.
    """
    with _lock:
        modules = dict(_known.items())
    spread = [
        m for m in modules.values() if m.transport is not None and (m.sharding is None or m.sharding.mesh is None)
    ]
    own = {id(parameter): module for module in spread for parameter in module.parameters()}
    return [own.get(id(parameter)) or modules.get(vars(parameter).get(ADAPTS, "")) for parameter in parameters]


def transports_of(parameters: Iterable[Tensor]) -> list[Transport]:
    """Return the transports over which some of these parameters are spread as plain tensors, in their order."""
    modules = experts_of_parameters(parameter for parameter in parameters if not hasattr(parameter, "device_mesh"))
    spread = [module.transport for module in modules if module is not None and module.transport is not None]
    return [transport for transport in dict.fromkeys(spread) if transport.size > 1]


def note_factors(key: str, adapters: ExpertAdapters) -> None:
    """Remember the parameters of a call's adapters, which are this rank's alone as its experts are.

    Args:
        key: of the module that is called, from know_experts().
    Raises:
        ValueError: DistributedDataParallel averages a factor over ranks.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for factor in (adapters.gate_up_a, adapters.gate_up_b, adapters.down_a, adapters.down_b):
        leaf = None if factor is None else leaf_of(factor)
        if leaf is None or hasattr(leaf, "device_mesh"):
            continue
        if is_averaged_by_ddp(leaf):
            raise ValueError(
                "a factor of adapters is this rank's experts' alone, and DistributedDataParallel averages it with the "
                "factors of the other ranks' experts: keep it outside of the module that is wrapped, or name it in "
                "that module's _ddp_params_and_buffers_to_ignore before wrapping (a parameter of the module itself as "
                '"name" and ".name")'
            )
        if getattr(leaf, ADAPTS, None) != key:
            setattr(leaf, ADAPTS, key)
