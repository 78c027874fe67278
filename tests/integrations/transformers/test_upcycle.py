"""upcycle(): the MoE model computes what the dense one does; natively where there is a twin, in place elsewhere."""

import copy
import importlib.metadata
import logging
import pickle

import pytest
import torch
import transformers
from einops import rearrange
from quantised_weights import Int4Tensor, Params4bit
from tiny_models import INPLACE, LLAMA_LIKE, MORE_INPLACE, NATIVE, make_batch, make_dense
from torch import nn
from torch.nn.utils import prune

from tritonmoe.integrations.torch_distributed.parallelize import routed_experts
from tritonmoe.integrations.transformers import (
    aux_loss,
    collect_statistics,
    load_upcycled,
    parallelize,
    patch,
    verify_upcycle,
)
from tritonmoe.integrations.transformers.discovery import experts_classes
from tritonmoe.integrations.transformers.requirements import check_transformers
from tritonmoe.integrations.transformers.trainer_checkpoints import load_saved
from tritonmoe.integrations.transformers.upcycle.checkpoint import upcycle_checkpoint
from tritonmoe.integrations.transformers.upcycle.conversion import upcycle
from tritonmoe.integrations.transformers.upcycle.expert_init import DenseFFN, UpcycleSettings, make_experts
from tritonmoe.integrations.transformers.upcycle.ffn_blocks import find_blocks

NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "t5_gated": {"dropout_rate": 0.0}}
EXACT_FP32 = 2e-6  # of the largest output; the dense models themselves differ by 1e-7 from their fp64 selves


def settings(**changes) -> UpcycleSettings:
    return UpcycleSettings(**{"num_experts": 8, "top_k": 2, **changes})


def states_equal(left, right) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Equal to the dense model


@pytest.mark.sweep(1)
@pytest.mark.parametrize("top_k_and_granularity", [(2, 1), (8, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_native_twins_equal_the_dense_model(name, top_k_and_granularity):
    top_k, granularity = top_k_and_granularity
    dense = make_dense(name)
    before = copy.deepcopy(dense.state_dict())
    moe = upcycle(dense, 4 * granularity, top_k, granularity=granularity)
    assert type(moe).__name__ != type(dense).__name__
    report = verify_upcycle(dense, moe, make_batch(dense))
    assert report.relative_error < EXACT_FP32
    assert all(torch.equal(before[key], tensor) for key, tensor in dense.state_dict().items())
    own = {tensor.data_ptr() for tensor in dense.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in moe.state_dict().values())


@pytest.mark.sweep(1)
@pytest.mark.parametrize("options", [{"top_k": 3}, {"granularity": 2, "top_k": 4, "shared_expert": True}], ids=str)
@pytest.mark.parametrize("name", INPLACE)
def test_inplace_equals_the_dense_model(name, options):
    dense = make_dense(name)
    before = copy.deepcopy(dense.state_dict())
    moe = upcycle(dense, 8, **options)
    assert type(moe) is type(dense)
    report = verify_upcycle(dense, moe, make_batch(dense))
    assert report.relative_error < EXACT_FP32
    assert report.parameters > report.active_parameters > report.dense_parameters
    assert all(torch.equal(before[key], tensor) for key, tensor in dense.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_INPLACE)
def test_more_families_equal_the_dense_model(name):
    dense = make_dense(name)
    assert verify_upcycle(dense, upcycle(dense, 8, 4, granularity=2), make_batch(dense)).relative_error < EXACT_FP32


@pytest.mark.parametrize("name", ["gpt2", "t5_gated", "opt"])
def test_inplace_is_exact_to_fp64(name):
    dense = make_dense(name).double()
    moe = upcycle(dense, 6, 4, granularity=2)
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < 1e-14


def test_bf16_differs_by_its_own_rounding():
    exact = make_dense("llama")
    dense = copy.deepcopy(exact).bfloat16()
    moe = upcycle(dense, 8, 4, granularity=2)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    batch = make_batch(dense)
    with torch.no_grad():
        truth, plain, ours = (model(**batch).logits.float() for model in (exact, dense, moe))
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("name", ["qwen2", "ernie4_5", "hunyuan_v1_dense"])
def test_native_shared_experts_start_with_half(name):
    dense = make_dense(name)
    moe = upcycle(dense, 8, 2, shared_expert=True)
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32
    shared = next(module for path, module in moe.named_modules() if path.rpartition(".")[2].startswith("shared_"))
    assert shared.down_proj.weight.abs().max() > 0


def test_layers_that_stay_dense():
    dense = make_dense("qwen3", num_hidden_layers=3)
    moe = upcycle(dense, 4, 2, layers=[0, 2])
    assert [hasattr(layer.mlp, "experts") for layer in moe.model.layers] == [True, False, True]
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32
    dense = make_dense("ernie4_5", num_hidden_layers=3)
    moe = upcycle(dense, 4, 2, layers=lambda index, path: index > 0)
    assert [hasattr(layer.mlp, "experts") for layer in moe.model.layers] == [False, True, True]
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32
    dense = make_dense("t5")
    moe = upcycle(dense, 4, 2, layers=lambda index, path: path.startswith("decoder"))
    assert len(find_blocks(dense)) == 4
    assert sum(path.endswith(".experts") for path, _ in moe.named_modules()) == 2
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32


@pytest.mark.skipif("granite" in NATIVE, reason="the twins of this transformers all have fused experts")
def test_a_twin_without_fused_experts_is_refused():
    dense = transformers.GraniteForCausalLM(transformers.GraniteConfig(**LLAMA_LIKE))
    with pytest.raises(ValueError, match=r"differ in .*experts\.down_proj.*use target='inplace'"):
        upcycle(dense, 4, 2)
    assert verify_upcycle(dense, upcycle(dense, 4, 2, target="inplace"), make_batch(dense)).relative_error < EXACT_FP32


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.thorough)])
def test_greedy_text_is_the_same(name):
    dense = make_dense(name)
    moe = upcycle(dense, 8, 4, granularity=2)
    batch = {"input_ids": make_batch(dense)["input_ids"]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :4] = 0
    # transformers' auxiliary loss takes no mask that is longer than the new tokens
    without = {"output_router_logits": False} if name == "llama" else {}
    texts = [
        model.generate(**batch, max_new_tokens=20, do_sample=False, **options)
        for model, options in ((dense, {}), (moe, without))
    ]
    assert texts[0].shape == (2, 31)
    assert torch.equal(*texts)


def test_other_heads_than_a_language_model():
    config = make_dense("llama").config
    config.num_labels = 3
    torch.manual_seed(0)
    for name in ("LlamaModel", "LlamaForSequenceClassification"):
        dense = getattr(transformers, name)(config).eval()
        moe = upcycle(dense, 4, 2)
        assert type(moe).__name__ == name.replace("Llama", "Mixtral")
        assert verify_upcycle(dense, moe, torch.randint(3, 64, (2, 7))).relative_error < EXACT_FP32


def test_attention_in_windows_stays():
    dense = make_dense("mistral", sliding_window=4)
    moe = upcycle(dense, 4, 2)
    assert moe.config.sliding_window == 4
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32
    moe.config.sliding_window = None  # what is at stake
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_proof_is_printed(name, capsys):
    """E=6, K=3, D=32: of an expert's parameters a token touches one half."""
    dense = make_dense(name)
    moe = upcycle(dense, 6, 3, layers="all" if name == "llama" else [1])
    report = verify_upcycle(dense, moe, make_batch(dense))
    num_blocks = 2 if name == "llama" else 1
    expert = 32 * 128 * 2 + 128 + 32 if name == "gpt2" else 3 * 32 * 48
    router = 6 * 32
    others = 3 * 32 * 48 + 32 if name == "qwen2" else 0  # a shared expert and its gate
    assert report.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert report.parameters == report.dense_parameters + num_blocks * (5 * expert + router + others)
    assert report.active_parameters == report.dense_parameters + num_blocks * (2 * expert + router + others)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    for part in (
        f"max error {report.max_error:.3e} ",
        f"parameters {report.dense_parameters:,} -> {report.parameters:,}",
        f"active {report.active_parameters:,}",
    ):
        assert part in printed
    with torch.no_grad():  # a proof that can fail
        next(parameter for key, parameter in moe.named_parameters() if key.endswith("down_proj")).mul_(1.01)
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error > 1e-4


def test_tied_embeddings_stay_tied():
    dense = make_dense("llama", tie_word_embeddings=True)
    moe = upcycle(dense, 4, 2)
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32


# Experts


def block_and_experts(**changes):
    generator = torch.Generator().manual_seed(3)
    dense = DenseFFN(*(torch.randn(shape, generator=generator) for shape in ((12, 5), (5, 12), (12, 5))))
    return dense, *make_experts(settings(**changes), 0, dense)


def test_experts_are_slices_and_router_rows_repeat():
    dense, router, made = block_and_experts(num_experts=6, top_k=3, granularity=3)
    for expert in range(6):
        part = slice(expert % 3 * 4, expert % 3 * 4 + 4)
        assert torch.equal(made.gate_up_proj[expert], torch.cat([dense.gate[part], dense.up[part]]))
        assert torch.equal(made.down_proj[expert], dense.down[:, part] * 3)
    assert torch.equal(router[0], router[2])
    assert torch.equal(router[3], router[5])
    assert not torch.equal(router[0], router[3])


def test_scaling_all_three_matrices_would_not_be_exact():
    """Megatron's cube root: here so that nobody brings it back."""
    dense = make_dense("llama")
    moe = upcycle(dense, 8, 4, granularity=2)
    with torch.no_grad():
        for layer in moe.model.layers:
            layer.mlp.experts.gate_up_proj *= 2 ** (1 / 3)
            layer.mlp.experts.down_proj *= 2 ** (1 / 3) / 2
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error > 1e-3


def test_noise_is_relative_to_the_matrix():
    dense, _, made = block_and_experts(init="noise")
    for name, tensor, copied in (("gate", made.gate_up_proj[:, :12], dense.gate), ("down", made.down_proj, dense.down)):
        relative = (tensor - copied) / copied.std()
        assert 0.015 < relative.std() < 0.025, name
        assert not torch.equal(tensor[0], tensor[1])


def test_drop_draws_the_same_units_in_every_matrix():
    dense, _, made = block_and_experts(init="drop")
    drawn = set()
    for expert in range(8):
        changed = [
            (made.gate_up_proj[expert, :12] != dense.gate).any(dim=1),
            (made.gate_up_proj[expert, 12:] != dense.up).any(dim=1),
            (made.down_proj[expert] != dense.down).any(dim=0),
        ]
        assert all(torch.equal(changed[0], other) for other in changed)
        assert changed[0].sum() == 6
        drawn.add(tuple(changed[0].tolist()))
    assert len(drawn) > 4
    assert 0.8 < made.down_proj.std() / dense.down.std() < 1.2


@pytest.mark.parametrize("init", ["copy", "noise", "drop"])
def test_the_seed_decides_every_bit(init):
    dense = make_dense("llama")
    first, again, other = (upcycle(dense, 4, 2, init=init, seed=seed) for seed in (5, 5, 6))
    assert states_equal(first, again)
    assert not states_equal(first, other)
    state = torch.get_rng_state()
    upcycle(make_dense("gpt2"), 4, 2, init=init)
    torch.manual_seed(0)
    make_dense("gpt2")
    after_dense = torch.get_rng_state()
    assert not torch.equal(state, after_dense)  # make_dense itself draws
    upcycle(make_dense("gpt2"), 4, 2, init=init)
    assert torch.equal(torch.get_rng_state(), after_dense)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["noise", "drop"])
def test_other_inits_are_near_and_say_so(name, init, caplog):
    dense = make_dense(name)
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        moe = upcycle(dense, 4, 2, init=init)
    assert "is not exact" in caplog.text
    error = verify_upcycle(dense, moe, make_batch(dense)).relative_error
    assert (1e-4 if init == "noise" else 1e-2) < error < (0.2 if init == "noise" else 2)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "t5_gated", "bert"])
def test_gradients_reach_every_expert(name):
    dense = make_dense(name)
    moe = upcycle(dense, 4, 4, init="noise").train()  # random routers leave some of BERT's experts without tokens
    output = moe(**make_batch(dense))
    loss = (output.logits if hasattr(output, "logits") else output.last_hidden_state).square().mean()
    loss = loss + (aux_loss(moe) if name not in NATIVE else 0)
    loss.backward()
    seen = 0
    for path, module in moe.named_modules():
        if path.endswith(".experts"):
            for parameter in module.parameters():
                assert (parameter.grad.flatten(1).abs().amax(dim=1) > 0).all(), path
                seen += 1
            router = moe.get_submodule(path.rpartition(".")[0])
            router = router.gate if name in NATIVE else router.router
            assert router.weight.grad.abs().max() > 0
    assert seen >= 4


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def assert_computes_in_bf16(layer, narrow, x, autocast):
    """The output, and the gradients of fp32 weights, have the bits of experts that are bf16 themselves."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == x.dtype
    y.float().square().sum().backward()
    routing, rows = narrow.router(x), x.bfloat16()
    expected = narrow.experts(rows, routing.topk_ids, routing.topk_weights)
    if narrow.shared_expert is not None:
        ids = torch.zeros(len(rows), 1, dtype=torch.int64)
        expected = expected + narrow.shared_expert(rows, ids, torch.ones(len(rows), 1))
    assert torch.equal(y, expected.to(x.dtype))
    expected.to(x.dtype).float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        whole = parameter.grad.full_tensor() if hasattr(parameter, "full_tensor") else parameter.grad
        assert torch.equal(whole, narrow.get_parameter(name).grad.to(whole.dtype)), name


@pytest.mark.sweep(1)
@pytest.mark.parametrize("spread", [False, True], ids=["one device", "spread"])
@pytest.mark.parametrize("shared_expert", [False, True])
def test_inplace_experts_compute_in_the_dtype_of_autocast_or_of_narrow_rows(shared_expert, spread, group):
    """The second as under FSDP2's mixed precision, which leaves fp32 weights of spread experts alone, and no others."""
    cases = [(True, torch.float32), (True, torch.bfloat16), *([(False, torch.bfloat16)] if spread else [])]
    for autocast, x_dtype in cases:
        moe = upcycle(make_dense("gpt2"), 4, 2, init="noise", shared_expert=shared_expert).train()
        layer = moe.transformer.h[0].mlp.c_fc
        narrow = copy.deepcopy(layer)
        narrow.experts.bfloat16()
        if shared_expert:
            narrow.shared_expert.bfloat16()
        if spread:
            parallelize(moe, group)
            assert hasattr(layer.experts.down_proj, "full_tensor")
        if shared_expert and not autocast:
            layer.shared_expert.bfloat16()
        x = torch.randn(11, 32, generator=torch.Generator().manual_seed(2)).to(x_dtype)
        assert_computes_in_bf16(layer, narrow, x, autocast)


# Ties of the router


def test_a_token_takes_all_parts_of_a_copy():
    dense = make_dense("gpt2")
    moe = upcycle(dense, 8, 4, granularity=2)
    moe(**make_batch(dense))
    for layer in moe.transformer.h:
        ids = layer.mlp.c_fc.last_routing.topk_ids
        copies = rearrange((ids // 2).sort(dim=1).values, "token (copy part) -> token copy part", part=2)
        assert copies.diff(dim=2).eq(0).all()


def test_equal_scores_everywhere_leave_copies_exact():
    """A router that can't tell experts apart: any choice of whole copies gives the dense output."""
    dense = make_dense("llama")
    moe = upcycle(dense, 8, 3)
    with torch.no_grad():
        for layer in moe.model.layers:
            layer.mlp.gate.weight.zero_()
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32


def test_top_1_is_exact_and_warns(caplog):
    dense = make_dense("llama")
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        moe = upcycle(dense, 4, 1)
    assert "top_k=1" in caplog.text
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32


# Auxiliary loss


@pytest.mark.parametrize("name", NATIVE)
def test_native_twins_have_an_auxiliary_loss_or_warn(name, caplog):
    dense = make_dense(name)
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        moe = upcycle(dense, 4, 2)
    ids = make_batch(dense)["input_ids"]
    found = getattr(moe(input_ids=ids, labels=ids), "aux_loss", None)
    if "no auxiliary loss" in caplog.text:
        assert name == "hunyuan_v1_dense" or (name == "granite" and check_transformers() < (5, 24))
        assert found is None
    else:
        assert found > 0
        assert found.requires_grad


def test_aux_loss_of_models_without_layers_or_forward():
    with pytest.raises(ValueError, match="was not upcycled in place"):
        aux_loss(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="needs a forward of the model"):
        aux_loss(upcycle(make_dense("gpt2"), 4, 2))


def test_aux_loss_that_would_teach_nothing_is_refused():
    """Reentrant checkpointing runs the forward without a graph: the routers would silently go without it."""
    moe = upcycle(make_dense("gpt2"), 4, 2).train()
    ids = make_batch(moe)["input_ids"]
    enable = getattr(moe, "activation_checkpointing_enable", None) or moe.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    moe(ids)
    with pytest.raises(RuntimeError, match=r"made no graph .*\{\"use_reentrant\": False\}"):
        aux_loss(moe)
    with torch.no_grad():
        assert aux_loss(moe) > 0
    enable({"use_reentrant": False})
    moe(ids)
    aux_loss(moe).backward()
    assert all(layer.mlp.c_fc.router.weight.grad.abs().max() > 0 for layer in moe.transformer.h)
    with torch.no_grad():
        moe.eval()(ids)
    assert aux_loss(moe) > 0


@pytest.mark.parametrize("name", ["gpt2", "t5_gated"])
def test_a_training_loss_contains_the_auxiliary_loss(name):
    moe = upcycle(make_dense(name, **NO_DROPOUT[name]), 4, 2)
    batch = make_batch(moe)
    batch["labels"] = batch["input_ids"]
    with torch.no_grad():
        expected = moe(**batch).loss  # evaluation
        assert torch.equal(moe.train()(**batch).loss, expected)
    output = moe(**batch)
    assert torch.equal(output.loss, expected + aux_loss(moe))
    assert output["loss"] is output.loss
    assert output[0] is output.loss
    assert torch.equal(moe(**batch, return_dict=False)[0], output.loss)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(other(**batch).loss, output.loss)


def test_peft_and_trainer_train_with_the_auxiliary_loss(tmp_path):
    """One step of Trainer moves the routers as a step by hand on both losses does."""
    pytest.importorskip("accelerate")
    moe = upcycle(make_dense("gpt2", **NO_DROPOUT["gpt2"]), 4, 2).train()
    by_hand = copy.deepcopy(moe)
    rows = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = by_hand(rows).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) + aux_loss(by_hand)
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=1.0).step()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    transformers.Trainer(moe, arguments, train_dataset=data).train()
    for ours, theirs in zip(moe.transformer.h, by_hand.transformer.h, strict=True):
        torch.testing.assert_close(ours.mlp.c_fc.router.weight, theirs.mlp.c_fc.router.weight, atol=1e-6, rtol=1e-5)
    peft = pytest.importorskip("peft")
    expected = moe(rows, labels=rows).loss
    adapted = peft.get_peft_model(moe, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).train()
    torch.testing.assert_close(adapted(input_ids=rows, labels=rows).loss, expected)


def test_the_auxiliary_loss_is_that_of_the_copies_that_peft_trains():
    peft = pytest.importorskip("peft")
    moe = upcycle(make_dense("gpt2", **NO_DROPOUT["gpt2"]), 4, 2).train()
    rows = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = moe(rows, labels=rows).loss
    settings = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["mlp"])
    adapted = peft.get_peft_model(copy.deepcopy(moe), settings).train()
    torch.testing.assert_close(adapted(input_ids=rows, labels=rows).loss, expected)
    with adapted.disable_adapter(), torch.no_grad():
        adapted(input_ids=rows)  # as DPO's reference: what it leaves is no part of the next loss
        torch.testing.assert_close(aux_loss(adapted), aux_loss(moe))
    torch.testing.assert_close(adapted(input_ids=rows, labels=rows).loss, expected)


def test_a_shared_expert_that_peft_wraps_is_not_spread():
    peft = pytest.importorskip("peft")
    moe = upcycle(make_dense("gpt2"), 4, 2, shared_expert=True)
    routed = [f"transformer.h.{number}.mlp.c_fc.experts" for number in range(2)]
    assert list(routed_experts(moe)) == routed
    adapted = peft.get_peft_model(moe, peft.LoraConfig(target_modules=[], target_parameters=["down_proj"]))
    assert list(routed_experts(adapted)) == [f"base_model.model.{name}.base_layer" for name in routed]


def test_an_auxiliary_loss_that_nobody_takes_is_logged_once(caplog):
    moe = upcycle(make_dense("gpt2"), 4, 2).train()
    ids = make_batch(moe)["input_ids"]
    for _ in range(3):
        moe(ids)
        aux_loss(moe)
    assert not caplog.text
    for _ in range(4):
        moe(ids)
    assert caplog.text.count("nobody took the auxiliary loss of GPT2LMHeadModel") == 1


# Saving


def test_a_pickled_copy_saves_itself_as_the_model_does(tmp_path):
    moe = upcycle(make_dense("gpt2"), 4, 2)
    for name, other in (("copied", copy.deepcopy(moe)), ("pickled", pickle.loads(pickle.dumps(moe)))):
        with torch.no_grad():
            other.lm_head.weight.add_(1)
        other.save_pretrained(tmp_path / name)
        assert states_equal(load_upcycled(tmp_path / name), other)


@pytest.mark.parametrize("name", NATIVE)
def test_native_twins_save_and_load(name, tmp_path):
    dense = make_dense(name)
    moe = upcycle(dense, 4, 2)
    moe.save_pretrained(tmp_path / "moe")
    loaded = type(moe).from_pretrained(tmp_path / "moe")
    assert states_equal(moe, loaded)
    assert verify_upcycle(dense, loaded, make_batch(dense)).relative_error < EXACT_FP32


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if n % 4 else ()) for n, name in enumerate(INPLACE)]
)
def test_inplace_models_save_and_load(name, tmp_path):
    dense = make_dense(name)
    moe = upcycle(dense, 4, 2, granularity=2, shared_expert=True, init="noise", layers=[1])
    moe.save_pretrained(tmp_path / "moe")
    loaded = load_upcycled(tmp_path / "moe")
    assert {p.dtype for p in load_upcycled(tmp_path / "moe", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert states_equal(moe, loaded)
    batch = make_batch(dense)
    assert verify_upcycle(moe, loaded, batch).relative_error < EXACT_FP32  # memory may be aligned otherwise
    again = copy.deepcopy(loaded)
    again.save_pretrained(tmp_path / "again")  # what a copy saves is the copy
    with torch.no_grad():
        next(again.parameters()).add_(1)
    again.save_pretrained(tmp_path / "changed")
    assert states_equal(load_upcycled(tmp_path / "again"), loaded)
    assert states_equal(load_upcycled(tmp_path / "changed"), again)


class OwnConfig(transformers.GPT2Config):
    model_type = "own"


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """As trust_remote_code brings: transformers' class of this name would compute something else."""

    config_class = OwnConfig


def test_inplace_models_of_classes_that_transformers_does_not_have(tmp_path, caplog):
    moe = upcycle(GPT2LMHeadModel(OwnConfig(**make_dense("gpt2").config.to_diff_dict())), 4, 2)
    assert "GPT2LMHeadModel is no class of transformers' own: load" in caplog.text
    moe.save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"holds a test_upcycle\.GPT2LMHeadModel, .*pass the class .* as model_class"):
        load_upcycled(tmp_path / "moe")
    with pytest.raises(TypeError, match=r"model_class must be a class of transformers' models, got torch\.bfloat16"):
        load_upcycled(tmp_path / "moe", torch.bfloat16)
    loaded = load_upcycled(tmp_path / "moe", GPT2LMHeadModel)
    assert (type(loaded), type(loaded.config)) == (GPT2LMHeadModel, OwnConfig)
    assert states_equal(moe, loaded)
    loaded.save_pretrained(tmp_path / "again")
    resumed = copy.deepcopy(moe)
    with torch.no_grad():
        next(resumed.parameters()).add_(1)
    assert load_saved(resumed, tmp_path / "again")
    assert states_equal(moe, resumed)
    caplog.clear()
    upcycle(make_dense("gpt2"), 4, 2)
    assert not caplog.text


def test_inplace_models_do_not_load_as_dense_ones(tmp_path):
    upcycle(make_dense("gpt2"), 4, 2).save_pretrained(tmp_path / "moe")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match="holds no model upcycled in place"):
        load_upcycled(tmp_path)
    make_dense("gpt2").save_pretrained(tmp_path / "dense")
    with pytest.raises(FileExistsError, match=r"not an empty directory, it holds model\.safetensors"):
        upcycle(make_dense("gpt2"), 4, 2).save_pretrained(tmp_path / "dense")


def test_a_second_save_replaces_the_first_one(tmp_path, monkeypatch):
    """As Trainer does, into its own directory beside its checkpoints; a failed one leaves what was there."""
    first, second = (upcycle(make_dense("gpt2"), 4, 2, init="noise", seed=seed) for seed in (1, 2))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "training_args.bin").write_bytes(b"")
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert sum(name.endswith(".safetensors") for name in before) > 2

    def full(directory):
        raise OSError("No space left on device")

    monkeypatch.setattr(second.config, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        second.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert states_equal(load_upcycled(tmp_path), first)
    monkeypatch.undo()
    second.save_pretrained(tmp_path)
    assert states_equal(load_upcycled(tmp_path), second)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["upcycled.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} >= {"checkpoint-2", "training_args.bin"}
    assert not list(tmp_path.glob(".*"))


def test_trainer_saves_checkpoints_and_the_model(tmp_path):
    pytest.importorskip("accelerate")
    moe = upcycle(make_dense("gpt2"), 4, 2)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = torch.randint(3, 64, (8, 9), generator=torch.Generator().manual_seed(1))
    trainer = transformers.Trainer(moe, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    trainer.save_model()
    trainer.save_model()
    for directory in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        assert states_equal(load_upcycled(directory), moe)
    assert not states_equal(load_upcycled(tmp_path / "run" / "checkpoint-1"), moe)


# Bad input, nothing changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"num_experts": 2, "top_k": 3}, "must not exceed num_experts"),
        ({"num_experts": 9, "top_k": 2, "granularity": 2}, "must be a multiple of granularity"),
        ({"top_k": 3, "granularity": 2}, "a token has to reach all parts"),
        ({"num_experts": 10, "top_k": 5, "granularity": 5}, "must divide the feed-forward block's width"),
        ({"init": "random"}, "init must be one of copy, noise, drop"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**47}, "seed must be an integer of 0"),
        ({"target": "qwen3_moe"}, "llama can't become 'qwen3_moe'"),
        ({"shared_expert": True}, "mixtral has no shared expert; use target='inplace'"),
        ({"layers": [0]}, "use target='inplace'"),
        ({"layers": [7]}, r"layers \[7\] don't exist: the model has 2 blocks"),
        ({"layers": []}, "chose none"),
        ({"layers": "some"}, "layers must be 'all'"),
        ({"layers": 0}, "layers must be 'all', a list of positions or a function, got 0"),
        ({"layers": [0.5]}, r"layers must be 'all', .*got \[0\.5\]"),
        ({"shared_expert": "yes"}, "shared_expert must be True or False, got 'yes'"),
    ],
    ids=str,
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(make_dense("llama"), **{"num_experts": 8, "top_k": 2, **options})


def test_dense_models_that_a_twin_can_not_express():
    for changes in ({"attention_bias": True}, {"mlp_bias": True}):
        dense = make_dense("llama", **changes)
        with pytest.raises(ValueError, match="use target='inplace'"):
            upcycle(dense, 4, 2)
        moe = upcycle(dense, 4, 2, target="inplace")
        assert verify_upcycle(dense, moe, make_batch(dense)).relative_error < EXACT_FP32
    with pytest.raises(ValueError, match="can't hold the block"):
        upcycle(make_dense("hunyuan_v1_dense"), 8, 4, granularity=2, shared_expert=True)


def test_models_that_can_not_be_upcycled():
    with pytest.raises(ValueError, match="has experts already"):
        upcycle(upcycle(make_dense("llama"), 4, 2), 4, 2)
    with pytest.raises(ValueError, match="has experts already"):
        upcycle(upcycle(make_dense("gpt2"), 4, 2), 4, 2)
    albert = transformers.AlbertModel(transformers.AlbertConfig(**make_dense("bert").config.to_diff_dict()))
    with pytest.raises(ValueError, match="shares one feed-forward block"):
        upcycle(albert, 4, 2)
    with pytest.raises(ValueError, match="found no dense feed-forward block in ResNetModel"):
        upcycle(
            transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), 4, 2
        )
    tied = make_dense("gpt2")
    tied.transformer.h[1].mlp = tied.transformer.h[0].mlp
    tied.transformer.h[1].mlp.c_fc.weight = tied.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(ValueError, match="are tied"):
        upcycle(tied, 4, 2)
    quantised = make_dense("llama")
    quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(24, 32, dtype=torch.int8), False)
    with pytest.raises(ValueError, match=r"is quantised \(model.layers.0.mlp.up_proj.weight is Parameter of .*int8\)"):
        upcycle(quantised, 4, 2)
    quantised = make_dense("gpt2")
    mlp = quantised.transformer.h[1].mlp
    for weight, kind in ((Params4bit(torch.zeros(32, 128)), "Params4bit"), (Int4Tensor(torch.zeros(32, 128)), "Int4")):
        mlp.c_fc.weight = nn.Parameter(weight, False) if kind == "Int4" else weight
        with pytest.raises(ValueError, match=rf"is quantised \(transformer.h.1.mlp.c_fc.weight is {kind}"):
            upcycle(quantised, 4, 2)
    for method in ("fp8", "gptq"):
        quantised = make_dense("llama")
        quantised.config.quantization_config = {"quant_method": method}
        with pytest.raises(ValueError, match=f"is quantised .*config: {method}"):
            upcycle(quantised, 4, 2)
    for name in ("llama", "gpt2"):  # a GGUF file is dequantised when it is loaded
        dequantised = make_dense(name)
        dequantised.config.quantization_config = {"quant_method": "gguf"}
        dequantised.config._model_name_or_path = dequantised.config.note = "brought by a file"
        assert not hasattr(upcycle(dequantised, 4, 2).config, "quantization_config")
    with pytest.raises(ValueError, match="spread over"):
        upcycle(make_dense("llama").to("meta"), 4, 2)


@pytest.mark.parametrize("width", [48, 32])  # of 32 the norm is as wide as the model
def test_blocks_with_a_norm_between_their_linears_are_no_blocks(width):
    bitnet = transformers.BitNetForCausalLM(transformers.BitNetConfig(**{**LLAMA_LIKE, "intermediate_size": width}))
    with pytest.raises(ValueError, match=r"found no dense .* in BitNetForCausalLM: .* nothing else of width F"):
        upcycle(bitnet, 4, 2)
    text = {"vocab_size": 64, "embed_dim": 32, "layers": 2, "ffn_dim": width, "attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Kosmos2Config(text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 4})
    found = find_blocks(transformers.Kosmos2ForConditionalGeneration(config))
    assert [block.path for block in found] == ["vision_model.model.encoder.layers.0.mlp.fc1"]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_twin_that_can_not_renormalise_is_refused(name, monkeypatch):
    """Top-k weights must sum to 1; a config takes a field that its model never reads."""
    dense = make_dense(name)
    moe = upcycle(dense, 4, 2)
    assert moe.config.norm_topk_prob is True
    for layer in moe.modules():  # what is at stake
        if hasattr(layer, "norm_topk_prob"):
            layer.norm_topk_prob = False
    assert verify_upcycle(dense, moe, make_batch(dense)).relative_error > 0.1

    class WithoutTheField(type(moe.config)):
        def __getattribute__(self, key):
            if key == "norm_topk_prob":
                raise AttributeError(key)
            return super().__getattribute__(key)

    monkeypatch.setattr(type(moe), "config_class", WithoutTheField)
    with pytest.raises(ValueError, match=r"has no norm_topk_prob, .* use target='inplace'"):
        upcycle(dense, 4, 2)
    in_place = upcycle(dense, 4, 2, target="inplace")
    assert verify_upcycle(dense, in_place, make_batch(dense)).relative_error < EXACT_FP32


def test_old_transformers_are_refused_by_everything_that_needs_a_new_one(tmp_path, monkeypatch):
    dense = make_dense("gpt2")
    before = copy.deepcopy(dense.state_dict())
    moe = upcycle(dense, 4, 2)
    moe.save_pretrained(tmp_path / "moe")
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) if name == "torch" else "5.6.2")
    for call in (
        lambda: upcycle(dense, 4, 2),
        lambda: upcycle_checkpoint(tmp_path / "moe", tmp_path / "other", num_experts=4, top_k=2),
        lambda: load_upcycled(tmp_path / "moe"),
        lambda: collect_statistics(moe).__enter__(),
        lambda: patch(moe),
        experts_classes,
    ):
        with pytest.raises(ImportError, match=r"transformers 5\.6\.2 is too old.*5\.7 or later"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    assert all(torch.equal(before[key], tensor) for key, tensor in dense.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("compute", [nn.utils.parametrizations.weight_norm, prune.identity])
def test_a_block_whose_weights_are_computed_is_refused(name, compute):
    """A checkpoint, or the copy, has the parameters that they are computed from."""
    model = make_dense(name)
    linear = next(module for path, module in model.named_modules() if path.endswith(("mlp.c_fc", "mlp.up_proj")))
    with torch.no_grad():
        compute(linear, "weight")
        with pytest.raises(ValueError, match=r"weight of .*mlp\.\w+ is computed from other parameters .*upcycle"):
            upcycle(model, 4, 2, target="inplace")


def test_a_block_that_computes_more_than_its_linears_is_refused():
    dense = make_dense("gemma")
    mlp = dense.model.layers[1].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) + 0.01 * x
    with pytest.raises(ValueError, match=r"made from model.layers.1.mlp differ from it by"):
        upcycle(dense, 4, 2)
    upcycle(dense, 4, 2, layers=[0])
