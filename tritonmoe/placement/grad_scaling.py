"""torch.amp.GradScaler where every rank has other gradients in plain tensors: all ranks skip a step, or none does."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tritonmoe.transports.base import Transport

__all__ = ["agree_on_overflow"]

MARK = "_tritonmoe_agrees"


def agree_on_overflow(transports_of: Callable[[Iterable[Tensor]], list[Transport]]) -> None:
    """Make GradScaler skip a step on all ranks that hold other plain tensors where one overflows, from now on.

    Of DTensors it hears already. Where it unscales such parameters, every rank calls, as it does its step.

    Args:
        transports_of: gives the transports over which some of these parameters are spread, in their order.
    """
    original: Callable[..., dict[torch.device, Tensor]] = torch.amp.GradScaler._unscale_grads_
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def unscale(
        self: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, *arguments: object, **keywords: object
    ) -> dict[torch.device, Tensor]:
        found = original(self, optimizer, *arguments, **keywords)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for transport in transports_of(parameters):
            flags = [flag.to(parameters[0].device) for flag in found.values()]
            anywhere = torch.stack(flags).amax(0) if flags else torch.zeros(1, device=parameters[0].device)
            transport.all_reduce(anywhere, "max")  # a rank without a gradient takes part too
            for flag in found.values():
                flag.copy_(anywhere.view_as(flag))
        return found

    setattr(unscale, MARK, True)
    torch.amp.GradScaler._unscale_grads_ = unscale  # type: ignore[method-assign]  # docs/patches.md
