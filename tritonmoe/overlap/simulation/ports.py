"""Ports: when rows have arrived that ranks send each other, each through a port of its own."""

import torch
from torch import Tensor

from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.overlap.steps import Way

__all__ = ["Ports"]

EXACT_RANKS = 64
"""Up to so many ranks the time of every message is computed; beyond, an exchange ends when its busiest port is done."""


class Ports:
    """The port of every rank, through which its exchanges pass: in turn, or all that are under way at the same speed.

    group_of_rank: (W,) numbers; ranks with the same one exchange with each other. None where all ranks do.
    """

    def __init__(self, work: LayerWork, link: LinkCosts, group_of_rank: Tensor | None = None) -> None:
        self.link = link
        self.group_of_rank = (
            torch.zeros(work.size, dtype=torch.int64, device="cpu") if group_of_rank is None else group_of_rank
        )
        self.is_in_one_group = self.group_of_rank[:, None] == self.group_of_rank if work.size <= EXACT_RANKS else None
        self.ports = {way: work.ports(link, way) for way in Way}
        self.has_copies = {way: work.travelling(way) > 0 for way in (Way.TO_COPIES, Way.AMONG_COPIES, Way.TO_OWNERS)}
        """(W, W): whether rank i sends rank k anything of copied experts, as most don't; rows go from all to all."""
        self.inside_ports = {way: work.inside_ports(link, way) for way in Way}
        """Those to the other ranks of a node, where they are second ones."""
        self.inside_clock = torch.zeros(work.size, dtype=torch.float64, device="cpu")
        each, self.link_s = link.each, dict[Way, Tensor]()
        """(W, W), where ways from rank to rank differ: the seconds of one byte per travelling row."""
        self.link_clock = torch.zeros(0, device="cpu")
        """(W, W), there: when each is free."""
        if each is not None:
            self.link_s = {way: work.travelling(way) * each.link_s for way in Way}
            self.link_clock = torch.zeros_like(each.link_s)
        self.messages: dict[int, Tensor] = {}
        """When the rows of each exchange have arrived, from rank i to rank k; without an entry that is not known."""
        self.clock = torch.zeros(work.size, dtype=torch.float64, device="cpu")
        """(W,): where exchanges take turns, when the port is free; where they share it, up to when it has worked."""
        self.remaining: dict[int, Tensor] = {}
        """Where exchanges share the port: the seconds of work (W,) that each of them has left."""
        self.arrivals: dict[int, Tensor] = {}
        """When each exchange has arrived (W,), as far as that is known."""

    def post(self, number: int, now: Tensor, row_bytes: float, way: Way | None) -> None:
        """Post exchange `number` at (W,) `now`, of so many bytes for each row that travels."""
        way = way or Way.TO_EXPERTS
        out_s, in_s = (seconds * row_bytes for seconds in self.ports[way])
        inside = self.inside_ports[way]
        near_s = None if inside is None else tuple(seconds * row_bytes for seconds in inside)
        if self.link.is_shared:
            self._work_off(now)
            self.remaining[number] = torch.maximum(_busiest(out_s, in_s, near_s), self._slowest_link(way, row_bytes))
            return
        start, near_start = torch.maximum(now, self.clock), torch.maximum(now, self.inside_clock)
        self.clock = start + torch.maximum(out_s, in_s) / self.link.alone_share
        if near_s is not None:
            self.inside_clock = near_start + torch.maximum(*near_s) / self.link.alone_share
        if self.is_in_one_group is not None:
            # A message from i to k occupies both ends' ports until the busier one is done.
            message_s = torch.maximum(out_s[:, None], in_s) / self.link.alone_share
            begin = torch.maximum(start[:, None], start)
            if near_s is not None:
                near_message_s = torch.maximum(near_s[0][:, None], near_s[1]) / self.link.alone_share
                message_s = torch.where(self.is_in_one_node, near_message_s, message_s)
                begin = torch.where(self.is_in_one_node, torch.maximum(near_start[:, None], near_start), begin)
            if self.link_s:
                link_s = self.link_s[way] * row_bytes
                begin = torch.maximum(begin, self.link_clock)
                if self.link.is_rendezvous:  # the receiver's word that it may come is behind what that one sends
                    begin = torch.maximum(begin, self.link_clock.T)
                self.link_clock = torch.where(link_s > 0, begin + link_s, self.link_clock)
                message_s = torch.maximum(message_s, link_s)
            latency_s = self.link.latency_s if self.link.each is None else self.link.each.latency_s
            is_sent = self.is_in_one_group & self.has_copies.get(way, self.is_in_one_group)
            arrival = (begin + message_s + latency_s).where(is_sent, -1.0)
            if len(arrival) > 1:
                arrival.fill_diagonal_(-1.0)
            self.messages[number] = arrival
            self.arrivals[number] = torch.maximum(arrival.amax(0), arrival.amax(1))
        else:
            busiest = torch.maximum(_busiest(out_s, in_s, near_s), self._slowest_link(way, row_bytes))
            arrival = self._of_group(torch.maximum(start, near_start)) + self._of_group(busiest) / self.link.alone_share
            self.arrivals[number] = arrival + self._latency_s

    @property
    def is_in_one_node(self) -> Tensor:
        """(W, W): whether rank i reaches rank k over their second ports."""
        node_size = self.link.port_node_size
        assert node_size is not None
        node = torch.arange(len(self.clock), device="cpu") // node_size
        return node[:, None] == node

    @property
    def _latency_s(self) -> float:
        return self.link.latency_s if self.link.each is None else float(self.link.each.latency_s.max())

    def _slowest_link(self, way: Way, row_bytes: float) -> Tensor:
        """Return the longest time (W,) that a message of each rank takes on its own way."""
        if not self.link_s:
            return torch.zeros_like(self.clock)
        link_s = self.link_s[way].clone().fill_diagonal_(0) * row_bytes
        return torch.maximum(link_s.amax(0), link_s.amax(1))

    def beside(self, now: Tensor, seconds: Tensor) -> Tensor:
        """Return how long compute of (W,) `seconds` takes from `now` on, slower while exchanges are under way."""
        lost = self.link.contention
        if not lost:
            return seconds
        if self.link.is_shared:
            self._work_off(now)
            busy_until = self.clock
            if self.remaining:
                levels, widths = self._levels()
                busy_until = busy_until + (
                    torch.diff(levels, dim=0, prepend=torch.zeros_like(levels[:1])) * widths
                ).sum(0)
        else:
            busy_until = torch.maximum(self.clock, self.inside_clock)
        return seconds + lost * torch.minimum(seconds / (1 - lost), (busy_until - now).clamp(min=0))

    def arrival(self, number: int) -> Tensor:
        """Return (W,) when the exchange has arrived, if nothing is posted before that."""
        if number not in self.arrivals:
            levels, widths = self._levels()
            below = torch.cat([torch.zeros_like(levels[:1]), levels[:-1]])
            reached = (self.remaining[number] - below).clamp(min=0).minimum(levels - below)
            own = self.clock + (reached * widths).sum(0)
            self.arrivals[number] = self._of_group(own) + self._latency_s
        return self.arrivals[number]

    def _of_group(self, values: Tensor) -> Tensor:
        """Return every rank the largest value of its group."""
        most = torch.zeros_like(values).scatter_reduce(0, self.group_of_rank, values, "amax", include_self=False)
        return most[self.group_of_rank]

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Return the remaining work of all exchanges, ascending, and what a second of it takes in each stretch."""
        levels = torch.stack(list(self.remaining.values())).sort(0).values
        widths = torch.arange(len(levels), 0, -1, dtype=levels.dtype, device="cpu")
        widths[-1] = 1 / self.link.alone_share
        return levels, widths[:, None]

    def _work_off(self, now: Tensor) -> None:
        """Let every port work until `now`, all its exchanges at the same speed."""
        elapsed = (now - self.clock).clamp(min=0)
        self.clock = torch.maximum(self.clock, now)
        if not self.remaining:
            return
        levels, widths = self._levels()
        steps = levels - torch.cat([torch.zeros_like(levels[:1]), levels[:-1]])
        before = torch.cumsum(steps * widths, 0) - steps * widths
        level = ((elapsed - before) / widths).clamp(min=0).minimum(steps).sum(0)
        for number, left in self.remaining.items():
            self.remaining[number] = (left - level).clamp(min=0)
        for number in [n for n, left in self.remaining.items() if n in self.arrivals and not left.any()]:
            del self.remaining[number]


def _busiest(out_s: Tensor, in_s: Tensor, near_s: tuple[Tensor, ...] | None) -> Tensor:
    """Return (W,): for how long the busiest port of each rank is occupied, the two ways of a second one included."""
    busiest = torch.maximum(out_s, in_s)
    return busiest if near_s is None else torch.maximum(busiest, torch.maximum(*near_s))
