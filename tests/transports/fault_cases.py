"""What the ranks of a case do, of which the last one fails in the middle of a layer call: on any transport.

On two levels there are four ranks, in nodes of two, and exchanges of three kinds: of all ranks, between nodes, inside.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import tritonmoe as tm
from tritonmoe.dispatch.count_exchange import MAX_SEGMENTS
from tritonmoe.tools.report.perfetto import write_chrome_trace
from tritonmoe.tools.report.timeline import layer_timeline
from tritonmoe.transports import PendingExchange, Transport, TwoLevelTransport
from tritonmoe.transports.local import CompletedExchange

SIZE, TWO_LEVEL_SIZE, NODE_SIZE = 3, 4, 2
VICTIM = SIZE - 1
TIMEOUT_S = 1.5
LATE_S = 0.5
CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=12, top_k=2)
TWO_CHUNKS = tm.OverlapConfig(2)
EXCHANGES = (
    "counts",
    "metadata",
    "dispatch 0",
    "dispatch 1",
    "combine 0",
    "combine 1",
    "backward counts",
    "combine_backward 0",
    "combine_backward 1",
    "dispatch_backward 0",
    "dispatch_backward 1",
    "routing_backward",
)
"""What a forward and backward in two chunks exchange, in this order."""
TWO_LEVEL_EXCHANGES = (
    "counts",
    "metadata",
    "dispatch 0",
    "dispatch 1",
    "node_metadata",
    *("node_dispatch local", "node_combine local"),
    *("node_dispatch 0", "node_combine 0", "combine 0"),
    *("node_dispatch 1", "node_combine 1", "combine 1"),
    *("node_dispatch local end", "node_combine local end"),
    "backward counts",
    *("combine_backward 0", "combine_backward 1"),
    *("node_combine_backward local", "node_dispatch_backward local", "node_routing_backward local"),
    *("node_combine_backward local end", "node_dispatch_backward local end", "node_routing_backward local end"),
    *("node_combine_backward 0", "node_dispatch_backward 0", "node_routing_backward 0", "dispatch_backward 0"),
    *("node_combine_backward 1", "node_dispatch_backward 1", "node_routing_backward 1", "dispatch_backward 1"),
    "routing_backward",
)
"""The same on two levels, on all of them together; node_ is inside a node."""


def is_victim(transport: Transport) -> bool:
    return transport.rank == transport.size - 1


class WatchedTransport(Transport):
    """Passes everything on, and does something of its own before every exchange."""

    def __init__(self, transport: Transport, before: Callable[[], None]) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport
        self._before = before

    def exchange(
        self, rows: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], out: Tensor | None = None
    ) -> PendingExchange:
        self._before()
        return self._transport.exchange(rows, input_splits, output_splits, out)

    def post_counts(self, counts: Tensor) -> PendingExchange:
        self._before()
        return self._transport.post_counts(counts)

    @property
    def generation(self) -> int:  # type: ignore[override]
        return self._transport.generation

    def give_up(self, what: str) -> None:
        self._transport.give_up(what)

    def rebuild(self) -> None:
        self._transport.rebuild()


def failing(transport: Transport, exchange: str, fault: Callable[[], None]) -> Transport:
    """Return the same transport with a fault before one exchange, whichever level it is on."""
    is_two_level = isinstance(transport, TwoLevelTransport)
    countdown = [(TWO_LEVEL_EXCHANGES if is_two_level else EXCHANGES).index(exchange)]

    def before() -> None:
        if countdown[0] == 0:
            fault()
        countdown[0] -= 1

    if not isinstance(transport, TwoLevelTransport):
        return WatchedTransport(transport, before)
    world, between, inside = (
        WatchedTransport(level, before) for level in (transport.world, transport.between_nodes, transport.inside_node)
    )
    return TwoLevelTransport(world, NODE_SIZE, between_nodes=between, inside_node=inside)


ROWS_OF_CHUNK_1 = 3 - 3 * MAX_SEGMENTS
"""A place in the message that a rank gets: it ends in rows of every segment, two local ones first, pairs, rows back. On
two levels it ends in rows to relay, and how many of them for each of two ranks."""
DAMAGED = 1
"""The rank whose message is damaged; on two levels it has the victim's place in the other node."""


class DamagingTransport(WatchedTransport):
    """A transport that returns another rank's counts, of which one has a bit too many, or too few."""

    def __init__(self, transport: Transport, place: int = ROWS_OF_CHUNK_1, bit: int = 4) -> None:
        super().__init__(transport, lambda: None)
        self._place, self._bit = place, bit

    def post_counts(self, counts: Tensor) -> PendingExchange:
        received = super().post_counts(counts).wait()
        received[DAMAGED, self._place] ^= self._bit
        return CompletedExchange(received)


def damaging(transport: Transport, *what: int) -> Transport:
    """Return the same transport with damaged counts: what DamagingTransport takes."""
    if not isinstance(transport, TwoLevelTransport):
        return DamagingTransport(transport, *what)
    return TwoLevelTransport(
        DamagingTransport(transport.world, *what),
        NODE_SIZE,
        between_nodes=transport.between_nodes,
        inside_node=transport.inside_node,
    )


def die() -> None:
    time.sleep(0.5)  # what was posted before has left
    os.kill(os.getpid(), signal.SIGKILL)


def step(transport: Transport, overlap: tm.OverlapConfig = TWO_CHUNKS, **options: Any) -> float:
    """Run forward and backward of a layer and give a number that all of it goes into."""
    return run_layer(transport, overlap, **options)[0]


def run_layer(
    transport: Transport, overlap: tm.OverlapConfig = TWO_CHUNKS, **options: Any
) -> tuple[float, tm.GroupedExperts]:
    experts = tm.GroupedExperts(CONFIG, transport, overlap, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(transport.rank)
    x = torch.randn(16, 8, generator=generator, requires_grad=True)
    weights, ids = torch.randn(16, CONFIG.num_experts, generator=generator).softmax(1).topk(2)
    weights.requires_grad_()
    if options:
        # One rank alone, with an activation of its own.
        up, down, num_experts = local(experts.gate_up_proj), local(experts.down_proj), CONFIG.num_experts
        y = tm.expert_parallel_mlp(
            x, ids, weights, up, down, num_experts=num_experts, transport=transport, overlap=overlap, **options
        )
    else:
        y = experts(x, ids, weights)
    y.square().sum().backward()
    assert x.grad is not None
    assert experts.gate_up_proj.grad is not None
    return float(y.detach().sum() + x.grad.sum() + local(experts.gate_up_proj.grad).sum()), experts


def local(tensor: Tensor) -> Tensor:
    """Return this rank's experts, of a DTensor too."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def killed_in(exchange: str) -> Callable[[Transport], object]:
    return lambda transport: step(failing(transport, exchange, die) if is_victim(transport) else transport)


def late(seconds: float) -> Callable[[Transport], object]:
    return lambda transport: step(
        failing(transport, "dispatch 1", lambda: time.sleep(seconds)) if is_victim(transport) else transport
    )


def fails_in_experts(fail: Callable[[], object]) -> Callable[[Transport], object]:
    """Let the last rank fail where its experts compute the first rows that came to it."""

    def run(transport: Transport) -> object:
        def activation(h: Tensor) -> Tensor:
            if h.shape[0] and is_victim(transport):
                fail()
            return h[:, :4].sigmoid() * h[:, 4:]

        return step(transport, activation=activation)

    return run


def fails_in_backward_experts(fail: Callable[[], object]) -> Callable[[Transport], object]:
    def run(transport: Transport) -> object:
        def activation(h: Tensor) -> Tensor:
            a = h[:, :4].sigmoid() * h[:, 4:]
            if a.requires_grad and is_victim(transport):
                a.register_hook(lambda _: fail())  # type: ignore[arg-type, return-value]
            return a

        return step(transport, activation=activation)

    return run


def corrupted_counts(transport: Transport) -> object:
    return step(damaging(transport) if is_victim(transport) else transport)


def different_chunks(transport: Transport) -> object:
    return step(transport, tm.OverlapConfig(3) if is_victim(transport) else TWO_CHUNKS)


def different_layer_order(transport: Transport) -> object:
    layers = [
        tm.MoELayer(CONFIG, transport, TWO_CHUNKS, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    x = torch.ones(3, 8)
    for layer in layers[::-1] if is_victim(transport) else layers:
        x = layer(x)
    return float(x.detach().sum())


def full_disk(transport: Transport) -> object:
    """Every rank traces its first call, and the last one has no room for that; the others go on to the next call."""
    _, experts = run_layer(transport)
    trace = {"first": [layer_timeline("first", experts.last_report)]}
    write_chrome_trace(Path("/dev/full" if is_victim(transport) else "/dev/null"), trace)
    return step(transport)


def interrupted(transport: Transport) -> object:
    return late(60.0)(transport)


CASES: dict[str, Callable[[Transport], object]] = {
    "killed_in_dispatch": killed_in("dispatch 1"),
    "killed_in_experts": fails_in_experts(die),
    "killed_in_combine": killed_in("combine 1"),
    "killed_in_backward": killed_in("combine_backward 1"),
    "killed_in_backward_experts": fails_in_backward_experts(die),
    "late": late(LATE_S),
    "too_late": late(2 * TIMEOUT_S),
    "corrupted_counts": corrupted_counts,
    "different_chunks": different_chunks,
    "different_layer_order": different_layer_order,
    "full_disk": full_disk,
    "interrupted": interrupted,
    "one_interrupted": interrupted,
    "healthy": step,
}
"""On one level; the last one shows that nothing of the others is in the way."""
QUICK_TWO_LEVEL_CASES: dict[str, Callable[[Transport], object]] = {
    "killed_in_dispatch": CASES["killed_in_dispatch"],
    "killed_in_node_dispatch": killed_in("node_dispatch 1"),
    "killed_in_node_backward": killed_in("node_combine_backward 0"),
    **{name: CASES[name] for name in ("late", "corrupted_counts", "interrupted", "healthy")},
}
TWO_LEVEL_CASES: dict[str, Callable[[Transport], object]] = {
    "killed_in_node_dispatch": killed_in("node_dispatch 1"),
    "killed_in_node_combine": killed_in("node_combine 1"),
    "killed_in_node_backward": killed_in("node_combine_backward 0"),
    "killed_in_node_dispatch_backward": killed_in("node_dispatch_backward 1"),
    **CASES,
}
