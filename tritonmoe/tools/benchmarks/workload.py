"""What a layer benchmark runs: the shapes of known models, tokens, and where their router sends them."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritonmoe.config import overlap as overlap_config
from tritonmoe.runtime.files import Json, read_json
from tritonmoe.runtime.plain_pickle import load_tensors

__all__ = ["MODELS", "Workload", "draw_ids"]

MODELS = {
    "tiny": (8, 2, 64, 64),
    "coarse": (8, 2, 512, 1024),
    "fine": (64, 8, 512, 256),
    "granite-3.0-1b-a400m": (32, 8, 1024, 512),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "deepseek-v3": (256, 8, 7168, 2048),
}
"""E, K, D and F by name; the models before mixtral-8x7b are small enough for a CPU."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_IDS_BYTES = 1 << 30
NAMED_WIRE_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in overlap_config.WIRE_DTYPES if dtype is not None
}


@dataclass(frozen=True)
class Workload:
    """One layer call on every rank: shapes, routing, and whether its backward runs."""

    model: str
    num_tokens: int
    """T, the tokens of each rank."""
    routing: str = "uniform"
    """"uniform", "zipf:S" (expert popularity falls as its place to the power of -S; places drawn at random),
    "remote" (uniform over the experts of the other ranks), or a file of ids."""
    dtype: str = "float32"
    backward: bool = True
    seed: int = 0
    wire_dtype: str | None = None
    """OverlapConfig.wire_dtype, by its name."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return MODELS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_wire_dtype(self) -> torch.dtype | None:
        return None if self.wire_dtype is None else NAMED_WIRE_DTYPES[self.wire_dtype]

    def as_json(self) -> Json:
        """Return what results say of it."""
        return {
            "model": self.model,
            "E_K_D_F": list(self.shape),
            "tokens": self.num_tokens,
            "dtype": self.dtype,
            "wire_dtype": self.wire_dtype,
            "routing": self.routing,
            "pass": "forward+backward" if self.backward else "forward",
        }


def draw_ids(workload: Workload, rank: int, size: int) -> Tensor:
    """Return this rank's ids (T, K) int64.

    A file is a tensor (W * T or more, K) written by torch.save (".pt"), or JSON: a list of rows of ids. Rank i takes
    rows i * T .. (i + 1) * T.

    Raises:
        ValueError: the routing is not known, can't be drawn for these ranks, or the file doesn't fit.
    """
    num_experts, top_k, _, _ = workload.shape
    num_tokens, routing = workload.num_tokens, workload.routing
    generator = torch.Generator().manual_seed(workload.seed * 7919 + rank + 1)
    kind, _, exponent = routing.partition(":")
    if routing in ("uniform", "remote") or kind == "zipf":
        log_share = torch.zeros(num_experts)
        if kind == "zipf":
            places = torch.randperm(num_experts, generator=torch.Generator().manual_seed(workload.seed))
            log_share -= _exponent(routing, exponent) * torch.log1p(places.to(torch.float32))
        if kind == "remote":
            local = num_experts // size
            if top_k > num_experts - local:
                raise ValueError(
                    f"routing 'remote' needs top_k ({top_k}) experts on other ranks, and there are "
                    f"{num_experts - local}: use more ranks or another model"
                )
            log_share[rank * local : (rank + 1) * local] = -math.inf
        uniform = torch.rand(num_tokens, num_experts, generator=generator).clamp_(min=1e-30)
        # Gumbel noise: the K largest are K draws without replacement from the shares.
        return (log_share - torch.log(-torch.log(uniform))).topk(top_k).indices
    path = Path(routing)
    if not path.is_file():
        raise ValueError(f"routing must be uniform, remote, zipf:S or a file of ids, got {routing!r}")
    ids = _read_ids(path)
    if ids.dim() != 2 or ids.shape[1] != top_k or len(ids) < size * num_tokens:
        raise ValueError(
            f"{path} must have at least W * T = {size} * {num_tokens} rows of K = {top_k} ids, got {tuple(ids.shape)}"
        )
    return ids[rank * num_tokens : (rank + 1) * num_tokens].to(torch.int64)


def _read_ids(path: Path) -> Tensor:
    """Return the tensor of integers that a file holds; raises ValueError where it holds anything else."""
    try:
        if path.suffix == ".pt":
            ids = load_tensors(path)
        else:
            ids = torch.tensor(read_json(path, MAX_IDS_BYTES))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds no ids: a file of ids is a tensor written by torch.save (.pt), or JSON, a list of rows"
        ) from error
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{path} must hold a tensor of integers, the ids, got {kind}")
    return ids


def _exponent(routing: str, exponent: str) -> float:
    try:
        value = float(exponent)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 10:
        raise ValueError(f"routing 'zipf:S' needs an exponent S from 0 to 10, as in zipf:1.2, got {routing!r}")
    return value
