"""The router's kernels against plain PyTorch on the device at hand: what they choose, and every gradient."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.routing import RoutingRule
from tritonmoe.ops.backends.kernel_check import Checked, check_ids, distances
from tritonmoe.routing.fused import route_by_kernels
from tritonmoe.routing.plain import route_by_torch
from tritonmoe.routing.token_routing import Routing

__all__ = ["ROUTERS", "SMALL_ROUTERS", "CheckedRouter", "check_router"]


@dataclass(frozen=True)
class CheckedRouter:
    """A router that is checked."""

    name: str
    config: MoEConfig
    dtype: torch.dtype = torch.bfloat16
    num_tokens: int = 300


def _config(num_experts: int, top_k: int, hidden_size: int = 96) -> MoEConfig:
    return MoEConfig(hidden_size, 16, num_experts, top_k)


_DEEPSEEK = replace(
    _config(64, 6),
    score_function="sigmoid",
    selection_bias=True,
    routed_scaling_factor=2.5,
    num_expert_groups=8,
    top_k_groups=4,
)
ROUTERS = (
    CheckedRouter("router, bf16", _config(128, 8)),
    CheckedRouter("router, groups", _DEEPSEEK),
    CheckedRouter("router, odd sizes", replace(_config(60, 4, 67), score_function="sqrtsoftplus", renormalize=False)),
    CheckedRouter("router, fp16", replace(_config(32, 4), softmax_after_topk=True), torch.float16),
    CheckedRouter("router, fp32", _config(32, 4), torch.float32),
)
"""Every kind of scores, and every way in which the products are made."""
SMALL_ROUTERS = tuple(replace(router, num_tokens=20) for router in ROUTERS)
"""For Triton's interpreter."""


class _Operands:
    """The same random numbers, in any dtype."""

    def __init__(self, router: CheckedRouter, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        config, num_tokens = router.config, router.num_tokens

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(device)

        self.x = draw(num_tokens, config.hidden_size).to(router.dtype)
        self.weight = (draw(config.num_experts, config.hidden_size) * config.hidden_size**-0.5).to(router.dtype)
        bias = draw(config.num_experts).float() * 0.1
        self.bias = bias if config.selection_bias else None
        outputs = ((num_tokens, width) for width in (config.num_experts, config.num_experts, config.top_k))
        self.doutputs = [draw(*shape) for shape in outputs]

    def run(
        self, route: Callable[[Tensor, Tensor, Tensor | None], Routing], dtype: torch.dtype
    ) -> tuple[Routing, dict[str, Tensor]]:
        """Return what `route` chooses in this dtype, and its results and gradients by name."""
        x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (self.x, self.weight))
        routing = route(x, weight, self.bias)
        results = {"logits": routing.logits, "scores": routing.scores, "weights": routing.topk_weights}
        doutputs = [dout.to(value.dtype) for dout, value in zip(self.doutputs, results.values(), strict=True)]
        dx, dweight = torch.autograd.grad(list(results.values()), (x, weight), doutputs)
        return routing, {**results, "gradient of x": dx, "gradient of the weight": dweight}


def check_router(router: CheckedRouter, device: torch.device) -> Iterator[Checked]:
    """Route random tokens with the kernels, and compare with fp64.

    Ids may differ where the scores do by no more than rounding, which these tokens' don't.
    """
    operands = _Operands(router, device)
    plainly = partial(route_by_torch, config=router.config)
    by_kernels = partial(route_by_kernels, rule=RoutingRule.of(router.config).encode())
    routing, actual = operands.run(by_kernels, router.dtype)
    plain_routing, plain = operands.run(plainly, router.dtype)
    exact = operands.run(plainly, torch.float64)[1]
    for name in ("topk_ids", "load"):
        yield check_ids(router.name, f"router: {name}", getattr(routing, name), getattr(plain_routing, name))
    for name, value in actual.items():
        yield Checked(router.name, f"router: {name}", distances(value, plain[name], exact[name].double(), value.dtype))
