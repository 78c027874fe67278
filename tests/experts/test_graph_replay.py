"""What a CUDA graph of four layers would hold, without a card: forward and backward replay with no host work of ours.

A graph holds launches of kernels and PyTorch's own operations on the device, with the memory that they had when it was
captured. Both are recorded here, in order, and then run again alone, on other tokens: whatever Python did between them
is left out, so that the results are right only if nothing depends on it. `test_cuda_graph.py` captures on a card.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import tritonmoe as tm
from tritonmoe.experts import operator

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from tritonmoe.ops.kernels import launch  # noqa: E402

NUM_LAYERS, NUM_TOKENS, NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 5, 3, 2, 16, 16
INTERPRETER = GPUTarget("none", "interpreter", 1)
SHAPES = (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN), (NUM_EXPERTS, HIDDEN, INTERMEDIATE)
LAUNCHES = {("eager", "hidden"): 10, ("eager", "input"): 11, ("operator", "hidden"): 11, ("operator", "input"): 12}
"""Of a layer's forward and backward; an operator's backward groups again."""
OURS = {
    torch.ops.tritonmoe.moe_mlp.default: operator._moe_mlp,
    torch.ops.tritonmoe.moe_mlp_backward.default: operator._moe_mlp_backward,
}
HOST_READS = {"_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim"}
"""Operations whose result the host reads, or whose shape it has to know: no graph can hold them."""


class Graph(TorchDispatchMode):
    """Records what would be enqueued on a device: launches, and PyTorch's operations with the results they wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Callable[[], object]] = []
        self.num_launches = 0
        self.host_reads: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in OURS:  # what stands behind the operator is enqueued, not the operator
            with self:
                return OURS[func]._init_fn(*args)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in HOST_READS:
            self.host_reads.append((name, args[0].dtype, args[0].numel()))
        elif "empty" not in name and (func._schema.is_mutable or not _is_view(result, args)):
            self.nodes.append(lambda: _write_again(result, func, args, kwargs))
        return result

    def take(self, item: launch.Launch) -> None:
        """Run a launch, and keep it."""
        self.num_launches += 1
        self.nodes.append(lambda: item.kernel[item.grid](*item.args, **item.constexprs))
        with _disable_current_modes():
            self.nodes[-1]()

    def replay(self) -> None:
        for node in self.nodes:
            node()


def _is_view(result: Any, args: Sequence[Any]) -> bool:
    """Return whether a result is memory that was there: aten.to, say, copies or gives what it was given."""
    given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
    return isinstance(result, Tensor) and result.untyped_storage().data_ptr() in given


def _write_again(result: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    again = func(*args, **kwargs)
    before, now = ([value] if isinstance(value, Tensor) else list(value or ()) for value in (result, again))
    for memory, value in zip(before, now, strict=True):
        if memory.data_ptr() != value.data_ptr():
            memory.copy_(value)


def recorded(step: Callable[[], list[Tensor]]) -> tuple[Graph, list[Tensor]]:
    """Run a step, and give what it would have enqueued, and its results."""
    graph = Graph()
    with graph, launch.recording(INTERPRETER, graph.take):
        return graph, step()


def python_files_of(run: Callable[[], None]) -> set[str]:
    """Return the files of whose functions one was called."""
    files: set[str] = set()

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


def draw(seed: int) -> dict[str, Tensor]:
    """Return x, dout (T, D), topk_ids and topk_weights (T, K) of every layer; some pairs are skipped."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"x": random(NUM_TOKENS, HIDDEN), "dout": random(NUM_TOKENS, HIDDEN)}
    for layer in range(NUM_LAYERS):
        tensors[f"ids {layer}"] = torch.randint(-1, NUM_EXPERTS, (NUM_TOKENS, TOP_K), generator=generator)
        tensors[f"weights {layer}"] = random(NUM_TOKENS, TOP_K)
    return tensors


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels run in the interpreter here")
@pytest.mark.sweep(1)
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("way", ["eager", "operator"])
def test_four_layers_replay_without_the_host(way: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`operator`: the calls that torch.compile's graphs hold."""
    if way == "eager":  # the mode that records must not send calls another way
        monkeypatch.setattr(sys.modules["tritonmoe.experts.moe_mlp"], "_is_traced", lambda x: False)
    static, generator = draw(0), torch.Generator().manual_seed(1)
    weights = [
        [torch.randn(shape, generator=generator).mul(0.2).requires_grad_() for shape in SHAPES]
        for _ in range(NUM_LAYERS)
    ]
    inputs = [static["x"], *(static[f"weights {layer}"] for layer in range(NUM_LAYERS)), *itertools.chain(*weights)]
    for value in inputs:
        value.requires_grad_()

    def step() -> list[Tensor]:
        y = static["x"]
        for layer, (w1, w2) in enumerate(weights):
            routing = static[f"ids {layer}"], static[f"weights {layer}"]
            y = y + tm.moe_mlp(y, *routing, w1, w2, backend="triton", save=save)
        return [y, *torch.autograd.grad(y, inputs, static["dout"])]

    graph, results = recorded(step)
    assert graph.num_launches == NUM_LAYERS * LAUNCHES[way, save]
    # The mark beside a Function's saved tensors is on the host; nothing that a kernel wrote is read.
    assert set(graph.host_reads) <= {("_local_scalar_dense", torch.float64, 1)}
    for name, value in draw(2).items():
        static[name].data.copy_(value)
    for result in results:
        result.data.fill_(torch.nan)
    with torch.no_grad():
        files = python_files_of(graph.replay)
    ours = {file for file in files if "/tritonmoe/" in file}
    assert all("/tritonmoe/ops/kernels/" in file for file in ours), "only kernels, which the interpreter runs in Python"
    replayed = [result.clone() for result in results]
    for number, (one, other) in enumerate(zip(replayed, step(), strict=True)):
        assert torch.equal(one, other), number
