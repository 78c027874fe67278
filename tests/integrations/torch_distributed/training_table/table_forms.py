"""The columns of the training table: what holds the experts, on one device and spread over ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from large_weights import draw_large_weights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

WIDTH, NUM_EXPERTS = 16, 8
OVERLAP = tm.OverlapConfig(num_chunks=2)
COPIES = tm.OverlapConfig(num_chunks=2, balance="always", max_copies=3)
"""Few tokens are never even: most calls have copies of experts."""
CONFIG = tm.MoEConfig(
    hidden_size=WIDTH,
    intermediate_size=24,
    num_experts=NUM_EXPERTS,
    top_k=2,
    bias=True,
    shared_intermediate_size=12,
    load_balance_loss_weight=0.05,
    z_loss_weight=0.01,
)
SIZES = {
    "vocab_size": 32,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Ranks:
    """The ranks of a table, as one of them sees them."""

    name: str
    """ "1", "2", "4", or "2x2": replicas x ranks that share the experts."""
    rank: int
    size: int
    spread_over: Any = field(compare=False)
    """What parallelize() takes: a ProcessGroup or a DeviceMesh; None on one device."""

    @property
    def mesh(self) -> DeviceMesh:
        return self.spread_over


@dataclass(frozen=True)
class Form:
    """One column."""

    name: str
    one_device: Callable[[], nn.Module]
    """Every call gives the same weights."""
    spread: Callable[[Any], nn.Module]
    """The same weights over a ProcessGroup or DeviceMesh."""
    blocks: Callable[[Any], list[nn.Module]]
    """What a user wraps before the whole: the layers."""
    trains_experts: bool = True
    of_transformers: bool = True

    def make(self, ranks: Ranks) -> nn.Module:
        return self.one_device() if ranks.spread_over is None else self.spread(ranks.spread_over)

    def batch(self, step: int, rank: int, micro: int = 0) -> Tensor:
        """Return tokens (T, D), or ids (1, T): T from 5 to 9, another one on every rank and in every step."""
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
        num_tokens = 5 + (3 * rank + 2 * step + micro) % 5
        if self.of_transformers:
            return torch.randint(2, 32, (1, num_tokens), generator=generator)
        return torch.randn(num_tokens, WIDTH, generator=generator)

    def loss(self, call: Callable[..., Any], model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of call(batch) and a mean over the batch; `model` is what `call` wraps."""
        if self.of_transformers:
            result = call(input_ids=batch, labels=batch)
            output, loss = result.logits, result.loss
        else:
            output = call(batch.to(next(model.parameters()).dtype))
            loss = (output - 1).square().sum(-1).mean()
        return output, loss + sum(layer.aux_loss for layer in model.modules() if isinstance(layer, tm.MoELayer))


class OwnRouter(nn.Module):
    """A user's router before GroupedExperts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NUM_EXPERTS)
        self.experts = tm.GroupedExperts(tm.MoEConfig(WIDTH, 24, NUM_EXPERTS, 2, "relu2", gated=False, transposed=True))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(1).topk(2)
        return self.experts(x, ids, weights)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Net(nn.Module):
    """A user's own network, with a layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Residual(tm.MoELayer(CONFIG)), Residual(OwnRouter())])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Wrapper(nn.Module):
    """What PEFT, Lightning and users put around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.full((WIDTH,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def parallelized(model: nn.Module, spread_over: Any, overlap: tm.OverlapConfig = OVERLAP) -> nn.Module:
    assert tm.parallelize(model, spread_over, overlap) == 2
    return model


def spread_inside_wrapper(spread_over: Any) -> nn.Module:
    net: Any = seeded(Net)
    parallelized(net.blocks, spread_over)
    return Wrapper(nn.Sequential(net))


def large_weights(model: nn.Module) -> nn.Module:
    """Draw weights under which errors show, and experts that differ."""
    draw_large_weights(model, torch.Generator().manual_seed(2))
    return model


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=24, moe_intermediate_size=24, num_experts=NUM_EXPERTS, num_experts_per_tok=2
    )
    return large_weights(transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager"))


def spread_transformers(model: nn.Module, spread_over: Any, overlap: tm.OverlapConfig = OVERLAP) -> nn.Module:
    assert tmt.parallelize(model, spread_over, overlap) == 2
    return model


def upcycled() -> nn.Module:
    dense = transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, intermediate_size=24))
    return large_weights(tmt.upcycle(dense, NUM_EXPERTS, 2))


def with_adapters(model: Any) -> nn.Module:
    """Return the model with LoRA on its attention, everything else frozen."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def with_adapters_and_experts(model: nn.Module) -> nn.Module:
    """Return the model with LoRA on its attention, its experts trained beside it."""
    model = with_adapters(model)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.requires_grad_(True)
    return model


def layers_of(model: Any) -> list[nn.Module]:
    model = getattr(model, "base_model", model)
    model = getattr(model, "model", model)  # PEFT's wrapper, or the causal model's trunk
    return list(getattr(model, "layers", None) or model.model.layers)


FORMS = [
    Form(
        "layer made with a group",
        lambda: seeded(lambda: tm.MoELayer(CONFIG)),
        lambda spread_over: seeded(lambda: tm.MoELayer(CONFIG, spread_over, OVERLAP)),
        lambda model: [],
        of_transformers=False,
    ),
    Form(
        "module parallelized",
        lambda: seeded(Net),
        lambda spread_over: parallelized(seeded(Net), spread_over),
        lambda model: list(model.blocks),
        of_transformers=False,
    ),
    Form(
        "module with copies of experts",
        lambda: seeded(Net),
        lambda spread_over: parallelized(seeded(Net), spread_over, COPIES),
        lambda model: list(model.blocks),
        of_transformers=False,
    ),
    Form(
        "module inside a wrapper",
        lambda: Wrapper(nn.Sequential(seeded(Net))),
        spread_inside_wrapper,
        lambda model: list(model.net[0].blocks),
        of_transformers=False,
    ),
    Form(
        "transformers model",
        qwen3_moe,
        lambda spread_over: spread_transformers(qwen3_moe(), spread_over),
        layers_of,
    ),
    Form(
        "transformers model with copies",
        qwen3_moe,
        lambda spread_over: spread_transformers(qwen3_moe(), spread_over, COPIES),
        layers_of,
    ),
    Form(
        "upcycled in place",
        upcycled,
        lambda spread_over: parallelized(upcycled(), spread_over),
        layers_of,
    ),
    Form(
        "PEFT, then parallelized",
        lambda: with_adapters(qwen3_moe()),
        lambda spread_over: spread_transformers(with_adapters(qwen3_moe()), spread_over),
        layers_of,
        trains_experts=False,
    ),
    Form(
        "parallelized, then PEFT",
        lambda: with_adapters_and_experts(qwen3_moe()),
        lambda spread_over: with_adapters_and_experts(spread_transformers(qwen3_moe(), spread_over)),
        layers_of,
    ),
]
