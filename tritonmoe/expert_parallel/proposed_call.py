"""ProposedCall: one expert-parallel call as this rank would make it, before the ranks have agreed on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.expert_parallel.call_spec import CallSpec
from tritonmoe.expert_parallel.state import LayerCalls, TransportState
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.transports import Transport, TwoLevelTransport

__all__ = ["ProposedCall"]


@dataclass(eq=False, repr=False)
class ProposedCall:
    """One call as its caller gives it, and what check() finds out; AgreedCall is what the ranks then agree on."""

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
    intermediate_size: int = field(init=False)
    """F."""
    num_nonfinite_rows: Tensor = field(init=False)
    """(), how many tokens have a score, or a weight, that is not finite."""
    settings: ExpertSettings = field(init=False)
    owners: PerWeight[Tensor] | None = field(init=False)
    """As in AgreedCall."""
    is_captured: bool = field(init=False)
    """Whether a CUDA graph captures the call, so that nothing of a device can be read."""
    two_level: TwoLevelTransport | None = field(init=False)
    """The transport, where it has two levels."""
    entered_at: float = field(init=False)
    """When check() began: time.perf_counter()."""
