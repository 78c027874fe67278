"""Grouping: the order in which a rank's routed pairs are stored, and the ways back.

Worked example, one chunk, E=3 experts, K=2, four rows, -1 marks a skipped pair:

    topk_ids        = [[1, 0], [1, 2], [-1, 0], [1, 1]]       flat pair ids 0..7, row = pair // K
    pair_index      = [1, 5, 0, 2, 6, 7, 3]                   expert 0: pairs 1, 5; expert 1: 0, 2, 6, 7; expert 2: 3
    expert_offsets  = [0, 2, 6, 7]                            expert e has positions offsets[e] .. offsets[e+1]
    inverse         = [[2, 0], [3, 6], [-1, 1], [4, 5]]       where each pair is stored

With several chunks the storage order is (chunk, expert, source rank, token), so that one chunk is one contiguous
range that can be computed as soon as its rows have arrived. `source_order` lists the same positions by
(expert, source rank, token): an order that does not depend on the chunks, in which weight gradients are summed.

A chunk has a range of rows, or from `first_expert_chunk` on a range of experts. Then a row may have pairs in several
chunks. It belongs to the last of them, and its sum takes results from all chunks of experts so far.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from tritonmoe.runtime.cpu_memory import to_device

__all__ = ["Grouping", "GroupingBlock", "RowSources"]


@dataclass(frozen=True)
class RowSources:
    """Which rank sent which received rows, as the host knows it: a chunk's rows come in runs, one rank's each.

    Example:
        ranks (0, 1) and rows [[2, 1], [1, 1]]: chunk 0 has two rows of rank 0, then one of rank 1; chunk 1 has one of
        each.
    """

    ranks: tuple[int, ...]
    """The rank that sent each run, the same in every chunk; for rows by (source rank, token) they ascend."""
    rows: torch.Tensor
    """(C, runs) int64 on the CPU."""

    def of_rows(self, device: torch.device) -> torch.Tensor:
        """Return the rank (R,) int64 that sent each row, without waiting for the device."""
        ranks = torch.tensor(self.ranks, dtype=torch.int64, device="cpu").repeat(len(self.rows))
        ranks, counts = to_device(torch.stack([ranks, self.rows.flatten()]), device)
        return ranks.repeat_interleave(counts, output_size=int(self.rows.sum()))


@dataclass(frozen=True)
class Grouping:
    """The stored order of N pairs taken from R rows of K ids; made by the `group` op.

    N may be larger than the number of pairs that do work (an upper bound that needs no host read); then
    positions from expert_offsets[-1] on are padding: pair_index is -1 there and no op reads or writes them. With
    several chunks it is each chunk's last positions, with anything in pair_index, and source_order ends in zeros.
    """

    pair_index: torch.Tensor
    """(N,) int32: storage position -> flat pair id, row * K + topk_slot; rows count from the layer's first row."""
    expert_offsets: torch.Tensor
    """(E+1,) int32, leading zero: where each expert's pairs start in source order (one chunk: also in storage)."""
    inverse: torch.Tensor
    """(R, K) int32: pair -> storage position *relative to the start of its row's chunk* (with chunks of experts: of the
    first of them), -1 where skipped. Rows come in the order of their chunks; see returned_rows."""
    source_order: torch.Tensor | None
    """(N,) int32: storage positions by (expert, source rank, token); None where that is the storage order."""
    chunk_expert_offsets: torch.Tensor
    """(C, E+1) int32: expert offsets of each chunk, relative to the chunk's first position."""
    chunk_row_offsets: tuple[int, ...]
    """(C+1) host integers: chunk c finishes rows chunk_row_offsets[c] .. chunk_row_offsets[c+1] of `inverse`."""
    chunk_pair_offsets: tuple[int, ...]
    """(C+1) host integers: chunk c holds storage positions chunk_pair_offsets[c] .. [c+1]."""
    layer_rows: int | None = None
    """The number of rows of the layer of which this is a chunk; None where this is the whole layer."""
    first_expert_chunk: int | None = None
    """The first chunk that is a range of experts, as all chunks from it on are; None where all are ranges of rows."""
    returned_rows: torch.Tensor | None = None
    """(R,) int32, with chunks of experts: the row that each row of `inverse` is among those that pair_index counts.
    None where that is the same one."""
    rows_are_pairs: bool = False
    """Whether row n is that of the pair at position n, so that nothing needs to be gathered: see by_pair."""
    row_tiles: torch.Tensor | None = None
    """(C, slots, 4, 4) int32: the tiles of each chunk's products, see ops/kernels/row_tiles.py; None where none are
    listed yet, or ever."""
    gathered_rows: tuple[int, int] | None = None
    """The first of the rows that this chunk's pairs take, and where these end; None where they may be any."""
    num_experts: int = field(init=False)
    num_pairs: int = field(init=False)
    """N, padding included."""
    top_k: int = field(init=False)

    def __post_init__(self) -> None:
        vars(self).update(  # every launch asks, and a tensor tells its shape slowly
            num_experts=self.expert_offsets.shape[0] - 1,
            num_pairs=self.pair_index.shape[0],
            top_k=self.inverse.shape[1],
        )

    @property
    def num_layer_rows(self) -> int:
        """The rows of the whole layer, the same number in every chunk."""
        return self.chunk_row_offsets[-1] if self.layer_rows is None else self.layer_rows

    @property
    def pairs_per_expert(self) -> float:
        """The layer's pairs (skipped ones too) per expert: known without a host read, the same in every chunk."""
        return self.num_layer_rows * self.top_k / self.num_experts

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_row_offsets) - 1

    @cached_property
    def row_index(self) -> torch.Tensor:
        """(N,) int32: storage position -> row (padding gives -1)."""
        return torch.div(self.pair_index, self.top_k, rounding_mode="floor")

    @cached_property
    def host_expert_offsets(self) -> list[int]:
        """expert_offsets as Python integers (a host read where the tensor is on a device)."""
        return self.expert_offsets.tolist()

    @cached_property
    def host_chunk_offsets(self) -> list[list[int]]:
        """chunk_expert_offsets as Python integers (a host read where the tensor is on a device)."""
        return self.chunk_expert_offsets.tolist()

    @cached_property
    def host_counts(self) -> tuple[list[int], list[int]]:
        """The experts that have pairs, and how many each has."""
        counts = [last - first for first, last in pairwise(self.host_expert_offsets)]
        return [e for e, count in enumerate(counts) if count], [count for count in counts if count]

    @cached_property
    def padded_pairs(self) -> "PaddedPairs":
        """As many places for every expert as the one with most pairs needs (a host read where tensors are on a device).

        Example:
            expert_offsets [0, 2, 3]: two places each, pairs [0, 1, 2, 2], of_pairs [0, 1, 2].
        """
        counts = self.expert_offsets[1:] - self.expert_offsets[:-1]
        used = (torch.arange(max(self.host_counts[1]), device=counts.device) < counts.unsqueeze(1)).view(-1)
        return PaddedPairs(used.cumsum(0, dtype=torch.int32).clamp_(min=1).sub_(1), used.nonzero().view(-1), used)

    @cached_property
    def by_pair(self) -> "Grouping":
        """The same pairs, of rows that are in storage order themselves, one for each pair: for sums over pairs alone.

        Example:
            expert_offsets [0, 2, 3]: pair_index [0, 1, 2], with K = 1.
        """
        places = torch.arange(self.num_pairs, dtype=torch.int32, device=self.pair_index.device)
        by_pair = replace(
            self,
            pair_index=places,
            inverse=places.unsqueeze(1),
            chunk_row_offsets=self.chunk_pair_offsets,
            layer_rows=None,
            first_expert_chunk=None,
            returned_rows=None,
            rows_are_pairs=True,
            gathered_rows=None,
        )
        known = {"host_expert_offsets", "host_counts", "padded_pairs"} & vars(self).keys()
        vars(by_pair).update({name: vars(self)[name] for name in known})
        return by_pair

    def chunk(self, index: int) -> "Grouping":
        """Return chunk `index` as a Grouping of its own: its pairs, its rows' inverse, its expert offsets.

        Row numbers in pair_index still count from the layer's first row.
        """
        if self.num_chunks == 1:
            return self
        first_row, last_row = self.chunk_row_offsets[index : index + 2]
        first_pair, last_pair = self.chunk_pair_offsets[index : index + 2]
        is_of_experts = self.first_expert_chunk is not None and index >= self.first_expert_chunk
        chunk = Grouping(
            pair_index=self.pair_index[first_pair:last_pair],
            expert_offsets=self.chunk_expert_offsets[index],
            inverse=self.inverse[first_row:last_row],
            source_order=None,
            chunk_expert_offsets=self.chunk_expert_offsets[index : index + 1],
            chunk_row_offsets=(first_row, last_row),
            chunk_pair_offsets=(0, last_pair - first_pair),
            layer_rows=self.chunk_row_offsets[-1],
            row_tiles=None if self.row_tiles is None else self.row_tiles[index : index + 1],
            gathered_rows=None if is_of_experts else (first_row, last_row),
        )
        if "host_chunk_offsets" in vars(self):
            vars(chunk)["host_expert_offsets"] = self.host_chunk_offsets[index]
        return chunk

    def among_empty_chunks(
        self, index: int, chunk_row_offsets: tuple[int, ...], chunk_pair_offsets: tuple[int, ...]
    ) -> "Grouping":
        """Return this one chunk as chunk `index` of several of which it is the only one with rows."""
        num_chunks = len(chunk_row_offsets) - 1
        chunk_expert_offsets = self.expert_offsets.new_zeros(num_chunks, self.num_experts + 1)
        chunk_expert_offsets[index] = self.expert_offsets
        return replace(
            self,
            chunk_expert_offsets=chunk_expert_offsets,
            chunk_row_offsets=chunk_row_offsets,
            chunk_pair_offsets=chunk_pair_offsets,
            row_tiles=None if self.row_tiles is None else self.row_tiles.expand(num_chunks, -1, -1, -1),
        )

    def in_expert_chunks(
        self,
        expert_bounds: tuple[int, ...],
        chunk_row_offsets: tuple[int, ...],
        chunk_pair_offsets: tuple[int, ...],
        received: torch.Tensor,
        returned: torch.Tensor,
    ) -> "Grouping":
        """Cut the last chunk at experts, and put rows where they lie.

        Args:
            expert_bounds: (C+1): chunk c of experts has the experts expert_bounds[c] .. expert_bounds[c+1].
            chunk_row_offsets, chunk_pair_offsets: of the chunks before the last one, and of the new ones.
            received, returned: (R,) int64: for each of the rows grouped here, its place among the rows that operations
                gather from, and its place in `inverse`.
        Example:
            E=2, K=1, topk_ids [[1], [0]] as one chunk, received and returned [1, 0], bounds (0, 1, 2): pair_index
            [1, 0] becomes [0, 1], chunk_expert_offsets [[0, 1, 2]] becomes [[0, 1, 1], [0, 0, 1]].
        """
        first, top_k = self.num_chunks - 1, self.top_k
        pair_index = received[self.row_index] * top_k + self.pair_index % top_k
        inverse, returned_rows = torch.empty_like(self.inverse), torch.empty_like(received, dtype=torch.int32)
        inverse[returned], returned_rows[returned] = self.inverse, received.to(torch.int32)
        offsets = self.chunk_expert_offsets[first]
        starts = offsets[to_device(torch.tensor(expert_bounds, device="cpu"), offsets.device), None]
        return replace(
            self,
            pair_index=pair_index.to(torch.int32),
            inverse=inverse,
            chunk_expert_offsets=torch.cat(
                [self.chunk_expert_offsets[:first], offsets.clamp(starts[:-1], starts[1:]) - starts[:-1]]
            ),
            chunk_row_offsets=chunk_row_offsets,
            chunk_pair_offsets=chunk_pair_offsets,
            first_expert_chunk=first,
            returned_rows=None if top_k == 1 else returned_rows,  # every row has one chunk
            row_tiles=None,
        )

    def blocks(self, max_pairs: int | None) -> list["GroupingBlock"]:
        """Cut one chunk's pairs into blocks of at most max_pairs: several small experts, or a part of a large one.

        None gives one block, with no host read.
        Example:
            expert_offsets [0, 2, 3, 8] with max_pairs=4 gives the positions 0..3 (experts 0 and 1), then 3..5 and
            5..8 (both of expert 2).
        """
        if max_pairs is None or self.num_pairs <= max_pairs:
            return [GroupingBlock(slice(0, self.num_pairs), slice(0, self.num_experts), self)]
        offsets = self.host_expert_offsets
        cuts: list[tuple[int, int, int]] = []  # (first position, its expert, last expert)
        for e in range(self.num_experts):
            start, count = offsets[e], offsets[e + 1] - offsets[e]
            num_parts = -(-count // max_pairs)
            for part in range(num_parts):
                first, last = start + count * part // num_parts, start + count * (part + 1) // num_parts
                if cuts and last - cuts[-1][0] <= max_pairs:
                    cuts[-1] = (*cuts[-1][:2], e)
                else:
                    cuts.append((first, e, e))
        ends = [first for first, _, _ in cuts[1:]] + [offsets[-1]]
        return [self._block(first, end, *experts) for (first, *experts), end in zip(cuts, ends, strict=True)]

    def _block(self, first: int, last: int, first_expert: int, last_expert: int) -> "GroupingBlock":
        experts = slice(first_expert, last_expert + 1)
        inside = [
            min(max(offset, first), last) - first for offset in self.host_expert_offsets[first_expert : last_expert + 2]
        ]
        expert_offsets = to_device(torch.tensor(inside, dtype=torch.int32, device="cpu"), self.expert_offsets.device)
        grouping = replace(
            self,
            pair_index=self.pair_index[first:last],
            expert_offsets=expert_offsets,
            chunk_expert_offsets=expert_offsets.unsqueeze(0),
            chunk_pair_offsets=(0, last - first),
            row_tiles=None,
        )
        vars(grouping)["host_expert_offsets"] = inside
        return GroupingBlock(slice(first, last), experts, grouping)

    def pairs_to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Bring one value per stored pair, (N,), back to (R, K); skipped pairs get exactly zero.

        Only for a Grouping of one chunk (inverse is relative to the chunk).
        """
        return torch.cat([values, values.new_zeros(1)]).take(self.inverse.long())  # -1 is the last one


class PaddedPairs(NamedTuple):
    """The experts' pairs padded to one number per expert: E times the largest number of places, expert by expert."""

    pairs: torch.Tensor
    """(places,) int32: the storage position of the pair in each place. A place without a pair repeats an earlier pair,
    one of its expert if there is any."""
    of_pairs: torch.Tensor
    """(N,) int64: the place of each pair."""
    used: torch.Tensor
    """(places,) bool: whether a place has a pair of its own."""


class GroupingBlock(NamedTuple):
    """Some of one chunk's pairs, for operations that go pair by pair (not for gather_sum: `inverse` is the chunk's)."""

    positions: slice
    """Where the pairs are stored in the chunk."""
    experts: slice
    """The experts that the pairs belong to; `grouping` counts its experts from the first of these."""
    grouping: Grouping
