"""Sizes and repetitions of a day on a GPU, and of its rehearsal on a CPU: the same plan, tiny and interpreted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from tritonmoe.tools.benchmarks.shapes import GPU_SHAPES, LayerShape, tiny

__all__ = ["DAY", "HEADLINE", "REHEARSAL", "SMALL", "Setting"]

HEADLINE = "Qwen3-30B-A3B"
SMALL = replace(GPU_SHAPES[HEADLINE], num_experts=4, top_k=2, hidden_size=256, intermediate_size=128)
"""The headline's layer with its whole tiles, but few of them."""


@dataclass(frozen=True)
class Setting:
    """Sizes and numbers of repetitions, the same for every case of a run."""

    is_rehearsal: bool
    device_type: str
    dtype_name: str
    layer_backend: str
    """What a whole layer runs on; single operations and checks always run the Triton kernels."""
    headline_tokens: int
    peer_tokens: tuple[int, ...]
    sweep_tokens: tuple[int, ...]
    other_shapes: tuple[str, ...]
    shape_tokens: tuple[int, ...]
    kernel_tests: tuple[str, ...]
    other_tests: tuple[str, ...]
    """Those that run on a GPU too, in the end."""
    offloaded_tokens: tuple[int, ...]
    """Of layers whose experts come from host memory, and from files."""
    few_tokens: tuple[int, ...]
    """Those with which layers take turns, so that weights come from the device's memory."""
    rounds: int
    reruns: int
    batch_s: float
    overlap: str
    """Arguments of `tritonmoe bench overlap`: one rank computes, its peers are replayed over a link as slow as it."""
    training: str
    """Arguments of `tritonmoe bench transformers`: a model under every implementation of its experts in turn."""
    most_candidates: int | None
    """Tiles to try for each product; None for all."""
    clocks_command: tuple[str, ...] | None
    """A program that prints SM clock (MHz), power (W) and temperature (C) again and again; None for the GPU's."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def shapes(self) -> Mapping[str, LayerShape]:
        """Return the layers by name, shrunk in a rehearsal."""
        if not self.is_rehearsal:
            return GPU_SHAPES
        return {name: replace(tiny(shape), num_experts=4, top_k=2) for name, shape in GPU_SHAPES.items()}


DAY = Setting(
    is_rehearsal=False,
    device_type="cuda",
    dtype_name="bfloat16",
    layer_backend="triton",
    headline_tokens=32768,
    peer_tokens=(32768, 4096, 8),
    sweep_tokens=(16384, 8192, 4096, 2048, 512, 64, 8, 1),
    other_shapes=tuple(name for name in GPU_SHAPES if name != HEADLINE),
    shape_tokens=(32768, 4096, 512, 64, 8, 1),
    kernel_tests=tuple(
        f"tests/ops/kernels/test_{name}.py"
        for name in ("triton_backend", "group", "weight_grad", "tma", "row_gather", "several_steps", "tile_runs")
    ),
    other_tests=(
        *(f"tests/ops/kernels/test_{name}.py" for name in ("properties", "backward_properties", "options")),
        *(f"tests/expert_parallel/test_{name}.py" for name in ("cuda_graph", "host_reads")),
        *("tests/experts/test_saved_memory.py", "tests/dispatch/test_capacity.py", "tests/test_grouping.py"),
        *("tests/transports/test_emulated_delivery.py", "tests/transports/test_contract.py"),
    ),
    offloaded_tokens=(32768, 131072, 8192, 2048),
    few_tokens=(1, 8, 64),
    rounds=7,
    reruns=50,
    batch_s=0.02,
    overlap="--emulate 8 --compute-ratio 1 --model qwen3-30b-a3b --tokens 8192 --chunks 1 2 4 --dtype bfloat16 "
    "--rounds 7",
    training="--subjects model --passes training --routings untrained --dtypes bfloat16 --tokens 4096 "
    "--layers 4 --hidden-size 2048 --intermediate-size 768 --experts 128 --top-k 8",
    most_candidates=None,
    clocks_command=None,
)
_PRINTING_CLOCKS = "import time\nwhile True:\n print('1980, 650.5, 60', flush=True)\n time.sleep(0.01)"
REHEARSAL = Setting(
    is_rehearsal=True,
    device_type="cpu",
    dtype_name="float32",
    layer_backend="torch",
    headline_tokens=12,
    peer_tokens=(12, 8),
    sweep_tokens=(1,),
    other_shapes=("gpt-oss",),
    shape_tokens=(12,),
    kernel_tests=("tests/ops/kernels/test_tile_table.py",),
    other_tests=(),
    offloaded_tokens=(12,),
    few_tokens=(8,),
    rounds=1,
    reruns=2,
    batch_s=0.0,
    overlap="--emulate 2 --rate 1gbit --model tiny --tokens 16 --chunks 1 2 --rounds 1",
    training="--subjects model --passes training --routings untrained --dtypes float32 --tokens 16 --rounds 1 "
    "--seconds 0 --layers 1 --hidden-size 64 --intermediate-size 16 --experts 4 --top-k 2",
    most_candidates=2,
    clocks_command=("python", "-c", _PRINTING_CLOCKS),
)
