"""call_header(): what this rank tells the other ranks of a call, and by which they see that they make the same one."""

from functools import lru_cache

import torch

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.dispatch.capacity import replay_overflowed
from tritonmoe.dispatch.header import DTYPE_CODES, SAVES, CallHeader, weight_bits
from tritonmoe.dispatch.placement import ExpertPlacement, replica_bits
from tritonmoe.dispatch.terms import CallTerms, plan_terms
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.experts.arguments import have_wider_main_grads
from tritonmoe.experts.quantized_weight import is_packed, weight_formats
from tritonmoe.experts.tensors import NAMES, OPTIONAL

__all__ = ["call_header"]


def call_header(call: ProposedCall, kinds: tuple[str, ...]) -> CallHeader:
    """Return what this rank says of a call to every rank, counts and nonfinite_rows apart.

    kinds: the names of the kinds of plans, in the order in which they are tried.
    """
    spec, tensors, needs, placement = call.spec, call.tensors, call.needs, call.spec.placement
    flags = () if call.is_captured else call.state.captured_flags
    is_replay_wrong = bool(flags) and replay_overflowed(call.transport, flags, tensors.x.device)
    return CallHeader(
        sequence=call.sequence,
        layer=-1 if call.layer is None else call.layer.layer,
        copy=0 if call.layer is None else call.layer.copy,
        terms=_terms(call, kinds),
        num_experts=call.num_slots,
        top_k=tensors.topk_ids.shape[1],
        hidden_size=tensors.x.shape[1],
        intermediate_size=call.intermediate_size,
        topk_weights_dtype=DTYPE_CODES.get(tensors.topk_weights.dtype, 0),
        grad_enabled=int(call.grad_enabled),
        needs_any=int(any(needs.flatten())),
        needs_x=int(needs.x),
        needs_topk_weights=int(needs.topk_weights),
        needs_weights=0 if spec.overlap.balance is None else weight_bits(needs.weights),
        wide_grads=0 if spec.overlap.balance is None else weight_bits(have_wider_main_grads(call.owners)),
        half=call.half,
        compiled=int(call.is_compiled),
        captured=int(call.is_captured),
        replay_overflowed=int(is_replay_wrong),
        replica_grads=replica_bits(placement, needs.weights),
        auto=int(isinstance(spec.overlap, OverlapConfig) and spec.overlap.is_auto),
        save=SAVES.index(spec.experts.save),
        deterministic=int(torch.are_deterministic_algorithms_enabled()),
        **call.state.history(),
        **call.message._asdict(),
    )


def _terms(call: ProposedCall, kinds: tuple[str, ...]) -> CallTerms:
    """Return what must be the same on all ranks of a call: what is configured, and its tensors."""
    weights, placement = call.tensors.weights, call.spec.placement
    ranks = [0 if of is None else of.shape[1] for of in (weights.gate_up_a, weights.down_a)]
    given = tuple([name for name, tensor in zip(NAMES, call.tensors.flatten(), strict=False) if tensor is not None])
    gradients = "sum" if call.layer is None else call.layer.expert_gradients
    experts = call.spec.experts.agreed
    if is_packed(weights):
        formats = zip(("gate_up_format", "down_format"), weight_formats(weights), strict=True)
        experts = (*experts, *((name, found) for name, found in formats if found is not None))
    return _call_terms(experts, placement, gradients, call.tensors.x.dtype, given, tuple(ranks), kinds, call.overlap)


@lru_cache(maxsize=1024)
def _call_terms(
    experts: tuple[tuple[str, object], ...],
    placement: ExpertPlacement | None,
    expert_gradients: str,
    dtype: torch.dtype,
    given: tuple[str, ...],
    adapter_ranks: tuple[int, ...],
    kinds: tuple[str, ...],
    overlap: OverlapPlan,
) -> CallTerms:
    """Return these as terms; kept by their values, which most calls of a layer share."""
    named: dict[str, object] = {
        "dtype": dtype,
        "placement": "contiguous" if placement is None else placement.experts_of_rank,
    }
    named |= dict(experts)
    if placement is None or not placement.has_replicas:
        del named["transposed"]  # gradients of replicas are summed as they lie in memory; to others it is all one
    named |= {"expert_gradients": expert_gradients}
    for name, rank in zip(("gate_up_rank", "down_rank"), adapter_ranks, strict=True):
        named[name] = rank or "no adapter"
    named |= {"copies": "none", "plan_kinds": ", ".join(kinds)}
    named |= {name: "a tensor" if name in given else "none" for name in NAMES if name in OPTIONAL}
    return CallTerms((*named.items(), *plan_terms(overlap)))
