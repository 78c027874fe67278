"""Which basic block goes first where threads or wavefronts are at several ones."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["BlockOrder", "order_blocks"]


@dataclass(frozen=True)
class BlockOrder:
    """The order of a kernel's blocks, and last the end."""

    later: tuple[frozenset[int], ...]
    """For each block those that come after it, loops left aside."""
    depths: tuple[int, ...]
    """How many loops a block is in."""

    def first(self, blocks: Collection[int]) -> int:
        """Return one of `blocks` that nobody at another one of them can still come to, so that they meet there."""
        if len(blocks) == 1:
            return next(iter(blocks))
        first = (block for block in blocks if not any(block in self.later[other] for other in blocks))
        return max(first, key=self.depths.__getitem__)


def order_blocks(following: Sequence[Sequence[int]], entry: int = 0) -> BlockOrder:
    """Order blocks by those that may come next to each; one past the last is the end."""
    after = [*following, ()]
    before: list[list[int]] = [[] for _ in after]
    for index, blocks in enumerate(after):
        for block_after in blocks:
            before[block_after].append(index)
    later: dict[int, frozenset[int]] = {}
    depths = [0] * len(after)
    path, entered = [entry], {entry}
    while path:
        index = path[-1]
        next_block = next((number for number in after[index] if number not in entered), None)
        if next_block is not None:
            entered.add(next_block)
            path.append(next_block)
            continue
        for head in after[index]:
            if head not in later:  # it is on the path: a loop goes from there to here
                for inside in _between(head, index, before):
                    depths[inside] += 1
        ahead = [number for number in after[index] if number in later]
        later[index] = frozenset(ahead).union(*(later[number] for number in ahead))
        path.pop()
    return BlockOrder(tuple(later.get(index, frozenset()) for index in range(len(after))), tuple(depths))


def _between(head: int, tail: int, before: list[list[int]]) -> set[int]:
    """Return the blocks of the loop that begins with `head`, where `tail` branches back to."""
    found, open_ends = {head}, [tail]
    while open_ends:
        block = open_ends.pop()
        if block not in found:
            found.add(block)
            open_ends += before[block]
    return found
