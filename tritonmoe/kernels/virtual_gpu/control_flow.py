"""The order in which a kernel's basic blocks come."""

from collections.abc import Sequence

__all__ = ["reverse_postorder"]


def reverse_postorder(following: Sequence[Sequence[int]], entry: int = 0) -> tuple[int, ...]:
    """Give each block's place such that, but for loops, it is before those that come after it.

    following: for each block those that may come next; a number past the last block stands for the end.
    """
    number = len(following)
    order = [number] * number
    entered = {entry}
    path = [entry]
    while path:
        after = following[path[-1]] if path[-1] < len(following) else ()
        next_block = next((item for item in after if item not in entered), None)
        if next_block is None:
            number -= 1
            if path[-1] < len(order):
                order[path[-1]] = number
            path.pop()
        else:
            entered.add(next_block)
            path.append(next_block)
    return tuple(order)
