"""collect_statistics(): every pair counted once, whatever runs the experts and however often they are recomputed."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from tritonmoe.config.layer import MoEConfig
from tritonmoe.integrations.transformers import collect_statistics, register
from tritonmoe.integrations.transformers.upcycle.conversion import upcycle
from tritonmoe.layer import MoELayer
from tritonmoe.tools.report.png import write_load_png

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
}
NAMES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def mixtral(**settings) -> nn.Module:
    torch.manual_seed(0)
    register()
    config = transformers.MixtralConfig(**SIZES, num_local_experts=6)
    return AutoModelForCausalLM.from_config(config, **settings)


def ids_of(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 64, (2, 9))


@pytest.mark.parametrize("implementation", ["tritonmoe", "eager", "grouped_mm"])
def test_counts_are_those_of_the_router(implementation):
    model = mixtral(experts_implementation=implementation)
    ids = ids_of(model)
    with collect_statistics(model) as statistics:
        assert statistics.layers == {}
        logits = model(ids, output_router_logits=True).router_logits
        model(ids)
    assert list(statistics.layers) == NAMES
    for layer, name in enumerate(NAMES):
        chosen = logits[layer].softmax(-1).topk(2).indices.flatten()
        expected = torch.bincount(chosen, minlength=6) * 2
        assert statistics.loads[name] == expected.tolist()
        assert statistics.layers[name].num_routed_pairs == 2 * 2 * 18
    before = statistics.loads
    model(ids)
    assert statistics.loads == before  # the context has ended
    statistics.reset()
    assert statistics.loads == {}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_forwards_count_once(use_reentrant):
    model = mixtral(experts_implementation="tritonmoe").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with collect_statistics(model) as statistics:
        model(ids_of(model), labels=ids_of(model)).loss.backward()
    assert all(layer.num_routed_pairs == 2 * 18 for layer in statistics.layers.values())
    assert all(p.grad is not None for p in model.model.layers[0].mlp.experts.parameters())


def test_copies_are_not_counted():
    """Of weights that are averaged, say: hooks are copied with a model."""
    model = mixtral()
    with collect_statistics(model) as statistics:
        model(ids_of(model))
        copied = copy.deepcopy(model)
        copied(ids_of(model))
    copied(ids_of(model))
    assert [layer.num_routed_pairs for layer in statistics.layers.values()] == [2 * 9 * 2] * 2


@pytest.mark.parametrize("shared_expert", [False, True])
def test_models_upcycled_in_place(shared_expert):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = upcycle(AutoModelForCausalLM.from_config(config), 4, 2, shared_expert=shared_expert)
    with collect_statistics(model) as statistics:
        model(ids_of(model))
    layers = [model.transformer.h[index].mlp.c_fc for index in range(2)]
    assert list(statistics.loads) == [f"transformer.h.{index}.mlp.c_fc.experts" for index in range(2)]
    for layer, load in zip(layers, statistics.loads.values(), strict=True):
        assert load == torch.bincount(layer.last_routing.topk_ids.flatten(), minlength=4).tolist()
        assert sum(load) == 2 * 18


def test_it_logs_prints_and_draws(tmp_path):
    model = mixtral()
    with collect_statistics(model) as statistics:
        model(ids_of(model))
    logged = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            logged[tag] = (value, step)

    statistics.log_to(Writer(), 7)
    first = statistics.layers[NAMES[0]]
    assert logged[f"routing/{NAMES[0]}/max_violation"] == (first.max_violation, 7)
    mean = sum(layer.max_violation for layer in statistics.layers.values()) / 2
    assert logged["routing/mean/max_violation"] == (pytest.approx(mean), 7)
    assert len(logged) == 3 * 4
    lines = str(statistics).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == [NAMES[0], "36", str(max(statistics.loads[NAMES[0]]))]

    path = tmp_path / "load.png"
    write_load_png(path, statistics.loads | {"other": [1, 2]})
    assert path.read_bytes()[:4] == b"\x89PNG"
    write_load_png(str(tmp_path / "again.png"), statistics.loads)
    assert (tmp_path / "again.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to draw"):
        write_load_png(path, {})


@pytest.mark.thorough
def test_compiled_models_are_refused():
    """Their code runs without the hooks by which calls are counted: it counted nothing, and said nothing."""
    torch._dynamo.reset()
    layer = MoELayer(MoEConfig(8, 4, 4, 2))
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"the model \(OptimizedModule\) is compiled"), collect_statistics(compiled):
        pass
    with pytest.raises(RuntimeError, match=r"use the model without torch\.compile"), collect_statistics(layer):
        compiled(x)
    torch._dynamo.reset()
    compiled(x)  # now there is code without hooks
    with pytest.raises(ValueError, match="no experts of MoELayer were called"), collect_statistics(layer):
        compiled(x)
    torch._dynamo.reset()


def test_statistics_of_nothing_are_refused():
    layer = MoELayer(MoEConfig(8, 4, 4, 2))
    with pytest.raises(ValueError, match="no experts of MoELayer were called"), collect_statistics(layer):
        pass
    with collect_statistics(layer) as statistics:
        layer(torch.randn(5, 8))
        statistics.reset()  # takes back the numbers, not that there was a call


def test_a_dense_model_is_refused():
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has no experts"),
        collect_statistics(AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))),
    ):
        pass
