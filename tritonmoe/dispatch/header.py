"""CallHeader: what a rank says of a layer call, or of its backward, before the rows move."""

import functools
import struct
import zlib
from typing import NamedTuple

import torch

from tritonmoe.config.layer import ACTIVATION_NAMES, Activation, ClampedSwiGLU
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapPlan

__all__ = [
    "CALLABLE",
    "CHUNK_BY",
    "CLAMPED",
    "CLAMPED_FIELDS",
    "DTYPE_CODES",
    "EXPERT_GRADIENTS",
    "HEADER_SIZE",
    "MAGIC",
    "NAME_FIELDS",
    "SAVES",
    "CallHeader",
    "activation_fields",
    "in_millionths",
]

MAGIC = 0x7417_0E
CHUNK_BY = ("tokens", "experts")
SAVES = ("hidden", "input")
EXPERT_GRADIENTS = ("sum", "mean")
"""What a layer makes of the sums over ranks that its experts' gradients are."""
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
CLAMPED, CALLABLE = len(ACTIVATION_NAMES), len(ACTIVATION_NAMES) + 1
"""What CallHeader.activation is for an activation without a name of ours."""
NAME_BYTES = 32
"""Of a callable's qualified name so many travel, the last ones."""
CLAMPED_FIELDS = ("limit", "alpha", "up_offset")
NAME_FIELDS = ("name_0", "name_1", "name_2", "name_3")


class CallHeader(NamedTuple):
    """What one rank says of one layer call; every rank sees every rank's. All are integers on the wire."""

    magic: int = MAGIC
    sequence: int = 0
    """The number of the call: how many this transport has seen before, of a backward, before its forward."""
    layer: int = -1
    """Which of the layers made on this transport calls, in the order in which they were made; -1: a function call."""
    is_backward: int = 0
    """Whether this is a call's backward; then nothing is said of what its forward has agreed on."""
    layers_made: int = 0
    """How many layers this rank has made on the transport ..."""
    layers_alive: int = 0
    num_backwards: int = 0
    """How many backwards this rank has run on the transport, ..."""
    last_backward: int = -1
    """... the sequence of the latest, ..."""
    backwards: int = 0
    """... and a checksum of all of them in their order."""
    num_chunks: int = 0
    num_experts: int = 0
    top_k: int = 0
    hidden_size: int = 0
    dtype: int = 0
    """A code from DTYPE_CODES."""
    chunk_sizes: int = 0
    """A checksum of the chunks' relative sizes."""
    local_first: int = 0
    local_start: int = 0
    window: int = 0
    backward_window: int = 0
    serial: int = 0
    wire_dtype: int = 0
    """A place in WIRE_DTYPES."""
    chunk_by: int = 0
    """A place in CHUNK_BY."""
    grad_enabled: int = 0
    needs_any: int = 0
    """Whether this rank needs any gradient of the call ..."""
    needs_x: int = 0
    needs_topk_weights: int = 0
    error: int = 0
    """Whether this rank's arguments were refused."""
    nonfinite_rows: int = 0
    """Tokens whose router scores were not finite."""
    vote: int = 0
    """What this rank tells the other ranks' tuners: see Message in tuning/tuner.py."""
    second_vote: int = 0
    predicted_ns: int = 0
    measured_call: int = -1
    measured_ns: int = 0
    working_set: int = 0
    placement: int = 0
    """A checksum of which rank holds which experts, 0 for the contiguous placement."""
    replica_grads: int = 0
    """With replicas, a bit for each kind of weight that needs a gradient: all owners must sum the same."""
    capacity: int = 0
    """OverlapPlan.capacity in millionths, 0 for none."""
    overflowed: int = 0
    """In the exchange that ends a call with a capacity: whether this rank had rows that it has no room for."""
    replay_overflowed: int = 0
    """Whether that was so in a replay of a CUDA graph before this call."""
    captured: int = 0
    """Whether a CUDA graph is capturing this rank's call."""
    compiled: int = 0
    """Whether this rank's call stands in a compiled graph, which has a backward only if this rank needs gradients."""
    auto: int = 0
    """Whether the plan was chosen for calls of this kind (num_chunks="auto")."""
    save: int = 0
    """A place in SAVES."""
    deterministic: int = 0
    """torch.are_deterministic_algorithms_enabled()."""
    topk_weights_dtype: int = 0
    """A code from DTYPE_CODES, 0 for another one."""
    activation: int = 0
    """A place in ACTIVATION_NAMES, CLAMPED or CALLABLE."""
    limit: int = 0
    """The bits of ClampedSwiGLU's numbers ..."""
    alpha: int = 0
    up_offset: int = 0
    name_0: int = 0
    """The bytes of a callable's name ..."""
    name_1: int = 0
    name_2: int = 0
    name_3: int = 0
    intermediate_size: int = 0
    gated: int = 0
    interleaved: int = 0
    transposed: int = 0
    """Said with replicas only, whose gradients are summed as they lie; otherwise each rank's own affair."""
    expert_gradients: int = 0
    """A place in EXPERT_GRADIENTS."""
    gate_up_bias: int = 0
    """Whether there is one ..."""
    down_bias: int = 0

    @classmethod
    def of(cls, overlap: OverlapPlan, **others: int) -> "CallHeader":
        """Give the header of a call that runs this plan; `others` are the fields that don't follow from it."""
        return cls(
            num_chunks=overlap.num_chunks,
            chunk_sizes=zlib.crc32(str(overlap.chunk_sizes).encode()),
            local_first=int(overlap.local_first),
            local_start=overlap.local_start,
            window=overlap.window,
            backward_window=overlap.backward_window,
            serial=int(overlap.serial),
            wire_dtype=WIRE_DTYPES.index(overlap.wire_dtype),
            chunk_by=CHUNK_BY.index(overlap.chunk_by),
            capacity=in_millionths(overlap.capacity or 0),
            **others,
        )

    @property
    def place(self) -> str:
        """Where in the program this rank is, in words."""
        caller = "expert_parallel_mlp" if self.layer < 0 else f"layer {self.layer}"
        return f"{'backward' if self.is_backward else 'forward'} of {caller}, call {self.sequence}"


HEADER_SIZE = len(CallHeader._fields)


def in_millionths(capacity: float) -> int:
    """Give a capacity as ranks compare it."""
    return round(1e6 * capacity)


def activation_fields(activation: Activation) -> dict[str, int]:
    """Give the header's fields that say which activation this is; of a callable only its name can be said."""
    if isinstance(activation, str):
        return {"activation": ACTIVATION_NAMES.index(activation)}
    if isinstance(activation, ClampedSwiGLU):
        numbers = struct.pack("<3d", *(0.0 + getattr(activation, name) for name in CLAMPED_FIELDS))  # not -0.0
        return {"activation": CLAMPED, **dict(zip(CLAMPED_FIELDS, struct.unpack("<3q", numbers), strict=True))}
    named: object = activation
    while isinstance(named, functools.partial):
        named = named.func
    name = str(getattr(named, "__qualname__", type(named).__qualname__)).encode()[-NAME_BYTES:].ljust(NAME_BYTES)
    return {"activation": CALLABLE, **dict(zip(NAME_FIELDS, struct.unpack("<4q", name), strict=True))}
