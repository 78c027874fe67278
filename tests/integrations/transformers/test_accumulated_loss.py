"""The auxiliary loss's gradient in a step of Trainer, of all its batches and ranks, is that of one large batch."""

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from accumulated_loss_worker import QWEN3_MOE, make_model, router_gradients
from processes import run_torchrun
from tiny_models import make_dense
from torch import nn

from tritonmoe.integrations.transformers import aux_loss, patch, upcycle
from tritonmoe.integrations.transformers.accumulated_loss import heeds_num_items
from tritonmoe.integrations.transformers.requirements import check_transformers

pytest.importorskip("accelerate")
TOLERANCE = {"atol": 1e-7, "rtol": 1e-4}
MULTIPLIED = "adds its auxiliary loss whole"


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_accumulated_batches_of_models_upcycled_in_place(name, tmp_path):
    """The experts are copies, so all that a router gets is of the auxiliary loss."""
    moe = make_model(name)
    row = torch.randint(3, 64, (9,), generator=torch.Generator().manual_seed(1)).expand(4, 9)
    by_hand = copy.deepcopy(moe)
    nn.functional.cross_entropy(by_hand(row).logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()).backward()
    routers = [module for path, module in by_hand.named_modules() if path.endswith(".router")]
    of_tokens = [router.weight.grad.clone() for router in routers]
    by_hand.zero_grad()
    by_hand(row)
    aux_loss(by_hand).backward()
    for accumulation in (1, 2, 4):
        found = router_gradients(copy.deepcopy(moe), accumulation, tmp_path)
        assert len(found) == len(routers)
        for gradient, router, rest in zip(found, routers, of_tokens, strict=True):
            assert rest.norm() < 1e-3 * router.weight.grad.norm()
            torch.testing.assert_close(gradient, router.weight.grad, atol=1e-6, rtol=2e-3)


@pytest.mark.thorough
def test_each_batch_has_its_share_of_the_auxiliary_loss():
    moe = upcycle(make_dense("gemma"), 4, 2, init="noise", target="inplace").train()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    first = 1 if check_transformers() >= (5, 10) else 0  # the first label that Trainer counts
    for end in (4, 9):
        labels = ids.clone()
        labels[:, end:] = -100
        alone, auxiliary = moe(ids, labels=labels).loss, aux_loss(moe)
        loss = moe(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
        of_tokens = (alone - auxiliary) * 2 * (end - 1) / 40
        torch.testing.assert_close(loss, of_tokens + auxiliary * 2 * (end - first) / 40)
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    loss = moe(input_ids=ids, labels=ids, shift_labels=shifted, num_items_in_batch=40).loss
    torch.testing.assert_close(loss, alone * 16 / 40)
    eager = moe(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss
    in_data_parallel = moe(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor([[40]])).loss
    torch.testing.assert_close(in_data_parallel, eager.view(1, 1))
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(loss, eager)


BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def test_logits_of_one_number_are_no_loss():
    """Of shape (1, 1), as is a loss that Trainer has a replica of DataParallel divide."""
    dense = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=1))
    moe = upcycle(dense, 4, 2, target="inplace").train()
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = moe(input_ids=ids).logits
    assert expected.shape == (1, 1)
    assert torch.equal(moe(input_ids=ids, return_dict=False)[0], expected)
    logits = moe(input_ids=ids, return_dict=False, num_items_in_batch=torch.tensor([[4]]))[0]
    assert torch.equal(logits, expected)


def test_models_whose_own_loss_is_a_plain_mean_keep_its_proportion():
    """Trainer multiplies their loss by the batches, and so the auxiliary loss in it."""
    dense = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    moe = upcycle(dense, 4, 2, init="noise", target="inplace").train()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    arguments = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    torch.testing.assert_close(moe(**arguments, num_items_in_batch=torch.tensor(8)).loss, moe(**arguments).loss)


def test_whose_forward_hands_num_items_on():
    class Inherits(transformers.GPT2LMHeadModel):
        def forward(self, *arguments, **keywords):
            return super().forward(*arguments, **keywords)

    class OwnLoss(transformers.GPT2LMHeadModel):
        def forward(self, *arguments, **keywords):
            return self.transformer(*arguments, **keywords)[0].mean()

    heeding = (
        transformers.GPT2LMHeadModel,
        transformers.LlamaForCausalLM,
        transformers.ModernBertForMaskedLM,
        Inherits,
    )
    for model_class in heeding:
        assert heeds_num_items(model_class), model_class
    for model_class in (transformers.BertForMaskedLM, transformers.T5ForConditionalGeneration, OwnLoss):
        assert not heeds_num_items(model_class), model_class


@pytest.mark.parametrize("kind", ["qwen3_moe", "native"])
def test_transformers_own_models_say_that_theirs_is_multiplied(kind, tmp_path, caplog):
    model = make_model(kind)
    caplog.set_level(logging.WARNING, "tritonmoe")
    expected = router_gradients(copy.deepcopy(model), 1, tmp_path)
    assert MULTIPLIED not in caplog.text
    router_gradients(copy.deepcopy(model), 4, tmp_path)
    assert caplog.text.count(MULTIPLIED) == 1
    assert "about 4 batches" in caplog.text
    assert "router_aux_loss_coef = 0.01" in caplog.text
    divided, averaged = copy.deepcopy(model), copy.deepcopy(model)
    divided.router_aux_loss_coef /= 4
    averaged.accepts_loss_kwargs = False
    caplog.clear()
    torch.testing.assert_close(router_gradients(divided, 4, tmp_path), expected, **TOLERANCE)
    # Older releases of transformers divide by all labels where they sum, and by the shifted ones where they average.
    of_one_batch = router_gradients(copy.deepcopy(averaged), 1, tmp_path)
    torch.testing.assert_close(router_gradients(averaged, 4, tmp_path), of_one_batch, **TOLERANCE)
    assert MULTIPLIED not in caplog.text


def test_where_models_of_text_and_images_have_their_coefficient(caplog):
    """They read it in their config at each call; an attribute of the model's would do nothing."""
    text = {**QWEN3_MOE, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).train()
    patch(model)
    divided, misled = copy.deepcopy(model), copy.deepcopy(model)
    divided.config.text_config.router_aux_loss_coef /= 4
    misled.router_aux_loss_coef = 0.01 / 4
    for other, count in ((model, 1), (misled, 1), (divided, 0)):
        caplog.clear()
        call_with_a_quarter(other)
        assert caplog.text.count(MULTIPLIED) == count
        assert caplog.text.count("Divide model.config.text_config.router_aux_loss_coef by") == count


def call_with_a_quarter(model: nn.Module) -> None:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, output_router_logits=True, num_items_in_batch=torch.tensor(64))


def test_what_teaches_no_router_is_not_said_to_be_multiplied(caplog):
    without, frozen = make_model("qwen3_moe"), make_model("qwen3_moe")
    without.config.router_aux_loss_coef = without.router_aux_loss_coef = 0.0
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    for model in (without, frozen):
        call_with_a_quarter(model)
    assert MULTIPLIED not in caplog.text


def test_replicas_say_it_once(caplog):
    """A replica of DataParallel is a new object in each step."""
    model = make_model("qwen3_moe")
    for _ in range(5):
        call_with_a_quarter(model._replicate_for_data_parallel())
    assert caplog.text.count(MULTIPLIED) == 1
    caplog.clear()
    moe = upcycle(make_dense("gemma"), 4, 2, target="inplace").train()
    for _ in range(5):
        moe._replicate_for_data_parallel()(torch.ones(2, 9, dtype=torch.int64))
    assert caplog.text.count("nobody took the auxiliary loss") == 1


def test_layers_that_are_replaced_are_seen():
    moe = upcycle(make_dense("gemma"), 4, 2, init="noise", target="inplace").train()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    moe(ids, labels=ids)
    layer, fresh = moe.model.layers[0], copy.deepcopy(moe)
    before, dense = layer.mlp, nn.Identity()
    for mlp in (copy.deepcopy(before), dense, before):
        layer.mlp = mlp
        loss = moe(ids, labels=ids).loss
        fresh.model.layers[0].mlp = copy.deepcopy(mlp)
        torch.testing.assert_close(loss, copy.deepcopy(fresh)(ids, labels=ids).loss)
        assert aux_loss(moe) > 0


@pytest.mark.thorough
def test_ranks_of_models_upcycled_in_place(tmp_path):
    kinds = ["gpt2", "gpt2 spread"]
    expected = router_gradients(make_model("gpt2"), 1, tmp_path)
    run_torchrun(2, Path(__file__).parent / "accumulated_loss_worker.py", str(tmp_path), cases=kinds)
    for kind in kinds:
        for accumulation in (1, 2):
            found = torch.load(tmp_path / f"{kind} {accumulation}.pt")
            torch.testing.assert_close(found, expected, **TOLERANCE)
