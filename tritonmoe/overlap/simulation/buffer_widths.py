"""BufferWidths: what decides, beside rows and pairs, how large the buffers of a layer call are."""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ALL_AT_ONCE", "BufferWidths", "WorkingSet"]


class WorkingSet(NamedTuple):
    """How much a rank's experts work on at a time; ranks with other machines or backends have another one."""

    max_block_pairs: int | None = None
    """How many pairs the backend computes at a time (MAX_BLOCK_PAIRS of its module). None means all pairs of a chunk,
    as the kernels do."""
    num_workers: int = 1
    """On how many blocks, or experts' weight gradients, the rank works at a time."""
    copies_rows: bool = False
    """Whether the backend may copy the rows of a chunk's pairs before `up`, where it doesn't go block by block."""

    def pack(self) -> int:
        """Return the three as one positive integer, which unpack() reads."""
        return ((self.max_block_pairs or 0) * 1024 + self.num_workers) * 2 + self.copies_rows

    @classmethod
    def unpack(cls, value: int) -> "WorkingSet":
        rest, copies_rows = divmod(value, 2)
        max_block_pairs, num_workers = divmod(rest, 1024)
        return cls(max_block_pairs or None, num_workers, bool(copies_rows))


ALL_AT_ONCE = WorkingSet()


@dataclass(frozen=True)
class BufferWidths:
    """What decides, beside rows and pairs, how large the buffers of a layer call are."""

    hidden_size: int
    """D."""
    intermediate_size: int
    """F."""
    num_local_experts: int
    """E / W."""
    dtype_bytes: int
    """Of one element of rows, h and weights."""
    gated: bool = True
    """Whether h has 2F columns instead of F."""
    save: str = "hidden"
    """As in moe_mlp: whether h is kept for the backward."""
    has_backward: bool = True
    working_set: WorkingSet = ALL_AT_ONCE

    @property
    def row_bytes(self) -> int:
        """Of one row of D columns."""
        return self.hidden_size * self.dtype_bytes

    @property
    def inner_bytes(self) -> int:
        """Of the activation of one pair, F columns."""
        return self.intermediate_size * self.dtype_bytes

    @property
    def hidden_bytes(self) -> int:
        """Of h of one pair."""
        return self.inner_bytes * (2 if self.gated else 1)

    @property
    def temporary_bytes(self) -> int:
        """Of F columns in the dtype in which activations are computed, fp32 or wider."""
        return self.intermediate_size * max(4, self.dtype_bytes)

    @property
    def keeps_hidden(self) -> bool:
        return self.has_backward and self.save == "hidden"
