"""Products of all pairs with their experts' weights, and sums of outer products, in PyTorch: which calls those are.

One product per expert, or one batched product with every expert's pairs padded to the largest number; shared between a
CPU's threads by expert, or inside each product.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmoe.ops.backends.fetched_matrices import FetchedMatrices
from tritonmoe.ops.backends.ops import accumulation_dtype
from tritonmoe.ops.grouping import Grouping
from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_threads import for_each, num_workers

__all__ = ["Matrices", "expert_slices", "outer_sums", "pads", "pair_products"]

SMALL_PAIRS_PER_EXPERT = 32
"""Up to so many pairs per expert, all experts' products may be one batched product."""
LARGEST_PADDING = 2.5
"""The batched product has at most so many times as many rows as there are pairs."""
FEW_ROWS, USED_SHARE = 16, 0.75
"""It may have more where no expert has more than FEW_ROWS pairs, and at least USED_SHARE of the experts have pairs:
their weights take longer to come from memory than the products take to compute."""
FEWEST_SHARED_BYTES = 2**20
"""A CPU's threads compute products of at most FEW_ROWS rows side by side where their weights have so many bytes
together: inside one such product a second thread has little or nothing to do."""
FEWEST_SHARED_EXPERTS = {4: 9}
"""And where there are so many products, by the bytes of an element (2 products, if it isn't listed). In fp32 those of
one token's 8 experts already wait for memory."""
ROWS_MULTIPLE, FEWEST_ROUNDED = 8, 33
"""On a CPU, products in narrow dtypes have a multiple of ROWS_MULTIPLE rows, from FEWEST_ROUNDED on: see _padding."""


Matrices = Tensor | FetchedMatrices
"""What pairs are multiplied by: (E, in, out), of which a product takes one expert's."""


def pads(grouping: Grouping) -> bool:
    """Return whether one batched product, all experts' pairs padded to the largest number, beats one per expert.

    The threads of a CPU share the experts of a batched product. In one product per expert they share the rows, which
    are too few for them where pairs are few.
    """
    num_pairs, num_experts = grouping.host_expert_offsets[-1], grouping.num_experts
    if not 0 < num_pairs <= SMALL_PAIRS_PER_EXPERT * num_experts:
        return False
    experts, counts = grouping.host_counts
    if max(counts) <= FEW_ROWS and len(experts) >= USED_SHARE * num_experts:
        return True
    return num_experts * max(counts) <= LARGEST_PADDING * num_pairs


def pair_products(
    values: Tensor,
    index: Tensor | None,
    matrices: Matrices,
    bias: Tensor | None,
    grouping: Grouping,
    out: Tensor | None,
    addend: Tensor | None = None,
) -> Tensor:
    """Multiply all pairs' values by their experts' matrices (E, in, out), and add the experts' bias: (N, out).

    A pair's values are values[index[n]], or values[n] where index is None. addend: (N, out), added too; perhaps `out`.
    """
    width = matrices.shape[2]
    is_padded = pads(grouping)
    if addend is not None and (is_padded or _is_rounded(values, max(grouping.host_counts[1], default=0))):
        products = pair_products(values, index, matrices, bias, grouping, None)
        return torch.add(products, addend, out=out)
    if is_padded:
        places = grouping.padded_pairs
        padded = values.index_select(0, places.pairs if index is None else index.index_select(0, places.pairs))
        padded = padded.view(grouping.num_experts, -1, values.shape[1])
        products = _batched_products(padded, matrices, bias, grouping).view(-1, width)
        if out is None:
            return products.index_select(0, places.of_pairs)
        return torch.index_select(products, 0, places.of_pairs, out=out)
    if out is None:
        out = values.new_empty(grouping.num_pairs, width)
    if index is not None:
        values = values.index_select(0, index)
    if addend is not None and addend is not out:
        out.copy_(addend)
    if _is_rounded(values, max(grouping.host_counts[1], default=0)):
        _write_rounded_products(values, matrices, bias, grouping, out)
    else:
        _write_products(values, matrices, bias, grouping, out, adds=addend is not None)
    return out


def _batched_products(padded: Tensor, matrices: Matrices, bias: Tensor | None, grouping: Grouping) -> Tensor:
    """Return the products of every expert's padded rows (E, m, in) with its matrix, and its bias: (E, m, out)."""
    if isinstance(matrices, Tensor):
        return torch.bmm(padded, matrices) if bias is None else torch.baddbmm(bias.unsqueeze(1), padded, matrices)
    products = padded.new_empty(*padded.shape[:2], matrices.shape[2])

    def multiply(group: slice) -> None:
        with matrices.group(group, grouping.host_counts[0]) as fetched:
            if bias is None:
                torch.bmm(padded[group], fetched, out=products[group])
            else:
                torch.baddbmm(bias[group].unsqueeze(1), padded[group], fetched, out=products[group])

    for_each(multiply, matrices.groups(grouping.host_counts[0]), padded.device)
    return products


def _write_products(
    values: Tensor, matrices: Matrices, bias: Tensor | None, grouping: Grouping, out: Tensor, adds: bool
) -> None:
    """Write the product of each expert's rows to `out`, or add it to what is there, with the expert's bias."""
    experts, counts = grouping.host_counts
    parts, targets = values.split_with_sizes(counts), out.split_with_sizes(counts)

    def multiply(item: tuple[int, Tensor, Tensor]) -> None:
        e, part, target = item
        _multiply(part, matrices, e, None if bias is None else bias[e], target, adds)

    items = list(zip(experts, parts, targets, strict=True))
    is_few = max(counts, default=0) <= FEW_ROWS and len(items) >= FEWEST_SHARED_EXPERTS.get(values.itemsize, 2)
    nbytes = matrices.shape[1] * matrices.shape[2] * values.itemsize
    if is_few and len(items) * nbytes >= FEWEST_SHARED_BYTES:
        for_each(multiply, items, values.device)
    else:
        for item in items:
            multiply(item)


def _write_rounded_products(
    values: Tensor, matrices: Matrices, bias: Tensor | None, grouping: Grouping, out: Tensor
) -> None:
    """Write the product of each expert's rows, their number rounded up, to `out`, with the expert's bias."""
    last = 0
    for e, count in zip(*grouping.host_counts, strict=True):
        expert_bias = None if bias is None else bias[e]
        first, last = last, last + count
        num_rows = count + _padding(values, count)
        if first + num_rows <= grouping.num_pairs:
            # This also writes the first rows of the next experts; their own products come later and replace them.
            rows = slice(first, first + num_rows)
            _multiply(values[rows], matrices, e, expert_bias, out[rows])
        elif num_rows <= last:
            product = values.new_empty(num_rows, out.shape[1])
            _multiply(values[last - num_rows : last], matrices, e, expert_bias, product)
            out[first:last] = product[-count:]
        else:
            _multiply(values[first:last], matrices, e, expert_bias, out[first:last])


def _multiply(
    part: Tensor, matrices: Matrices, expert: int, bias: Tensor | None, out: Tensor, adds: bool = False
) -> None:
    """Write the product of rows with an expert's matrix and its bias to `out`, or add them to what is there."""
    if not isinstance(matrices, Tensor):
        with matrices.one(expert) as matrix:
            _multiply_by(part, matrix, bias, out, adds)
    else:
        _multiply_by(part, matrices[expert], bias, out, adds)


def _multiply_by(part: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor, adds: bool) -> None:
    if adds:
        torch.addmm(out, part, matrix, out=out)
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(part, matrix, out=out)
    else:
        torch.addmm(bias, part, matrix, out=out)


def _padding(values: Tensor, num_pairs: int) -> int:
    """Return how many rows to add to a product of num_pairs.

    On a CPU, PyTorch generates the code of a product in a narrow dtype for its very shape, which takes longer than the
    product, and keeps 1024 of them. Every routing has other numbers of pairs; rounded up, they are few shapes.
    """
    return -num_pairs % ROWS_MULTIPLE if _is_rounded(values, num_pairs) else 0


def _is_rounded(values: Tensor, num_pairs: int) -> bool:
    return num_pairs >= FEWEST_ROUNDED and values.itemsize < 4 and values.device.type == "cpu"


def outer_sums(
    pair_values: Tensor, row_values: Tensor, grouping: Grouping, pairs_first: bool, accumulate: Tensor | None
) -> Tensor | None:
    """Sum outer(pair_values[n], row_values[row of n]) over each expert's pairs, or with the factors swapped.

    Where `accumulate` is given the sums are added into it, and None is given back.
    """
    order, row_index = grouping.source_order, grouping.row_index

    def factors(positions: Tensor | slice, padding: int = 0) -> tuple[Tensor, Tensor]:
        stored = positions if order is None else order[positions]
        if isinstance(stored, slice):
            rows = stored if grouping.rows_are_pairs else row_index[stored]
        else:
            rows = row_index.index_select(0, stored)
        both = _rows_of(pair_values, stored, padding), _rows_of(row_values, rows, padding)
        return both if pairs_first else both[::-1]

    if accumulate is not None:

        def accumulate_expert(expert: tuple[int, slice]) -> None:
            left, right = factors(expert[1])
            _accumulate_product(accumulate[expert[0]], left.mT, right)

        _for_each_expert(accumulate_expert, grouping)
        return None
    num_experts = grouping.num_experts
    widths = (pair_values.shape[1], row_values.shape[1])
    out = cpu_memory.empty(num_experts, *(widths if pairs_first else widths[::-1]), like=pair_values)
    if pads(grouping):
        places = grouping.padded_pairs
        left, right = factors(places.pairs)
        (left if left.shape[1] < right.shape[1] else right).masked_fill_(~places.used.unsqueeze(1), 0)
        torch.bmm(left.view(num_experts, -1, left.shape[1]).mT, right.view(num_experts, -1, right.shape[1]), out=out)
        for e, (first, last) in enumerate(pairwise(grouping.host_expert_offsets)):
            if first == last:  # its places have other experts' pairs, perhaps not finite
                out[e].zero_()
        return out

    def sum_expert(expert: tuple[int, slice]) -> None:
        left, right = factors(expert[1], _padding(pair_values, expert[1].stop - expert[1].start))
        torch.mm(left.mT, right, out=out[expert[0]])

    _for_each_expert(sum_expert, grouping)
    for e, (first, last) in enumerate(pairwise(grouping.host_expert_offsets)):
        if first == last:
            out[e].zero_()
    return out


def _rows_of(values: Tensor, rows: Tensor | slice, padding: int) -> Tensor:
    """Return rows of values, and so many rows of zeros behind them."""
    if isinstance(rows, slice):
        return F.pad(values[rows], (0, 0, 0, padding)) if padding else values[rows]
    if not padding:
        return values.index_select(0, rows)
    found = values.new_empty(rows.shape[0] + padding, values.shape[1])
    torch.index_select(values, 0, rows, out=found[:-padding])
    found[-padding:] = 0
    return found


def _for_each_expert(function: Callable[[tuple[int, slice]], None], grouping: Grouping) -> None:
    """Call `function` on each expert that has pairs and their positions in source order, on a CPU several at a time.

    The expert with the most pairs comes first, so that the threads end together. Experts with more than half of a
    thread's share of all pairs come one after the other, and all threads share the operations of each.
    """
    experts = sorted(expert_slices(grouping), key=lambda expert: expert[1].start - expert[1].stop)
    device = grouping.pair_index.device
    share = grouping.host_expert_offsets[-1] / (2 * num_workers(device))
    num_large = sum(positions.stop - positions.start > share for _, positions in experts)
    for expert in experts[:num_large]:
        function(expert)
    for_each(function, experts[num_large:], device)


def expert_slices(grouping: Grouping) -> Iterator[tuple[int, slice]]:
    """Return (expert, its positions in source order) for the experts that have pairs."""
    for e, (first, last) in enumerate(pairwise(grouping.host_expert_offsets)):
        if first < last:
            yield e, slice(first, last)


def _accumulate_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right into `target` in fp32 or wider, rounding once."""
    acc = accumulation_dtype(left.dtype)
    if target.dtype == acc:
        torch.addmm(target, left.to(acc), right.to(acc), out=target)  # FlopCounterMode has no formula for addmm_
    else:
        product = torch.mm(left.to(acc), right.to(acc))
        target.copy_(target.to(torch.promote_types(acc, target.dtype)).add_(product))
