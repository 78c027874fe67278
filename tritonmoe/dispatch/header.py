"""The header of a layer call, 1 of 3: its fields, in which a rank describes its call, or its backward, to all others.

header_check.py compares the headers of all ranks, and count_exchange.py brings them there.
"""

import zlib
from array import array
from operator import index
from typing import NamedTuple, SupportsIndex

import torch

from tritonmoe.dispatch.call_settings import NO_SETTINGS

__all__ = ["DTYPE_CODES", "HEADER_SIZE", "MAGIC", "SAVES", "CallHeader"]

MAGIC = 0x7417_0E
SAVES = ("hidden", "input")
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}


class CallHeader(NamedTuple):
    """What one rank says of one layer call. Every rank gets the header of every rank; all fields travel as integers."""

    magic: int = MAGIC
    sequence: int = 0
    """The number of the call: how many calls this transport has seen before it; a backward has its forward's number."""
    checksum: int = 0
    """Of the other fields as they were sent; see sealed()."""
    layer: int = -1
    """Which layer calls, counted in the order in which layers were made on this transport; -1: no layer, a function."""
    copy: int = 0
    """Which copy of this layer, counted in the order in which its copies were made; 0: the layer itself."""
    is_backward: int = 0
    """Whether this is a call's backward. Of what its forward has agreed on, the header then has the settings alone."""
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
    settings: SupportsIndex = NO_SETTINGS
    """The CallSettings, all that is configured and must be the same on all ranks; the number for them in the
    header of another rank."""
    num_experts: int = 0
    top_k: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    grad_enabled: int = 0
    needs_any: int = 0
    """Whether this rank needs any gradient of the call."""
    needs_x: int = 0
    """Whether it needs that of x."""
    needs_topk_weights: int = 0
    """Whether it needs that of topk_weights."""
    needs_weights: int = 0
    """With `balance`, a bit for each kind of weight, in the order of PerWeight: whether it needs the gradient."""
    wide_grads: int = 0
    """With `balance`, a bit for each kind of weight, whether its main_grad is wider than itself."""
    error: int = 0
    """Whether this rank's arguments were refused."""
    nonfinite_rows: int = 0
    """How many of this rank's tokens have router scores that are not finite."""
    vote: int = 0
    """The plan that this rank's tuner would try first, as pack_plan() in overlap/tuning/search.py packs plans; 0 where
    there is none. This field and the next five are for the tuners of the other ranks."""
    second_vote: int = 0
    """The plan that it would try next."""
    predicted_ns: int = 0
    """The shortest time that it predicts for any plan."""
    measured_call: int = -1
    """The number of the tried call that took `measured_ns`; -1 for none."""
    measured_ns: int = 0
    working_set: int = 0
    """With a memory budget: how much this rank's experts work on at a time, as WorkingSet.pack() gives it."""
    kept_bytes: int = 0
    """With a memory budget: how many bytes this rank keeps for the backwards of earlier calls on the transport."""
    replica_grads: int = 0
    """With replicas, a bit for each kind of weight that needs a gradient: all owners must sum the same."""
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

    def sealed(self) -> array:
        """Return the fields as they travel."""
        row = array("q", map(index, self))
        row[CHECKSUM] = 0
        row[CHECKSUM] = zlib.crc32(row)
        return row

    @property
    def is_damaged(self) -> bool:
        """Whether a header that came here is not the one that was sent."""
        return self.sealed()[CHECKSUM] != self.checksum


CHECKSUM = CallHeader._fields.index("checksum")
HEADER_SIZE = len(CallHeader._fields)
