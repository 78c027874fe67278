"""clip_grad_norm_: clips by the norm of a whole model's gradients, where every rank has those of its own experts."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tritonmoe.layer import experts_of_parameters
from tritonmoe.placement.expert_shards import ExpertShards
from tritonmoe.placement.watched_collectives import full_tensor
from tritonmoe.transports import Transport
from tritonmoe.transports.waiting import Doing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip gradients in place as torch.nn.utils.clip_grad_norm_ does, by the norm that one device would find.

    torch's own only knows the gradient that a plain tensor has on this rank. Experts differ, so every rank finds
    another norm, scales the averaged dense gradients differently, and the ranks' copies drift apart without an error.
    Here the experts of a GroupedExperts (a MoELayer's too) count on all ranks of its transport, replicas once; DTensors
    count over their meshes, also beside plain tensors; all else counts as the same on every rank.

    Every rank makes the call, once dense gradients are averaged, with the same parameters in the same order, whether or
    not they have a gradient there. Factors of adapters that were given to an eager call of a layer count as experts of
    it. Weights that expert_parallel_mlp gets from elsewhere than a GroupedExperts, and factors that were given in
    compiled code alone, count as dense: reduce the norm of these with Transport.all_reduce.

    Args: torch's; norm_type: positive, or inf.
    Returns:
        The norm before clipping, () fp32 (fp64 where a gradient is), the same bits on every rank.
    Raises:
        ValueError: norm_type is not positive, or, beside plain tensors of experts, what counts as dense has another
            norm on another rank. RuntimeError: with error_if_nonfinite, the norm is not finite (on every
            rank). TransportError: the ranks could not add up their parts. Nothing is scaled then.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive or inf, got {norm_type}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    dense: list[Tensor] = []
    of_transports: dict[Transport, list[tuple[Tensor, ExpertShards]]] = {}
    of_meshes: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter, module in zip(parameters, experts_of_parameters(parameters), strict=True):
        if hasattr(parameter, "device_mesh"):
            of_meshes.setdefault(parameter.device_mesh, []).append(parameter)
        elif module is not None and module.expert_shards is not None:
            of_transports.setdefault(module.expert_shards.transport, []).append((parameter, module.expert_shards))
        else:
            dense.append(parameter)
    norms = [get_total_norm(_grads(dense), norm_type, foreach=foreach).double()]
    with Doing(lambda: "clip_grad_norm_"):
        for transport in of_transports:
            _check_same(norms[0], transport)
        for sharded in of_meshes.values():
            norm = get_total_norm(_grads_of_mesh(sharded), norm_type, foreach=foreach)
            norms.append(full_tensor(norm, "clip_grad_norm_").double())
        for transport, spread in of_transports.items():
            counted = [part for pair in spread for part in _counted_here(*pair)]
            own = get_total_norm(counted, norm_type, foreach=foreach).to(spread[0][0].device).double()
            norms.append(_norm_of_all_ranks(own, norm_type, transport))
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[-1].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {float(total)}, so it can't scale them: look for "
            "an overflow, or set error_if_nonfinite=False to scale them by it nevertheless"
        )
    plain = [*dense, *(parameter for spread in of_transports.values() for parameter, _ in spread)]
    if not any(grad.dtype == torch.float64 for group in (plain, *of_meshes.values()) for grad in _grads(group)):
        total = total.float()
    for group in (plain, *of_meshes.values()):
        clip_grads_with_norm_(group, max_norm, total, foreach=foreach)
    return total


def _norm_of_all_ranks(own: Tensor, norm_type: float, transport: Transport) -> Tensor:
    """Return the norm of which every rank has a part, this rank `own`; one without a gradient takes part too."""
    if norm_type == math.inf:
        return transport.all_reduce(own, "max")
    return transport.all_reduce(own**norm_type) ** (1 / norm_type)


def _check_same(norm: Tensor, transport: Transport) -> None:
    """Raise ValueError on every rank where the ranks have other norms of what counts as dense.

    One that is infinite, or NaN, on all of them passes.
    """
    if transport.size == 1:
        return
    own = float(norm)
    kind, finite = math.isnan(own) * 2.0 or math.isinf(own) * 1.0, own if math.isfinite(own) else 0.0
    said = torch.tensor([finite, -finite, kind, -kind], dtype=torch.float64, device="cpu")
    largest, smallest, largest_kind, smallest_kind = transport.all_reduce(said, "max").tolist()
    norms = ""
    if largest_kind + smallest_kind > 0:
        norms = "that are finite, infinite or NaN on some ranks and not on others"
    elif largest + smallest > 1e-3 * largest:
        norms = f"from {-smallest:g} to {largest:g} on the ranks"
    if norms:
        raise ValueError(
            f"the gradients of dense parameters have norms {norms}, {own:g} on this rank, so every rank would clip by "
            'another factor: average them first, with transport.all_reduce(parameter.grad, "mean"), and leave out '
            "parameters that only this rank has and that are not those of GroupedExperts"
        )


def _grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _grads_of_mesh(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of DTensors, a zero for each that has none here and may have one on other ranks.

    All ranks of the mesh reduce a vector of these gradients' norms.
    """
    return [_zero_like(p) if p.grad is None else p.grad for p in parameters if p.requires_grad or p.grad is not None]


def _zero_like(parameter: Tensor) -> Tensor:
    """Return a DTensor of one zero on each rank, with this one's dtype, mesh and placements."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    zero = parameter.to_local().new_zeros((1,) * parameter.ndim)
    return DTensor.from_local(zero, parameter.device_mesh, parameter.placements, run_check=False)


def _counted_here(parameter: Tensor, shards: ExpertShards) -> list[Tensor]:
    """Return the gradient of the experts that count on this rank, if any: a replica counts on its first owner."""
    if parameter.grad is None:
        return []
    placement, rank = shards.placement, shards.transport.rank
    if placement is None or not placement.has_replicas:
        return [parameter.grad]
    slots = [slot for slot, expert in enumerate(shards.expert_ids) if placement.first_owner(expert) == rank]
    return [parameter.grad[slots]] if slots else []
