"""What each kernel must compute and move, and the shortest time in which a card could do it."""

from dataclasses import dataclass

from tritonmoe.backends.pair_work import WEIGHT_GRADS, pair_work
from tritonmoe.benchmarks.shapes import LayerShape
from tritonmoe.config.formats import bytes_per_value

__all__ = ["BACKWARD_PRODUCTS", "FORWARD_PRODUCTS", "H100", "Card", "Work", "kernel_work", "product_flops"]

FORWARD_PRODUCTS = ("up", "down")
BACKWARD_PRODUCTS = ("down_grad", "up_grad", *WEIGHT_GRADS)


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
    d, f, n = shape.hidden_size, shape.intermediate_size, num_tokens * shape.top_k
    of_pair = pair_work(d, f, gated=shape.layout.gated)
    elements = {"W1": (2 if shape.layout.gated else 1) * f * d, "W2": f * d}
    weight_bytes = element_bytes if shape.weight_format is None else bytes_per_value(shape.weight_format)
    w1, w2 = (round(min(shape.num_experts, n) * of * weight_bytes) for of in elements.values())
    all_w1, all_w2 = (shape.num_experts * of * element_bytes for of in elements.values())
    index, gate_weights = 4 * n, 4 * n
    others = {
        "up": w1 + index,
        "down": w2,
        "gather_sum": index + gate_weights,
        "down_grad": w2 + index + gate_weights + 4 * n,
        "up_grad": w1,
        "gather_sum_grad": index,
        "weight_grad W1": index + all_w1,
        "weight_grad W2": index + all_w2,
    }
    work = {"group": Work(0, 8 * n + 2 * index)}
    for name, num_bytes in others.items():
        if shape.weight_format is None or name not in WEIGHT_GRADS:
            flops, token_elements, pair_elements = of_pair[name]
            rows = (num_tokens * token_elements + n * pair_elements) * element_bytes
            work[name] = Work(n * flops, rows + num_bytes)
    return work


def product_flops(shape: LayerShape, num_tokens: int, *, backward: bool) -> int:
    """Return the FLOPs of a layer's products in a forward, or in a forward and backward."""
    work = kernel_work(shape, num_tokens)
    names = (*FORWARD_PRODUCTS, *(BACKWARD_PRODUCTS if backward else ()))
    return sum(work[name].flops for name in names if name in work)
