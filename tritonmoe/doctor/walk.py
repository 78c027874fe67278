"""walk: what the steps of a graph take, with given times for its stretches of work and its exchanges."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.doctor.graph import Graph, Kind

__all__ = ["Moments", "Walker"]

RUN, POST, WAIT = int(Kind.RUN), int(Kind.POST), int(Kind.WAIT)


@dataclass(frozen=True)
class Moments:
    """When everything of a graph happened, as a walk gives it: seconds from when the first rank begins."""

    step_s: list[float]
    """How long each step took."""
    step_ends_s: list[float]
    started_s: list[float]
    """When each exchange had started, by member."""
    ended_s: list[float]


class Walker:
    """Walks one graph, as often as somebody asks what would be with other times.

    Raises:
        ValueError: the graph has no end: ranks wait for each other in a circle, so files contradict each other.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._rank = [member.rank for member in graph.members]
        self._lane = [member.rank * 1_000_003 + member.lane for member in graph.members]
        self._delay = [member.delay_s for member in graph.members]
        self._needs = [member.needs for member in graph.members]
        self._exchange = [member.exchange for member in graph.members]

    def step_times(self, run_s: Sequence[float], transfer_s: Sequence[float]) -> list[float]:
        """Give the seconds of every step, from when the last rank has ended the one before until it ends this one."""
        return self.moments(run_s, transfer_s).step_s

    def moments(self, run_s: Sequence[float], transfer_s: Sequence[float]) -> Moments:
        """Give when every exchange started and ended, and every step."""
        graph = self.graph
        num_ranks, num_members = len(graph.ranks), len(graph.members)
        now = list(graph.begin_s)
        at = [0] * num_ranks
        started: list[float | None] = [None] * num_members
        ended: list[float | None] = [None] * num_members
        missing = [len(members) for members in graph.exchanges]
        blocked = [False] * num_members
        last_of_lane: dict[int, int] = {}
        behind: dict[int, tuple[int, float]] = {}
        step_ends = [0.0] * len(graph.steps)
        ready = list(range(num_ranks))

        def start(member: int, moment: float) -> None:
            """Start an exchange on one rank, and end it on all ranks if that was the last of them."""
            todo = [(member, moment)]
            while todo:
                member, moment = todo.pop()
                started[member] = moment + self._delay[member]
                exchange = self._exchange[member]
                missing[exchange] -= 1
                if missing[exchange]:
                    continue
                members = graph.exchanges[exchange]
                latest: float = max(started[one] for one in members)  # type: ignore[type-var, assignment]
                for one in members:
                    needs = self._needs[one]
                    since = latest if needs is None else max(started[other] for other in needs)  # type: ignore[type-var]
                    end = ended[one] = since + transfer_s[one]  # type: ignore[operator]
                    if blocked[one]:
                        rank = self._rank[one]
                        now[rank] = max(now[rank], end)
                        ready.append(rank)
                    following = behind.pop(one, None)
                    if following is not None:
                        todo.append((following[0], max(following[1], end)))

        while ready:
            rank = ready.pop()
            program, place, moment = graph.programs[rank], at[rank], now[rank]
            num_items = len(program)
            while place < num_items:
                kind, index = program[place]
                place += 1
                if kind == RUN:
                    moment += run_s[index]
                elif kind == POST:
                    before = last_of_lane.get(self._lane[index])
                    last_of_lane[self._lane[index]] = index
                    if before is None:
                        start(index, moment)
                    elif (free := ended[before]) is not None:
                        start(index, max(moment, free))
                    else:
                        behind[before] = (index, moment)
                elif kind == WAIT:
                    end = ended[index]
                    if end is None:
                        blocked[index] = True
                        break
                    if end > moment:
                        moment = end
                elif moment > step_ends[index]:
                    step_ends[index] = moment
            at[rank], now[rank] = place, moment
        if any(place < len(program) for place, program in zip(at, graph.programs, strict=True)):
            raise ValueError("ranks wait for each other in a circle: these files are of different runs, or damaged")
        times, before_s = [], max(graph.begin_s, default=0.0)
        for end_s in step_ends:
            times.append(max(0.0, end_s - before_s))
            before_s = max(before_s, end_s)
        never = float("inf")  # handed over, but waited for by nobody, and not begun before the files end
        return Moments(
            times,
            step_ends,
            [never if moment is None else moment for moment in started],
            [never if moment is None else moment for moment in ended],
        )
