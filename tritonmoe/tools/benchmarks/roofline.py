"""What each kernel must compute and move, and the shortest time in which a GPU could do it."""

from dataclasses import dataclass

from tritonmoe.config.formats import find_format
from tritonmoe.ops.backends.pair_work import WEIGHT_GRADS, pair_work
from tritonmoe.tools.benchmarks.shapes import LayerShape
from tritonmoe.tools.planner.cluster import Gpu

__all__ = ["BACKWARD_PRODUCTS", "FORWARD_PRODUCTS", "Work", "kernel_work", "product_flops"]

FORWARD_PRODUCTS = ("up", "down")
BACKWARD_PRODUCTS = ("down_grad", "up_grad", *WEIGHT_GRADS)


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

    def seconds(self, gpu: Gpu) -> float:
        """Return the longer of the time for arithmetic and the time for memory, both at the GPU's peak, in bf16."""
        return max(self._seconds_of_each(gpu))

    def bound(self, gpu: Gpu) -> str:
        """Return which of the two is longer: "compute" or "memory"."""
        arithmetic_s, memory_s = self._seconds_of_each(gpu)
        return "compute" if arithmetic_s >= memory_s else "memory"

    def _seconds_of_each(self, gpu: Gpu) -> tuple[float, float]:
        return self.flops / (gpu.tflops["bf16"] * 1e12), self.num_bytes / (gpu.memory_tb_per_s * 1e12)


def kernel_work(shape: LayerShape, num_tokens: int, *, element_bytes: int = 2) -> dict[str, Work]:
    """Return every kernel's operations and bytes, forward and backward, when each tensor is read or written once.

    Rows that several experts read (x, dout) and weights count once, as if the L2 cache kept them: the fewest bytes
    that a kernel can move, so the time that follows is a bound and no prediction. min(E, N) experts have a token.
    Packed weights have no gradients.
    """
    d, f, n = shape.hidden_size, shape.intermediate_size, num_tokens * shape.top_k
    of_pair = pair_work(d, f, gated=shape.layout.gated)
    elements = {"W1": (2 if shape.layout.gated else 1) * f * d, "W2": f * d}
    weight_bytes = element_bytes if shape.weight_format is None else find_format(shape.weight_format).bytes_per_value
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
