"""lines_of, Batches: the stages and micro-batches of a pipeline, as its sends, its receives and its backwards tell."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain

from tritonmoe.tools.doctor.trace import Busy, Part, RankTrace, union

__all__ = ["Batches", "lines_of"]


def lines_of(steps_of_ranks: Sequence[Sequence[Sequence[Part]]]) -> list[list[int]]:
    """Return the ranks of each pipeline from its first stage to its last, all of one length.

    There are none unless each rank is in one pipeline, whose first stage is the one that sends before it receives.
    """
    transfers = [[[part for part in parts if part.other is not None] for parts in steps] for steps in steps_of_ranks]
    others = [{part.other for part in chain.from_iterable(steps)} for steps in transfers]
    found: list[list[int]] = []
    for rank, steps in enumerate(transfers):
        if all(parts and parts[0].kind == "send" for parts in steps):
            line = [rank]
            while len(following := others[line[-1]] - {*line[-2:-1]}) == 1 and len(line) <= len(others):
                line += [one for one in following if one is not None]
            found.append(line)
    is_whole = sorted(chain.from_iterable(found)) == list(range(len(others))) and len(set(map(len, found))) == 1
    return found if is_whole else []


class Batches:
    """Which micro-batch a rank works on, in its steps.

    A forward ends with a send to the next stage, and a backward with one to the stage before. The last stage sends no
    forward, and the first one no backward: there they begin with a receive.
    """

    def __init__(
        self, trace: RankTrace, steps: Sequence[Sequence[Part]], place: tuple[int, int], line: Sequence[int]
    ) -> None:
        """place: the stage of the rank in its line, and the line's number."""
        self.stage, self.replica = place
        busy, backward = (trace.busy_start_s, trace.busy_end_s), (trace.backward_start_s, trace.backward_end_s)
        either = union(*([*of, *other] for of, other in zip(busy, backward, strict=True)))
        self.busy, self.backward, self.either = Busy(*busy), Busy(*backward), Busy(*either)
        before, _, after = (None, *line, None)[self.stage : self.stage + 3]
        self.bounds = [[_bounds(parts, *ways) for ways in ((after, before), (before, after))] for parts in steps]

    def parts(self, step: int, start_s: float, end_s: float) -> list[tuple[int, float]]:
        """Return what a rank computes between two moments: as in Run.batch, and the seconds of each."""
        busy_s, in_backward_s, either_s = (of.between(start_s, end_s) for of in (self.busy, self.backward, self.either))
        backward_s = max(0.0, busy_s + in_backward_s - either_s)
        counts = [bisect_right(moments, start_s) - is_begun for moments, is_begun in self.bounds[step]]
        sizes = [len(moments) for moments, _ in self.bounds[step]]
        if counts[1] == sizes[1]:  # what follows the last backward is of no micro-batch
            counts[0] = -1
        return [
            (2 * count + way if 0 <= count < size else -1, seconds)
            for way, (count, size, seconds) in enumerate(
                zip(counts, sizes, (busy_s - backward_s, backward_s), strict=True)
            )
        ]


def _bounds(parts: Sequence[Part], to: int | None, of: int | None) -> tuple[list[float], bool]:
    """Return when each micro-batch ends on a rank, or begins (True): when it is sent, else when it was received."""
    if to is not None:
        return sorted(part.posted_s for part in parts if (part.kind, part.other) == ("send", to)), False
    return sorted(part.end_s or part.start_s for part in parts if (part.kind, part.other) == ("recv", of)), True
