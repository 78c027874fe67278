"""The header of a layer call, 1 of 3: its fields, in which a rank describes its call, or its backward, to all others.

header_check.py compares the headers of all ranks, and count_exchange.py brings them there.
"""

import functools
import struct
import zlib
from typing import NamedTuple

import torch

from tritonmoe.config.activations import (
    GATE_FUNCTIONS,
    MAX_NUMBERS,
    POINTWISE,
    Activation,
    find_activation,
    is_fused,
)
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapPlan

__all__ = [
    "CALLABLE",
    "CHUNK_BY",
    "DTYPE_CODES",
    "EXPERT_GRADIENTS",
    "FUSED_NAMES",
    "HEADER_SIZE",
    "MAGIC",
    "NAME_FIELDS",
    "NUMBER_FIELDS",
    "SAVES",
    "CallHeader",
    "activation_fields",
    "bits_of",
    "in_millionths",
    "numbers_of",
]

MAGIC = 0x7417_0E
CHUNK_BY = ("tokens", "experts")
SAVES = ("hidden", "input")
EXPERT_GRADIENTS = ("sum", "mean")
"""Whether the gradients of a layer's experts stay sums over the ranks, or are divided by their number."""
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
FUSED_NAMES = (*POINTWISE, *GATE_FUNCTIONS)
CALLABLE = len(FUSED_NAMES)
"""The code in CallHeader.activation of a callable."""
NAME_BYTES = 32
"""So many bytes of a callable's qualified name travel: the last ones."""
NUMBER_FIELDS = tuple(f"number_{place}" for place in range(MAX_NUMBERS))
NAME_FIELDS = ("name_0", "name_1", "name_2", "name_3")


class CallHeader(NamedTuple):
    """What one rank says of one layer call. Every rank gets the header of every rank; all fields travel as integers."""

    magic: int = MAGIC
    sequence: int = 0
    """The number of the call: how many calls this transport has seen before it; a backward has its forward's number."""
    layer: int = -1
    """Which layer calls, counted in the order in which layers were made on this transport; -1: no layer, a function."""
    copy: int = 0
    """Which copy of this layer, counted in the order in which its copies were made; 0: the layer itself."""
    is_backward: int = 0
    """Whether this is a call's backward. Then the header leaves out what its forward has agreed on."""
    layers_made: int = 0
    """How many layers this rank has made on the transport."""
    layers_alive: int = 0
    """How many of them still exist."""
    num_backwards: int = 0
    """How many backwards this rank has run on the transport."""
    last_backward: int = -1
    """The sequence number of the latest of them."""
    backwards: int = 0
    """A checksum of all of them in their order."""
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
    """Whether this rank needs any gradient of the call."""
    needs_x: int = 0
    """Whether it needs that of x."""
    needs_topk_weights: int = 0
    """Whether it needs that of topk_weights."""
    error: int = 0
    """Whether this rank's arguments were refused."""
    nonfinite_rows: int = 0
    """How many of this rank's tokens have router scores that are not finite."""
    vote: int = 0
    """This field and the next five are what this rank tells the other ranks' tuners: see Message in tuning/tuner.py."""
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
    """Whether rows had no room in a replay of a CUDA graph before this call."""
    captured: int = 0
    """Whether a CUDA graph is capturing this rank's call."""
    half: int = 0
    """Which half of a batch in two_batches this call is of, 1 or 2; 0 for a whole batch."""
    compiled: int = 0
    """Whether this rank's call stands in a compiled graph, which has a backward only if this rank needs gradients."""
    auto: int = 0
    """Whether the plan was chosen for calls of this kind (num_chunks="auto")."""
    save: int = 0
    """A place in SAVES."""
    deterministic: int = 0
    """torch.are_deterministic_algorithms_enabled()."""
    topk_weights_dtype: int = 0
    """A code from DTYPE_CODES, 0 for a dtype that has none."""
    activation: int = 0
    """A place in FUSED_NAMES, or CALLABLE."""
    number_0: int = 0
    """This field and the next two hold the bits of the activation's numbers."""
    number_1: int = 0
    number_2: int = 0
    name_0: int = 0
    """This field and the next three hold the bytes of a callable's name."""
    name_1: int = 0
    name_2: int = 0
    name_3: int = 0
    intermediate_size: int = 0
    gated: int = 0
    interleaved: int = 0
    transposed: int = 0
    """Compared only where experts have replicas, whose gradients are summed as they lie in memory."""
    expert_gradients: int = 0
    """A place in EXPERT_GRADIENTS."""
    gate_up_bias: int = 0
    """Whether the up-projection has a bias."""
    down_bias: int = 0
    """Whether the down-projection has one."""
    gate_up_rank: int = 0
    """Of the low-rank adapter on the up-projection, 0 for none."""
    down_rank: int = 0
    """Of that on the down-projection."""
    dropout: int = 0
    """The bits of the adapters' dropout."""
    adapters: int = 0
    """A checksum of the names and scales of PEFT's adapters."""

    @classmethod
    def of(cls, overlap: OverlapPlan, **others: int) -> "CallHeader":
        """Return the header of a call that runs this plan; `others` are the fields that don't follow from it."""
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
        return f"{'backward' if self.is_backward else 'forward'} of {self.call}"

    @property
    def call(self) -> str:
        """Which call it is, in words."""
        caller = "expert_parallel_mlp" if self.layer < 0 else f"layer {self.layer}"
        if self.copy:
            caller = f"copy {self.copy} of {caller}"
        return f"{caller}, call {self.sequence}"


HEADER_SIZE = len(CallHeader._fields)


def in_millionths(capacity: float) -> int:
    """Return a capacity as ranks compare it."""
    return round(1e6 * capacity)


def bits_of(*numbers: float) -> tuple[int, ...]:
    """Return the bits of numbers, as ranks compare them."""
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *(0.0 + n for n in numbers)))  # not -0.0


def numbers_of(*bits: int) -> tuple[float, ...]:
    """Return the numbers of which bits_of() gave the bits."""
    return struct.unpack(f"<{len(bits)}d", struct.pack(f"<{len(bits)}q", *bits))


def activation_fields(activation: Activation) -> dict[str, int]:
    """Return the header's fields that say which activation this is; a callable travels as the end of its name."""
    if is_fused(activation):
        found = find_activation(activation)
        return {
            "activation": FUSED_NAMES.index(found.name),
            **dict(zip(NUMBER_FIELDS, bits_of(*found.numbers), strict=False)),
        }
    named: object = activation
    while isinstance(named, functools.partial):
        named = named.func
    name = str(getattr(named, "__qualname__", type(named).__qualname__)).encode()[-NAME_BYTES:].ljust(NAME_BYTES)
    return {"activation": CALLABLE, **dict(zip(NAME_FIELDS, struct.unpack("<4q", name), strict=True))}
