"""Upcycling in place, for architectures without a twin: blocks become MoE layers inside a copy of the model."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import MoEConfig
from tritonmoe.experts.adapters import ExpertAdapters
from tritonmoe.integrations.transformers.upcycle.expert_init import SHARED_SCALE, UpcycleSettings, make_experts
from tritonmoe.integrations.transformers.upcycle.ffn_blocks import FFNBlock, parent_and_name
from tritonmoe.integrations.transformers.upcycle.token_masks import (
    EnclosingCall,
    TokenMask,
    find_mask,
    tokens_of_calls,
)
from tritonmoe.layer import GroupedExperts, MoELayer
from tritonmoe.routing.losses import auxiliary_loss
from tritonmoe.routing.token_routing import Routing, join_routings
from tritonmoe.runtime.autograd import is_autocast_on, is_recomputing
from tritonmoe.runtime.wrappers import innermost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AUX_LOSS_WEIGHT", "InplaceConversion", "UpcycledFFN", "replace_blocks"]

AUX_LOSS_WEIGHT = 0.01
"""Weight of the load balance loss in aux_loss(), as in Switch Transformers; the loss itself is 1 at perfect balance."""


class LayerCall(NamedTuple):
    """What is kept of one call of a layer."""

    routing: Routing
    shape: torch.Size
    """Of its rows."""
    mask: TokenMask


class UpcycledFFN(MoELayer):
    """The MoE layer that stands where a dense block or its first linear stood; (..., D) -> (..., D), in x.dtype.

    Its aux_loss, last_routing and statistics() are those of the last forward of a module around it, all calls in it
    together (chunks of chunk_size_feed_forward, a block that the model runs at several depths), rows in the order of
    the calls; None where that forward skipped it. aux_loss leaves out padding, ValueError where the attention mask
    doesn't say which rows that is; the others have all rows. A recompute changes none of them, and last_report is the
    last call's.

    The experts compute in autocast's dtype under autocast, else in that of their weights; spread ones that are fp32, in
    that of narrower rows, as GroupedExperts does. With a shared expert, which every token reaches, its output is added
    to that of the routed ones.
    """

    calls: tuple[LayerCall, ...] | None
    """Of the last forward; None before the first one, empty where it skipped this layer."""
    _left_by_a_call = ("calls", "around")

    def __init__(self, config: MoEConfig, shared_width: int | None, **factory: Any) -> None:
        super().__init__(config, **factory)
        self._unused_loss.is_settled = True  # the model says it
        self.around: tuple[EnclosingCall, ...] = ()
        """The calls of modules inside of which this layer stands now, the outermost first."""
        self.shared_expert: GroupedExperts | None = None
        if shared_width is not None:
            shared = MoEConfig(
                config.hidden_size, shared_width, 1, 1, config.activation, gated=config.gated, bias=config.bias
            )
            self.shared_expert = GroupedExperts(shared, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        adapters: ExpertAdapters | None = None,
        fillers: Sequence[Callable[[], None]] = (),
    ) -> Tensor:
        rows = _rows(x, self.grouped_experts)
        y = super().forward(rows, token_mask=token_mask, adapters=adapters, fillers=fillers)
        if self.shared_expert is not None:
            flat = _rows(x, self.shared_expert).reshape(-1, x.shape[-1])
            ids = torch.zeros(flat.shape[0], 1, dtype=torch.int64, device=flat.device)
            ones = torch.ones(flat.shape[0], 1, device=flat.device)
            y = y + self.shared_expert(flat, ids, ones).view(y.shape)
        return y.to(x.dtype)

    def _leave(self, routing: Routing, shape: torch.Size) -> None:
        if not is_recomputing():
            call = LayerCall(routing, shape, find_mask(self.around, shape))
            self.calls = (*(self.calls or ()), call) if self.around else (call,)

    @property
    def aux_loss(self) -> Tensor | None:
        """The loss of the last forward; see the class."""
        if not self.calls:
            return None
        tokens = tokens_of_calls([(call.shape, call.mask) for call in self.calls])
        routings = [
            call.routing if is_token is None else call.routing.of_tokens(is_token.to(call.routing.topk_ids.device))
            for call, is_token in zip(self.calls, tokens, strict=True)
        ]
        return auxiliary_loss(join_routings(routings), self.config)

    @aux_loss.setter
    def aux_loss(self, value: Tensor | None) -> None:
        assert value is None
        self.calls = None

    @property
    def last_routing(self) -> Routing | None:
        """That of the last forward; see the class."""
        return join_routings([call.routing for call in self.calls]) if self.calls else None

    @last_routing.setter
    def last_routing(self, value: Routing | None) -> None:
        assert value is None
        self.calls = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "calls": None, "around": ()}


def _rows(x: Tensor, module: nn.Module) -> Tensor:
    """Return x in the dtype of these experts' weights; as it is where the call itself casts."""
    experts = innermost(module)
    assert isinstance(experts, GroupedExperts)
    weight = experts.gate_up_proj
    if is_autocast_on(x.device) and torch.float64 not in (x.dtype, weight.dtype):
        return x
    if experts.narrows_to(x.dtype) and not hasattr(weight, "main_grad"):
        return x
    return x.to(weight.dtype)


def replace_blocks(model: nn.Module, settings: UpcycleSettings, blocks: list[FFNBlock], dtype: torch.dtype) -> None:
    """Put an MoE layer in the place of each block, its weights on the meta device, to be assigned."""
    generator = torch.Generator()  # what it draws is thrown away; the global generator is left alone
    for block in blocks:
        config = MoEConfig(
            block.hidden_size,
            settings.expert_width(block.intermediate_size),
            settings.num_experts,
            settings.top_k,
            block.activation,
            gated=block.gated,
            bias=block.has_up_bias or block.has_down_bias,
            load_balance_loss_weight=AUX_LOSS_WEIGHT,
        )
        shared_width = block.intermediate_size if settings.shared_expert else None
        layer = UpcycledFFN(config, shared_width, generator=generator, device="meta", dtype=dtype)
        replaced: list[tuple[str, nn.Module | float]] = [(block.path, layer)]
        if not block.whole:
            replaced += [(block.down, nn.Identity())]
            if block.act_path:
                replaced += [(block.act_path, nn.Identity())]
            for path in block.inner_dropouts:
                parent, name = parent_and_name(model, path)
                replaced += [(path, nn.Identity() if isinstance(getattr(parent, name), nn.Module) else 0.0)]
        for path, value in replaced:
            parent, name = parent_and_name(model, path)
            setattr(parent, name, value)


class InplaceConversion:
    """Names and tensors of a model with its blocks replaced; the dense model may be on the meta device."""

    def __init__(self, dense: "PreTrainedModel", settings: UpcycleSettings, blocks: list[FFNBlock]) -> None:
        self.settings = settings
        self.blocks = blocks
        self.config = dense.config
        for block in blocks:
            settings.expert_width(block.intermediate_size)

    def block_names(self, block: FFNBlock) -> list[str]:
        """Return the state dict names of the MoE layer that stands for `block`."""
        modules = ["experts", *(["shared_expert"] if self.settings.shared_expert else [])]
        parts = ["gate_up_proj", "down_proj"]
        if block.has_up_bias or block.has_down_bias:
            parts += ["gate_up_proj_bias", "down_proj_bias"]
        names = ["router.weight", *(f"{module}.{part}" for module in modules for part in parts)]
        return [f"{block.path}.{name}" for name in names]

    @torch.no_grad()
    def block_state(self, block: FFNBlock, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the MoE layer, `get` being a lookup in the dense state dict."""
        dense = block.read(get)
        dense = dense._replace(down=dense.down.to(dense.up.dtype))  # T5 keeps it in fp32
        if block.has_up_bias or block.has_down_bias:  # an expert has both or none
            wide = dense.up.new_zeros(block.intermediate_size)
            dense = dense._replace(
                up_bias=wide if dense.up_bias is None else dense.up_bias,
                gate_bias=wide if dense.gate_bias is None and block.gated else dense.gate_bias,
                down_bias=dense.up.new_zeros(block.hidden_size) if dense.down_bias is None else dense.down_bias,
            )
        router, experts = make_experts(self.settings, block.index, dense)
        state: dict[str, Tensor | None] = {
            "router.weight": router,
            "experts.gate_up_proj": experts.gate_up_proj,
            "experts.down_proj": experts.down_proj,
            "experts.gate_up_proj_bias": experts.gate_up_bias,
            "experts.down_proj_bias": experts.down_bias,
        }
        if self.settings.shared_expert:
            halves = [half for half in (dense.gate, dense.up) if half is not None]
            biases = [half for half in (dense.gate_bias, dense.up_bias) if half is not None]
            state["shared_expert.gate_up_proj"] = torch.cat(halves)[None]
            state["shared_expert.down_proj"] = dense.down[None] * SHARED_SCALE
            state["shared_expert.gate_up_proj_bias"] = torch.cat(biases)[None] if biases else None
            state["shared_expert.down_proj_bias"] = (
                dense.down_bias[None] * SHARED_SCALE if dense.down_bias is not None else None
            )
        return {f"{block.path}.{name}": tensor for name, tensor in state.items() if tensor is not None}

    @torch.no_grad()
    def convert(self, dense: "PreTrainedModel") -> nn.Module:
        """Return a copy of the model with its blocks replaced, each compared with the block it replaces."""
        model = copy.deepcopy(dense)
        if hasattr(model.config, "quantization_config"):  # of a GGUF file; its weights are dequantised
            del model.config.quantization_config
        source = dense.state_dict()
        for block in self.blocks:
            state = self.block_state(block, source.__getitem__)
            router = state[f"{block.path}.router.weight"]
            original = _computation(model, block)
            replace_blocks(model, self.settings, [block], router.dtype)
            layer = model.get_submodule(block.path)
            assert isinstance(layer, MoELayer)
            names = {name.removeprefix(f"{block.path}."): tensor for name, tensor in state.items()}
            layer.load_state_dict(names, strict=True, assign=True)
            layer.train(dense.training)
            if self.settings.init == "copy":
                _compare(block, layer, original)
        return model


def _computation(model: nn.Module, block: FFNBlock) -> Callable[[Tensor], Tensor]:
    """Return what the block computes, in the model's own modules."""
    if block.whole:
        return model.get_submodule(block.path)
    assert block.act_path is not None
    parent, name = parent_and_name(model, block.act_path)
    up, act, down = model.get_submodule(block.up), getattr(parent, name), model.get_submodule(block.down)
    return lambda x: down(act(up(x)))


def _compare(block: FFNBlock, layer: MoELayer, original: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError where the MoE layer does not compute what the block that it replaces computed."""
    weight = next(layer.parameters())
    generator = torch.Generator().manual_seed(block.index)
    x = torch.randn(1, 16, block.hidden_size, generator=generator, device="cpu").to(weight)
    if isinstance(original, nn.Module):
        original.eval()  # it is a copy, which nobody will run again
    expected, actual = original(x), layer(x)
    layer.aux_loss = None  # of this run
    scale = expected.abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / scale
    allowed = 1e-4 + 8 * torch.finfo(weight.dtype).eps
    if not error <= allowed:
        raise ValueError(
            f"the experts made from {block.path} differ from it by {error:.1e} of its largest output (allowed "
            f"{allowed:.1e}): the block computes more than its linears and its activation, so it can't be upcycled; "
            "leave the block out with layers="
        )
