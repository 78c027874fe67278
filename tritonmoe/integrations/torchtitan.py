"""torchtitan: `--override.imports tritonmoe.integrations.torchtitan.routed_experts` runs its experts through tritonmoe.

Dispatch, experts and combine are one overlapped call. Router, shared experts, counts of tokens and the load-balancing
bias stay torchtitan's, and so do FSDP2, the optimizer and checkpoints. torchtitan imports this, with itself.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.expert_parallel.expert_parallel_mlp import expert_parallel_mlp
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.transports import Transport, as_transport

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims

__all__ = ["FusedExperts", "OverlappedRoutedExperts", "routed_experts"]

GATE, DOWN, UP, BOTH = "w1_EFD", "w2_EDF", "w3_EFD", "w13_EGD"
"""torchtitan's names of its weights, in their order, and that of the two up-projections in one tensor (E, 2F, D)."""
NOT_COMPILED = (
    "tritonmoe's expert-parallel call is not compiled in torchtitan, whose blocks are compiled as a whole: leave out "
    '--compile.enable, or "model" in --compile.components'
)
ONE_BACKWARD = (
    "a second backward over one forward of tritonmoe's experts under selective activation checkpointing, which gives "
    "what it has kept for one recompute: run the forward again before it, or take full activation checkpointing, which "
    "runs their call again for each backward"
)


class FusedExperts(GroupedExperts):
    """The weights of torchtitan's GroupedExperts, gate and up in one parameter; state dicts have them apart."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """As that of GroupedExperts."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        del self.w1_EFD, self.w3_EFD
        self.w13_EGD = nn.Parameter(self.w2_EDF.new_empty(config.num_experts, 2 * config.hidden_dim, config.dim))
        self.register_state_dict_post_hook(_part)
        self.register_load_state_dict_pre_hook(_join)

    @torch.no_grad()
    def _init_self_parameters(self) -> None:
        """Draw the weights of GroupedExperts in its order and layout, so that a seed gives the same ones."""
        if self._param_init is None:  # super() says what is missing
            super()._init_self_parameters()
            return
        gate, up = _empty_half(self.w13_EGD), _empty_half(self.w13_EGD)
        for name, weight in ((GATE, gate), (DOWN, self.w2_EDF), (UP, up)):
            self._init_param(name, weight)
        self.w13_EGD.copy_(torch.cat([gate, up], dim=1))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return this rank's up- and down-projections in bf16, in which torchtitan's experts compute."""
        both, down = (
            weight.to_local() if isinstance(weight, DTensor) else weight for weight in (self.w13_EGD, self.w2_EDF)
        )
        return both.bfloat16(), down.bfloat16()

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Raise RuntimeError: these experts compute inside OverlappedRoutedExperts."""
        raise RuntimeError(
            "these experts compute inside OverlappedRoutedExperts, which must not be overridden again: leave the "
            "second override out"
        )


def _empty_half(both: Tensor) -> nn.Parameter:
    """Return an empty (E, F, D) beside w13_EGD (E, 2F, D), spread over the same ranks in the same way."""
    local = both.to_local() if isinstance(both, DTensor) else both
    half = local.new_empty(local.shape[0], local.shape[1] // 2, local.shape[2])
    if isinstance(both, DTensor):
        shape = torch.Size((both.shape[0], both.shape[1] // 2, both.shape[2]))
        stride = (shape[1] * shape[2], shape[2], 1)
        # Of a slice of a DTensor that is cut in this dimension, as FSDP2 cuts where it has more ranks than experts,
        # one would draw into a copy.
        half = DTensor.from_local(half, both.device_mesh, both.placements, run_check=False, shape=shape, stride=stride)
    return nn.Parameter(half)


def _part(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
    both = state_dict.pop(prefix + BOTH)
    half = both.shape[1] // 2
    state_dict[prefix + GATE] = both[:, :half].contiguous()
    state_dict[prefix + UP] = both[:, half:].contiguous()


def _join(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    if prefix + GATE in state_dict and prefix + UP in state_dict:
        halves = [state_dict.pop(prefix + name) for name in (GATE, UP)]
        state_dict[prefix + BOTH] = torch.cat(halves, dim=1)


class OverlappedRoutedExperts(RoutedExperts):
    """torchtitan's routed experts as one call, whose exchanges run beside the experts' compute."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """That of RoutedExperts, and how to overlap."""

        overlap: OverlapConfig = field(default_factory=OverlapConfig)
        expert_precision: ExpertPrecision | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.overlap, self.precision = config.overlap, config.expert_precision
        self.num_experts: int = config.inner_experts.num_experts
        self.transport: Transport | None = None

    def parallelize(self, parallel_dims: "ParallelDims") -> None:
        """Find the ranks that experts are spread over.

        Raises:
            ValueError: tensor parallelism would cut each expert, or E can't be divided by the ranks.
        """
        if parallel_dims.tp_enabled and not parallel_dims.ep_enabled:
            raise ValueError(
                "tensor parallelism without expert parallelism cuts each expert, and tritonmoe runs whole experts "
                f"only: set --parallelism.expert_parallel_degree {parallel_dims.tp} beside the "
                "tensor_parallel_degree, or leave the override out"
            )
        if self.num_experts % parallel_dims.ep:
            raise ValueError(
                f"the {self.num_experts} experts can't be divided by --parallelism.expert_parallel_degree "
                f"{parallel_dims.ep}: choose a degree that divides them"
            )
        super().parallelize(parallel_dims)
        mesh = parallel_dims.get_optional_mesh("ep")
        self.transport = None if mesh is None or mesh.size() == 1 else as_transport(mesh.get_group())

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Return the experts' weighted sums of each token, of local tensors."""
        top_k = topk_scores_BLK.shape[-1]
        x = x_BLD.reshape(-1, x_BLD.shape[-1]).bfloat16()
        ids, scores = topk_expert_ids_BLK.reshape(-1, top_k), topk_scores_BLK.reshape(-1, top_k).float()
        inner = self.inner_experts
        assert isinstance(inner, FusedExperts)
        weights = inner.weights()
        if self.transport is None:
            out = moe_mlp(x, ids, scores, *weights, precision=self.precision)
        else:
            out = self._over_ranks(self.transport, x, ids, scores, weights)
        return out.view(x_BLD.shape).type_as(x_BLD)

    @torch.compiler.disable(reason=NOT_COMPILED)
    def _over_ranks(
        self, transport: Transport, x: Tensor, ids: Tensor, scores: Tensor, weights: tuple[Tensor, Tensor]
    ) -> Tensor:
        checkpoint = _selective_checkpoint()
        if isinstance(checkpoint, _CachedTorchDispatchMode):
            return _take_result(checkpoint).again()
        # To SelectiveAC the call is one thing, whose result and saved tensors are kept: a recompute exchanges nothing.
        kept = saved_tensors_hooks(_as_it_is, _as_it_is) if checkpoint is not None else nullcontext()
        with _disable_current_modes(), kept:
            out = expert_parallel_mlp(
                x,
                ids,
                scores,
                *weights,
                num_experts=self.num_experts,
                transport=transport,
                overlap=self.overlap,
                precision=self.precision,
            )
            if checkpoint is not None:
                _kept_results(checkpoint).append(_KeptResult(out))
        return out


def _selective_checkpoint() -> _CachingTorchDispatchMode | _CachedTorchDispatchMode | None:
    """Return the mode in which selective activation checkpointing runs this forward, or its recompute; None outside."""
    modes = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    return next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, modes)), None)


def _kept_results(checkpoint: _CachingTorchDispatchMode | _CachedTorchDispatchMode) -> "list[_KeptResult | None]":
    """Return the results that a forward under selective activation checkpointing has kept; None where one was taken."""
    return checkpoint.storage.setdefault(OverlappedRoutedExperts, [])


def _take_result(checkpoint: _CachedTorchDispatchMode) -> "_KeptResult":
    """Return the result of the call that a recompute has come to, and keep it no longer.

    Raises:
        RuntimeError: another recompute has taken it, or the forward made fewer calls.
    """
    number = checkpoint.func_counter[OverlappedRoutedExperts]  # a recompute, which may end early, begins with 0 again
    checkpoint.func_counter[OverlappedRoutedExperts] += 1
    kept_results = _kept_results(checkpoint)
    if number >= len(kept_results):
        raise RuntimeError(
            f"a recompute has come to its call {number + 1} of routed experts; its forward made {len(kept_results)}: "
            "a recompute must make the calls of its forward, so nothing that decides on them may change in between"
        )
    result, kept_results[number] = kept_results[number], None
    if result is None:
        raise RuntimeError(ONE_BACKWARD)
    return result


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


class _KeptResult:
    """The result of a call under selective activation checkpointing, which its recompute gives again."""

    def __init__(self, out: Tensor) -> None:
        self.value, self.version, self.requires_grad = out.detach(), out._version, out.requires_grad

    def again(self) -> Tensor:
        """Return the result, a leaf: what is before the call gets its gradients from the forward's own graph.

        Raises:
            RuntimeError: the model has changed the result in place since.
        """
        if self.value._version != self.version:
            raise RuntimeError(
                "the result of tritonmoe's experts was changed in place under selective activation checkpointing, "
                "which keeps it for the recompute: change a copy, or take full activation checkpointing"
            )
        return self.value.requires_grad_(self.requires_grad)


@override(target=RoutedExperts.Config, description="tritonmoe: dispatch, experts and combine, overlapped")
def routed_experts(
    config: RoutedExperts.Config, expert_precision: Mapping[str, Any] | None = None, **overlap: Any
) -> OverlappedRoutedExperts.Config:
    """Return the configuration that runs these experts through tritonmoe.

    Args:
        expert_precision: what ExpertPrecision takes, as '...routed_experts={"expert_precision": {"format": "mxfp8"}}'.
        overlap: what OverlapConfig takes, as '...routed_experts={"num_chunks": 4}' on the command line.
    Raises:
        ValueError: experts of another kind (gpt_oss, quantised, fused by another override), or a communication backend
            that the model asks for.
    """
    if expert_precision is not None and not isinstance(expert_precision, Mapping):
        raise TypeError(
            f"expert_precision must be a mapping of what ExpertPrecision takes, got {expert_precision!r}: write "
            '{"format": "mxfp8"}'
        )
    inner, dispatcher = config.inner_experts, config.token_dispatcher
    if type(config) is not RoutedExperts.Config or type(inner) is not GroupedExperts.Config:
        kind = type(inner if type(config) is RoutedExperts.Config else config).__qualname__
        raise ValueError(
            f"tritonmoe runs torchtitan's own RoutedExperts of GroupedExperts (qwen3, deepseek_v3), got {kind}: leave "
            "out converters and overrides of the experts, or this override"
        )
    if type(dispatcher) not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
        raise ValueError(
            f"the model asks for {type(dispatcher).__qualname__}, and tritonmoe exchanges rows itself: take its "
            'configuration with moe_comm_backend="standard", or leave the override out'
        )
    return derive(
        config,
        OverlappedRoutedExperts.Config,
        inner_experts=_fused(inner),
        overlap=OverlapConfig(**overlap),
        expert_precision=None if expert_precision is None else ExpertPrecision(**expert_precision),
    )


def _fused(inner: GroupedExperts.Config) -> FusedExperts.Config:
    fused = derive(inner, FusedExperts.Config)
    if inner.sharding_config is not None:
        layouts = dict(inner.sharding_config.state_shardings)
        layouts[BOTH] = layouts.pop(GATE)
        del layouts[UP]
        fused.sharding_config = replace(inner.sharding_config, state_shardings=layouts)
    return fused
