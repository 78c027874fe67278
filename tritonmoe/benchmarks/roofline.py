"""What each kernel must compute and move, and the shortest time in which a card could do it."""

from dataclasses import dataclass

from tritonmoe.benchmarks.shapes import LayerShape
from tritonmoe.config.formats import bytes_per_value

__all__ = ["BACKWARD_PRODUCTS", "FORWARD_PRODUCTS", "H100", "Card", "Work", "kernel_work", "product_flops"]

FORWARD_PRODUCTS = ("up", "down")
BACKWARD_PRODUCTS = ("down_grad", "up_grad", "weight_grad W1", "weight_grad W2")


@dataclass(frozen=True)
class Card:
    """Peak rates of one card."""

    name: str
    tflops: float
    """Dense bf16 products, 10^12 floating-point operations a second."""
    tb_per_s: float
    """Device memory, 10^12 bytes a second."""
    source: str


H100 = Card(
    "H100 SXM",
    tflops=989.4,
    tb_per_s=3.35,
    source="NVIDIA H100 data sheet: 1979 TFLOP/s bf16 with sparsity, half of it dense; 3.35 TB/s",
)


@dataclass(frozen=True)
class Work:
    """Floating-point operations and the fewest bytes of device memory of one kernel."""

    flops: int
    num_bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return self.flops / self.num_bytes if self.num_bytes else 0.0

    def seconds(self, card: Card) -> float:
        """Return the longer of the time for arithmetic and the time for memory, both at the card's peak."""
        return max(self.flops / (card.tflops * 1e12), self.num_bytes / (card.tb_per_s * 1e12))

    def bound(self, card: Card) -> str:
        """Say which of the two is longer: "compute" or "memory"."""
        return "compute" if self.flops / (card.tflops * 1e12) >= self.num_bytes / (card.tb_per_s * 1e12) else "memory"


def kernel_work(shape: LayerShape, num_tokens: int, *, element_bytes: int = 2) -> dict[str, Work]:
    """Return every kernel's operations and bytes, forward and backward, when each tensor is read or written once.

    Rows that several experts read (x, dout) and weights count once, as if the L2 cache kept them: the fewest bytes
    that a kernel can move, so the time that follows is a bound and no prediction. min(E, N) experts have a token.
    Packed weights have no gradients.
    """
    t, k, d, f = num_tokens, shape.top_k, shape.hidden_size, shape.intermediate_size
    n = t * k
    gates = 2 if shape.layout.gated else 1
    experts = min(shape.num_experts, n)
    b = element_bytes
    x, pairs, hidden, inner = t * d * b, n * d * b, n * gates * f * b, n * f * b
    weight_bytes = b if shape.weight_format is None else bytes_per_value(shape.weight_format)
    w1, w2 = (round(experts * width * f * d * weight_bytes) for width in (gates, 1))
    all_w1, all_w2 = (shape.num_experts * width * f * d * b for width in (gates, 1))
    index, gate_weights = 4 * n, 4 * n
    up_flops, down_flops = 2 * n * d * gates * f, 2 * n * d * f
    work = {
        "group": Work(0, 8 * n + 2 * index),
        "up": Work(up_flops, x + w1 + index + hidden + inner),
        "down": Work(down_flops, inner + w2 + pairs),
        "gather_sum": Work(2 * n * d, pairs + index + gate_weights + x),
        "down_grad": Work(down_flops, x + w2 + hidden + index + gate_weights + hidden + inner + 4 * n),
        "up_grad": Work(up_flops, hidden + w1 + pairs),
        "gather_sum_grad": Work(n * d, pairs + index + x),
    }
    if shape.weight_format is None:
        work["weight_grad W1"] = Work(up_flops, x + hidden + index + all_w1)
        work["weight_grad W2"] = Work(down_flops, x + inner + index + all_w2)
    return work


def product_flops(shape: LayerShape, num_tokens: int, *, backward: bool) -> int:
    """Return the FLOPs of a layer's products in a forward, or in a forward and backward."""
    work = kernel_work(shape, num_tokens)
    names = (*FORWARD_PRODUCTS, *(BACKWARD_PRODUCTS if backward else ()))
    return sum(work[name].flops for name in names if name in work)
