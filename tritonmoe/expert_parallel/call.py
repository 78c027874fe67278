"""CallSpec and ProposedCall: what a layer's calls have in common, and one call as this rank would make it.

Listeners are told of every call of this process, before it and after each pass, as a recording is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.config.literals import read_literal
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapConfig, OverlapPlan
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.state import LayerCalls, TransportState, UnderWay
from tritonmoe.experts.spec import ExpertSettings, ExpertSpec, from_plain, literal, to_plain
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends.rounded import RoundedOperations
from tritonmoe.ops.grouping import Grouping
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.memory import BufferWidths
from tritonmoe.overlap.tuning.tuner import PlanChooser
from tritonmoe.transports import Transport

__all__ = ["CallSpec", "ProposedCall", "buffer_widths", "decode", "encode", "listeners"]

PLAN_FIELDS, CONFIG_FIELDS = (tuple(field.name for field in fields(kind)) for kind in (OverlapPlan, OverlapConfig))


@dataclass(frozen=True)
class CallSpec:
    """What is decided once for all calls of a layer, and is the same on every rank."""

    experts: ExpertSpec
    num_experts: int
    """E, over all ranks."""
    overlap: OverlapConfig | OverlapPlan
    placement: ExpertPlacement | None = None


@dataclass(eq=False, repr=False)
class ProposedCall:
    """One call as its caller gives it, and what check() and choose_plan() find out before the ranks agree on it."""

    spec: CallSpec
    transport: Transport
    tensors: CallTensors[Tensor]
    """As given; from check() on in autocast's dtypes, with slots for topk_ids where there is a placement."""
    layer: LayerCalls | None = None
    """The layer that calls, which gets the report; None for a call of the function."""
    nonfinite_scores: Tensor | None = None
    """(), Routing's count of tokens without a finite score; None to look at topk_weights."""
    fillers: Sequence[Callable[[], None]] = ()
    half: int = 0
    """Which half of a batch in two_batches the call is of, 1 or 2; 0 for a whole batch."""
    is_compiled: bool = False
    """Whether the call stands in a compiled graph, which has settled the next two before it runs."""
    grad_enabled: bool = field(init=False)
    """Whether the call was made with gradients enabled."""
    needs: CallTensors[bool] = field(init=False)
    """Of what this rank wants a gradient."""

    # Set by check()
    state: TransportState = field(init=False)
    sequence: int = field(init=False)
    """The number of the call: how many this transport has seen before."""
    num_slots: int = field(init=False)
    """Of all ranks; slots are experts unless there is a placement."""
    num_nonfinite_rows: Tensor = field(init=False)
    """(), how many tokens have a score, or a weight, that is not finite."""
    settings: ExpertSettings = field(init=False)
    owners: PerWeight[Tensor] | None = field(init=False)
    """The weights as the user holds them, where a main_grad hangs; None where there is none."""
    is_captured: bool = field(init=False)
    """Whether a CUDA graph captures the call, so that nothing of a device can be read."""
    entered_at: float = field(init=False)
    """When check() began: time.perf_counter()."""

    # Set by choose_plan()
    overlap: OverlapPlan = field(init=False)
    """The plan that this rank proposes, which must be every rank's."""
    kind: tuple = field(init=False)
    """What calls have in common that may take the same plan, as in TransportState.choosers."""
    again: UnderWay | None = None
    """The forward that is recomputed."""
    message: CallHeader = field(init=False)
    """What this rank tells the other ranks' choosers, and nothing else."""
    chooser: PlanChooser | None = None
    """None where the number of chunks is given."""
    reason: str = ""
    """Why this plan was taken, where the chooser was not asked and learns nothing; in one sentence."""


def buffer_widths(tensors: CallTensors[Tensor], settings: ExpertSettings, *, has_backward: bool) -> BufferWidths:
    """Return the widths of the buffers of a call with these tensors."""
    weights, ops = tensors.weights, settings.ops
    of_weights = (weights.gate_up_proj, weights.down_proj)
    rounded_bytes = sum(map(ops.rounded_bytes, of_weights)) if isinstance(ops, RoundedOperations) else 0
    return BufferWidths(
        tensors.x.shape[1],
        settings.layer.intermediate_size,
        weights.gate_up_proj.shape[0],
        tensors.x.dtype.itemsize,
        gated=settings.spec.layout.gated,
        save=settings.spec.save,
        has_backward=has_backward,
        precision=settings.spec.precision,
        rounded_weight_bytes=rounded_bytes,
    )


# As a string


def encode(spec: CallSpec) -> str:
    """Return a spec whose activation is fused as the string that an operator takes for it, of Python literals."""
    overlap, placement = spec.overlap, spec.placement
    is_plan = isinstance(overlap, OverlapPlan)
    settings = [getattr(overlap, name) for name in (PLAN_FIELDS if is_plan else CONFIG_FIELDS)]
    settings = [WIRE_DTYPES.index(value) if isinstance(value, torch.dtype) else value for value in settings]
    held = None if placement is None else placement.experts_of_rank
    return literal((to_plain(spec.experts), spec.num_experts, is_plan, tuple(settings), held))


@lru_cache(maxsize=1024)
def decode(encoded: str) -> CallSpec:
    """Return the spec that encode() made the string of."""
    experts, num_experts, is_plan, settings, held = read_literal(encoded)
    named: dict[str, Any] = dict(zip(PLAN_FIELDS if is_plan else CONFIG_FIELDS, settings, strict=True))
    if named["wire_dtype"] is not None:
        named["wire_dtype"] = WIRE_DTYPES[named["wire_dtype"]]
    overlap = OverlapPlan(**named) if is_plan else OverlapConfig(**named)
    placement = None if held is None else ExpertPlacement(held)
    return CallSpec(from_plain(experts), num_experts, overlap, placement)


class CallListener(Protocol):
    """An observer of calls; it is called on the thread that ran the pass, and reads nothing of the device there."""

    def before_forward(self, transport: Transport, device: torch.device) -> None:
        """Run before a call of which no rank has sent anything yet; not inside of a CUDA graph.

        The call raises an error that this raises, and the other ranks fail with it.
        """
        ...

    def after_forward(self, transport: Transport, header: CallHeader, report: LayerReport, grouping: Grouping) -> None:
        """Run after a forward; with a capacity that was too small, after each of the two runs of a call.

        Args:
            transport: of all ranks. header: what this rank told the others of the call.
            grouping: of the pairs that this rank computes, on the layer's device; it lives as long as the call's graph,
                whose backward may come.
        """
        ...

    def after_backward(self, transport: Transport, header: CallHeader, report: LayerReport) -> None:
        """Run after the backward of the call with this header; `report` has its times."""
        ...


listeners: list[CallListener] = []
"""All observers of this process."""
