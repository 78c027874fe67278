"""set_expert_precision(): experts of a model multiply in an ExpertPrecision, on one device, over ranks and upcycled."""

import copy
from pathlib import Path

import pytest
import torch
from expert_precision_models import IDS, PRECISION, SIZES, mixtral, relative, step
from peft import LoraConfig, get_peft_model
from processes import run_torchrun
from transformers import AutoModelForCausalLM, LlamaConfig

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

WORKER = Path(__file__).parent / "expert_precision_worker.py"


def test_a_model_of_transformers_computes_in_it_and_goes_back():
    model = mixtral()
    tmt.patch(model)
    plain = step(model)
    names = tmt.set_expert_precision(model, PRECISION)
    assert names == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    found = step(model)
    for one, other in zip(found, plain, strict=True):
        assert 1e-3 < relative(one, other) < 0.2
    twin = copy.deepcopy(model)
    assert all(torch.equal(one, other) for one, other in zip(step(twin), found, strict=True))
    model.gradient_checkpointing_enable()
    model.train()
    assert all(torch.equal(one, other) for one, other in zip(step(model), found, strict=True))
    assert model.state_dict().keys() == mixtral().state_dict().keys()
    tmt.set_expert_precision(model, None)
    assert all(torch.equal(one, other) for one, other in zip(step(model), plain, strict=True))


def test_a_module_of_experts_gives_what_moe_mlp_gives():
    model = mixtral()
    tmt.set_expert_precision(model, PRECISION)
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(7, 64).bfloat16(), torch.randint(4, (7, 2)), torch.rand(7, 2)
    expected = tm.moe_mlp(x, ids, weights, experts.gate_up_proj, experts.down_proj, precision=PRECISION)
    assert torch.equal(experts(x, ids, weights), expected)


@pytest.mark.thorough
def test_over_ranks(tmp_path: Path):
    run_torchrun(2, WORKER, str(tmp_path), cases=("model", "spread", "fully_sharded"))


@pytest.mark.parametrize("target", ["mixtral", "inplace"])
def test_what_upcycle_makes(target):
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    model = tmt.upcycle(dense, num_experts=4, top_k=2, target=target)
    plain = model(IDS).logits
    names = tmt.set_expert_precision(model, PRECISION)
    assert len(names) == 2
    assert 1e-3 < relative(model(IDS).logits, plain) < 0.2


def test_compiled_layers_follow():
    layer = tm.MoELayer(tm.MoEConfig(64, 96, 4, 2), dtype=torch.bfloat16)
    compiled, x = torch.compile(layer, backend="aot_eager"), torch.randn(9, 64).bfloat16()
    plain = compiled(x)
    tmt.set_expert_precision(layer, PRECISION)
    assert "mxfp8" in repr(layer)
    assert layer.config.expert_precision == PRECISION
    assert torch.equal(compiled(x), layer(x))
    assert not torch.equal(compiled(x), plain)


def test_refusals_change_nothing():
    with pytest.raises(TypeError, match="expert_precision must be an ExpertPrecision or None, got 'mxfp8'"):
        tmt.set_expert_precision(mixtral(), "mxfp8")
    with pytest.raises(ValueError, match="nothing to switch in LlamaForCausalLM"):
        tmt.set_expert_precision(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), PRECISION)
    model = mixtral()
    tmt.quantize_experts(model, "mxfp4")
    with pytest.raises(ValueError, match=r"those of model\.layers\.0\.mlp\.experts .* are packed and frozen"):
        tmt.set_expert_precision(model, PRECISION)
    layer = tm.MoELayer(tm.MoEConfig(64, 96, 4, 2), dtype=torch.bfloat16)
    tmt.quantize_experts(layer, "mxfp4")
    with pytest.raises(ValueError, match="leave one of them out"):
        tmt.set_expert_precision(layer, PRECISION)
    layer = tm.MoELayer(tm.MoEConfig(64, 96, 4, 2, expert_precision=PRECISION), dtype=torch.bfloat16)
    model = mixtral()
    tmt.set_expert_precision(model, PRECISION)
    for one in (layer, model):
        before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
        with pytest.raises(
            ValueError, match=r"for experts that train, .* call set_expert_precision\(model, None\) first"
        ):
            tmt.quantize_experts(one, "mxfp4")
        assert all(torch.equal(before[name], tensor) for name, tensor in one.state_dict().items())
    adapted = get_peft_model(
        mixtral(), LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    )
    tmt.set_expert_precision(adapted, PRECISION)
    with pytest.raises(ValueError, match="experts with adapters don't compute in"):
        adapted(IDS)
