"""Frozen, checked settings of how exchanges overlap with compute: what a layer may choose from, and one choice."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch

from tritonmoe.config.numbers import check_flags, is_integer, is_number

__all__ = [
    "FEW_CHUNKS",
    "LOCAL_PARTS",
    "MAX_CHUNKS",
    "MAX_COPIES",
    "NUM_CHUNKS",
    "WIRE_DTYPES",
    "OverlapConfig",
    "OverlapPlan",
    "candidate_sizes",
    "check_chunk_sizes",
    "check_overlap",
    "equal_sizes",
    "most_copies",
    "ramp_sizes",
]

MAX_CHUNKS = 32
WIRE_DTYPES = (None, torch.bfloat16, torch.float8_e4m3fn)
"""The dtypes that rows may travel in, None being their own; see transports/wire.py."""
MAX_CHUNK_SIZE = 1000
MAX_CAPACITY = 1024
MAX_COPIES = 64
OWN_EXPERTS_PER_COPY, LEAST_COPIES = 4, 2
"""With max_copies="auto" copies take at most a quarter of the bytes of a rank's own experts, or the bytes of two."""
LOCAL_PARTS = 16
"""Local pairs are split by sixteenths."""


@dataclass(frozen=True)
class OverlapConfig:
    """How a layer divides a batch into chunks, whose exchanges it hides behind compute: fixed values, or choices.

    Raises ValueError for a chunk count outside 1..32, or a shape that doesn't fit the count.
    """

    num_chunks: int | Literal["auto"] = "auto"
    """Chunks per call; "auto" measures the first calls and chooses (see overlap/tuning/tuner.py)."""
    local_first: bool = True
    """Compute the pairs of this rank's own tokens and experts while the first and the last exchange are under way."""
    serial: bool = False
    """Wait for every exchange as soon as it is posted: the same chunks without overlap, to compare with."""
    shape: Literal["auto", "equal", "ramp"] | tuple[int, ...] = "auto"
    """The sizes of chunks. "equal": all of one size. "ramp": each chunk twice as large as the chunk before, up to 16
    times the first, and then smaller again. A tuple: relative sizes, so that (1, 2, 4, 2, 1) gives a tenth of the
    tokens (or experts) to the first and to the last of five chunks. "auto": the tuner's choice with num_chunks="auto",
    and "equal" otherwise."""
    wire_dtype: torch.dtype | None = None
    """The dtype in which rows travel. None: the layer's own. torch.bfloat16: in all exchanges of an fp32 layer.
    torch.float8_e4m3fn: in the forward's dispatch only, with a scale for each 128 columns of a row. The gradient of x
    ignores the rounding; gradients of weights are computed from the rounded rows. Rows that stay on their rank are not
    rounded."""
    chunk_by: Literal["tokens", "experts", "auto"] = "auto"
    """What is divided into chunks: every rank's tokens, or every rank's experts. With "experts" each weight is read
    only once for all received rows. But a row travels with the first chunk that needs the row and returns with the
    last, so more rows leave early and return late, and the results of all pairs are kept until the last chunk. "auto":
    the tuner's choice with num_chunks="auto" on a transport of one level, and "tokens" otherwise."""

    capacity: float | None = None
    """Room for the rows of each (rank, peer, chunk): capacity times their mean number if experts were drawn uniformly,
    and the same for their pairs (dispatch/capacity.py has the formula and an example). Rows are then sent without
    waiting for counts to reach the host. If the rows of any rank don't fit, all ranks run the call again without a
    capacity before the call returns: results are always exact, and last_report.overflowed is True. The whole room
    travels, padding included. Refused with chunks of experts and with a TwoLevelTransport. With a capacity and
    backend="triton" a CUDA graph can capture a call: see docs/decisions.md, "Capacity"."""

    memory_budget_bytes: int | None = None
    """With num_chunks="auto": what all layers on a transport may hold on any rank, in bytes: the buffers of a call, and
    what calls keep for their backwards. Once the counts of a call are known, all ranks predict the bytes from these. A
    call that would hold more keeps less until its backward (last_report.keeps), and runs in parts of its tokens, one
    after the other (last_report.parts). Weight gradients are then summed in fp32, part by part. The speed is not tuned:
    a call, or a part, has the fewest equal chunks that fit. Halves of a batch, calls in compiled graphs, callable
    activations and placements with replicas run as a whole, and with a capacity the budget chooses the number of chunks
    alone. last_report.memory says whether it fits. Refused with chunks of experts and with a TwoLevelTransport."""

    balance: Literal["auto", "always"] | None = None
    """Copies of hot experts for one call: their weights travel to ranks that have less to do. These ranks compute a
    part of the pairs, and send the gradients of the copies back. "auto" makes copies if the call is predicted, from the
    times of earlier calls, to take at least 3 % less time; "always" makes copies if ranks have different numbers of
    pairs; None never makes copies. Parameters, optimizers and checkpoints are the same as without copies. Refused with
    chunks of experts, a capacity, a memory budget, placements with replicas, callable activations and a
    TwoLevelTransport; halves of a batch run without copies."""
    max_copies: int | Literal["auto"] = "auto"
    """With `balance`: of how many experts of other ranks a rank computes a part in one call, at most. "auto": a quarter
    as many as the rank's own experts, and at least 2. balance="auto" makes fewer copies where fewer are predicted to be
    faster. The weights of each copy stay in memory until the backward; with save="input" they travel again instead."""

    def __post_init__(self) -> None:
        check_wire_dtype(self.wire_dtype)
        check_flags(self, "local_first", "serial")
        check_balance(self)
        if self.chunk_by not in ("tokens", "experts", "auto"):
            raise ValueError(f"chunk_by must be 'tokens', 'experts' or 'auto', got {self.chunk_by!r}")
        check_capacity(self.capacity, self.chunk_by)
        chunks = self.num_chunks
        if chunks != "auto" and (not is_integer(chunks) or not 1 <= chunks <= MAX_CHUNKS):
            raise ValueError(f"num_chunks must be 'auto' or 1..{MAX_CHUNKS}, got {chunks!r}")
        budget = self.memory_budget_bytes
        if budget is not None:
            if not is_integer(budget) or budget < 1:
                raise ValueError(f"memory_budget_bytes must be a positive number of bytes, got {budget!r}")
            if self.num_chunks != "auto" or self.shape not in ("auto", "equal") or self.wire_dtype is not None:
                raise ValueError(
                    "memory_budget_bytes chooses the number of chunks, all of one size and sent in the layer's "
                    "dtype: leave num_chunks, shape and wire_dtype out"
                )
            if self.chunk_by == "experts":
                raise ValueError(
                    "memory_budget_bytes needs chunks of tokens: with chunk_by='experts' the results of all pairs are "
                    "kept until the last chunk, whatever the number of chunks"
                )
        if budget is not None and self.balance is not None:
            raise ValueError(
                "memory_budget_bytes bounds the buffers of a call, and copies of experts (balance) are not counted "
                "among them: leave balance or memory_budget_bytes out"
            )
        if isinstance(self.shape, tuple):
            check_chunk_sizes(self.shape)
            if self.num_chunks not in ("auto", len(self.shape)):
                raise ValueError(
                    f"shape gives {len(self.shape)} chunk sizes and num_chunks is {self.num_chunks}: leave num_chunks "
                    "out, or give as many sizes"
                )
        elif self.shape not in ("auto", "equal", "ramp"):
            raise ValueError(
                f"shape must be 'auto', 'equal', 'ramp' or a tuple of relative chunk sizes, got {self.shape!r}"
            )

    @cached_property
    def is_auto(self) -> bool:
        """Whether the number of chunks is to be chosen."""
        return self.num_chunks == "auto" and not isinstance(self.shape, tuple)


def check_wire_dtype(wire_dtype: torch.dtype | None) -> None:
    """Raise ValueError unless rows can travel as this."""
    if wire_dtype not in WIRE_DTYPES:
        raise ValueError(f"wire_dtype must be one of {', '.join(map(str, WIRE_DTYPES))}, got {wire_dtype!r}")


def check_capacity(capacity: float | None, chunk_by: str) -> None:
    """Raise ValueError unless this is None, or a factor that rows in chunks of tokens can be counted with."""
    if capacity is not None and not (is_number(capacity) and 0.001 <= capacity <= MAX_CAPACITY):
        raise ValueError(f"capacity must be None or a number of 0.001..{MAX_CAPACITY}, got {capacity!r}")
    if capacity is not None and chunk_by == "experts":
        raise ValueError(
            "capacity needs chunks of tokens: with chunks of experts the routing of a row decides in which chunk it "
            "is sent and in which it returns, so no chunk has a fixed size. Use chunk_by='tokens', or leave capacity "
            "out"
        )


def check_balance(overlap: "OverlapConfig | OverlapPlan") -> None:
    """Raise ValueError unless copies of experts are left out, or can be made of chunks as these."""
    if overlap.balance not in ("auto", "always", None):
        raise ValueError(f"balance must be 'auto', 'always' or None, got {overlap.balance!r}")
    is_auto = isinstance(overlap, OverlapConfig) and overlap.max_copies == "auto"
    if not is_auto and not (is_integer(overlap.max_copies) and 1 <= overlap.max_copies <= MAX_COPIES):
        either = "'auto' or " if isinstance(overlap, OverlapConfig) else ""
        raise ValueError(f"max_copies must be {either}1..{MAX_COPIES} experts of a rank, got {overlap.max_copies!r}")
    if overlap.balance is None:
        return
    if overlap.chunk_by == "experts":
        raise ValueError(
            "balance needs chunks of tokens, since a copied expert has no place in a chunk of experts: use "
            "chunk_by='tokens', or leave balance out"
        )
    if overlap.capacity is not None:
        raise ValueError(
            "balance plans from counts on the host, and with a capacity the host doesn't wait for them: leave "
            "balance or capacity out"
        )


def check_chunk_sizes(sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless these are the relative sizes of 1..32 chunks."""
    is_tuple = isinstance(sizes, tuple) and 1 <= len(sizes) <= MAX_CHUNKS
    if not is_tuple or not all(is_integer(size) and 1 <= size <= MAX_CHUNK_SIZE for size in sizes):
        raise ValueError(
            f"chunk sizes must be a tuple of 1..{MAX_CHUNKS} whole numbers of 1..{MAX_CHUNK_SIZE}, relative to each "
            f"other, got {sizes!r}"
        )


def most_copies(max_copies: int | Literal["auto"], num_own: int) -> int:
    """Return the number of copies that max_copies of OverlapConfig lets a rank hold beside num_own experts of its own.

    "auto" gives 2 beside 8 experts, 8 beside 32, and never more than 64.
    """
    if max_copies != "auto":
        return max_copies
    return min(max(LEAST_COPIES, num_own // OWN_EXPERTS_PER_COPY), MAX_COPIES)


LARGEST_SIZE = 16
"""The size of the largest chunks of a ramp, relative to the first."""


def equal_sizes(num_chunks: int) -> tuple[int, ...]:
    """Return the relative sizes of chunks of one size."""
    return (1,) * num_chunks


def ramp_sizes(num_chunks: int, growth: int = 2) -> tuple[int, ...]:
    """Return the relative sizes of chunks that grow and then shrink: 5 chunks give (1, 2, 4, 2, 1).

    The first dispatch and the last combine, which nothing hides, are then short. A chunk may be so many times the one
    before as computing it takes longer than sending it: while one is computed, the next one arrives.

    Args:
        growth: each chunk is so many times the one before, up to LARGEST_SIZE, the first being 1; 1 gives equal sizes.
    """
    return tuple(min(growth ** min(c, num_chunks - 1 - c), LARGEST_SIZE) for c in range(num_chunks))


NUM_CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of chunks that are tried, each at most 1.5 times the one before where a number is left out. Of a time
C * eps + B / C (`overlap/tuning/search.py`) one of them then takes at most 2.1 % more than the best number between
them."""
FEW_CHUNKS = NUM_CHUNKS[: NUM_CHUNKS.index(8) + 1]
"""Those that the planner, the doctor and the benchmarks try: more gain less there than predictions are off. The tuner
tries all, since it measures its layer."""


def candidate_sizes() -> tuple[tuple[int, ...], ...]:
    """Return the relative sizes of chunks that predictions compare: FEW_CHUNKS of equal chunks, and of ramps."""
    return tuple(dict.fromkeys(sizes(count) for sizes in (equal_sizes, ramp_sizes) for count in FEW_CHUNKS))


@dataclass(frozen=True)
class OverlapPlan:
    """One way to run a layer call: what the tuner chooses, the executor runs and the simulator prices.

    Give one as a layer's `overlap` to run it as it is: `layer.last_report.overlap` of an earlier run, say. It must be
    the same on every rank.
    """

    chunk_sizes: tuple[int, ...] = (1,)
    """Relative sizes of the chunks; each is that share of every rank's own tokens, or experts."""
    local_first: bool = True
    """Whether this rank's own pairs stay out of the exchanges and are filler."""
    local_start: int = LOCAL_PARTS // 2
    """Sixteenths of those pairs that run before the first chunk's experts; the rest runs behind the last's."""
    window: int = MAX_CHUNKS
    """Forward: at most so many dispatches, and so many combines, are under way at once."""
    backward_window: int = MAX_CHUNKS
    serial: bool = False
    wire_dtype: torch.dtype | None = None
    """As in OverlapConfig."""
    chunk_by: Literal["tokens", "experts"] = "tokens"
    """As in OverlapConfig."""
    capacity: float | None = None
    """As in OverlapConfig."""
    balance: Literal["auto", "always"] | None = None
    """As in OverlapConfig."""
    max_copies: int = 2
    """As in OverlapConfig, where "auto" stands for a number that depends on the layer."""

    def __post_init__(self) -> None:
        check_wire_dtype(self.wire_dtype)
        check_balance(self)
        if self.chunk_by not in ("tokens", "experts"):
            raise ValueError(f"chunk_by must be 'tokens' or 'experts', got {self.chunk_by!r}")
        check_capacity(self.capacity, self.chunk_by)
        check_chunk_sizes(self.chunk_sizes)
        check_flags(self, "local_first", "serial")
        if not is_integer(self.local_start) or not 0 <= self.local_start <= LOCAL_PARTS:
            raise ValueError(f"local_start must be 0..{LOCAL_PARTS} sixteenths, got {self.local_start!r}")
        for name in ("window", "backward_window"):
            if not is_integer(getattr(self, name)) or not 1 <= getattr(self, name) <= MAX_CHUNKS:
                raise ValueError(f"{name} must be 1..{MAX_CHUNKS}, got {getattr(self, name)!r}")

    @cached_property
    def num_chunks(self) -> int:
        return len(self.chunk_sizes)

    @cached_property
    def num_local_slices(self) -> int:
        """How many segments of rows stand before the chunks: two with local_first, at the start and at the end."""
        return 2 if self.local_first else 0

    @cached_property
    def num_segments(self) -> int:
        return self.num_local_slices + self.num_chunks

    def bounds(self, count: int) -> tuple[int, ...]:
        """Return the (C+1) bounds of the chunks of a rank's tokens or experts: sizes (1, 2) cut 9 at 0, 3, 9."""
        total, reached = sum(self.chunk_sizes), (0, *accumulate(self.chunk_sizes))
        return tuple(count * size // total for size in reached)

    def local_bound(self, num_tokens: int) -> int:
        """Return the first token whose local pairs run at the end."""
        return num_tokens * self.local_start // LOCAL_PARTS

    def __str__(self) -> str:
        sizes = self.chunk_sizes
        if len(set(sizes)) == 1:
            words = f"{len(sizes)} equal chunks" if len(sizes) > 1 else "1 chunk"
        else:
            words = f"{len(sizes)} chunks of relative sizes {', '.join(map(str, sizes))}"
        if self.chunk_by == "experts":
            words += " of experts"
        if self.serial:
            words += ", not overlapped"
        if self.local_first:
            words += f", {self.local_start}/{LOCAL_PARTS} of the local pairs first"
        for name, window in (("forward", self.window), ("backward", self.backward_window)):
            if window < len(sizes):
                words += f", {window} exchanges of a kind under way in {name}"
        if self.wire_dtype is not None:
            words += f", rows sent as {str(self.wire_dtype).removeprefix('torch.')}"
        if self.capacity is not None:
            words += f", capacity {self.capacity}"
        if self.balance is not None:
            words += f", balance {self.balance} with at most {self.max_copies} copies on a rank"
        return words


def check_overlap(overlap: object) -> None:
    """Raise TypeError unless this is an OverlapConfig or an OverlapPlan."""
    if not isinstance(overlap, (OverlapConfig, OverlapPlan)):
        raise TypeError(
            f"overlap must be an OverlapConfig or an OverlapPlan, got {overlap!r}: use OverlapConfig(num_chunks=4), say"
        )
