"""The router against transformers' own routers and hand-written integers; its gradients, counts and bad rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe import modeling_granitemoe
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.scores import SCORES
from tritonmoe.routing import Routing, TopKRouter, load_balance_loss, routing_statistics, z_loss
from tritonmoe.routing.router import _say_once


def make_config(num_experts: int, top_k: int, hidden_size: int = 16, **settings) -> MoEConfig:
    return MoEConfig(hidden_size=hidden_size, intermediate_size=8, num_experts=num_experts, top_k=top_k, **settings)


def make_router(config: MoEConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> TopKRouter:
    torch.manual_seed(seed)
    return TopKRouter(config, dtype=dtype)


def identity_router(num_experts: int, top_k: int, **settings) -> TopKRouter:
    """A router whose logits are its tokens, so that a test can write logits by hand."""
    router = TopKRouter(make_config(num_experts, top_k, hidden_size=num_experts, **settings))
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def dense_weights(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(T, K) ids and weights as a (T, E) matrix, in which the order of the slots no longer shows."""
    return torch.zeros(ids.shape[0], num_experts).scatter_add(1, ids, weights.float())


SIZES = {"num_local_experts": 12, "num_experts_per_tok": 3, "hidden_size": 16}
QWEN_SIZES = {"num_experts": 12, "num_experts_per_tok": 3, "hidden_size": 16}


@pytest.mark.parametrize(
    ("make_theirs", "ours"),
    [
        pytest.param(lambda: MixtralTopKRouter(MixtralConfig(**SIZES)), {}, id="mixtral"),
        pytest.param(
            lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(**QWEN_SIZES, norm_topk_prob=True)),
            {},
            id="qwen3_moe",
        ),
        pytest.param(
            lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(**QWEN_SIZES, norm_topk_prob=False)),
            {"renormalize": False},
            id="qwen3_moe-not-renormalized",
        ),
        pytest.param(
            lambda: GptOssTopKRouter(GptOssConfig(**SIZES)),
            {"softmax_after_topk": True},
            id="gpt_oss",
        ),
        pytest.param(
            lambda: modeling_granitemoe.GraniteMoeTopKRouter(GraniteMoeConfig(**SIZES)),
            {"softmax_after_topk": True},
            id="granitemoe",
            marks=pytest.mark.skipif(
                not hasattr(modeling_granitemoe, "GraniteMoeTopKRouter"), reason="came after transformers 5.7"
            ),
        ),
    ],
)
def test_softmax_routers_of_transformers_give_the_same_bits(make_theirs, ours):
    theirs = make_theirs()
    router = make_router(make_config(12, 3, **ours))
    theirs.load_state_dict(router.state_dict(), strict=False)
    x = torch.randn(50, 16)
    found = theirs(x)
    logits, weights, ids = found if found[0].is_floating_point() else found[::-1]  # as granitemoe of 5.17 gives them
    routing = router(x)
    assert torch.equal(routing.topk_ids, ids)
    assert torch.equal(routing.topk_weights, weights)
    assert torch.equal(routing.logits, logits)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (4, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize(
    ("theirs_of", "config_of"),
    [
        (DeepseekV3TopkRouter, DeepseekV3Config),
        (Glm4MoeTopkRouter, Glm4MoeConfig),
        (Dots1TopkRouter, Dots1Config),
    ],
    ids=["deepseek_v3", "glm4_moe", "dots1"],
)
def test_group_limited_routers_of_transformers(theirs_of, config_of, renormalize, num_groups, top_k_groups):
    theirs = theirs_of(
        config_of(
            n_routed_experts=12,
            num_experts_per_tok=3,
            hidden_size=16,
            n_group=num_groups,
            topk_group=top_k_groups,
            norm_topk_prob=renormalize,
            routed_scaling_factor=2.5,
        )
    )
    router = make_router(
        make_config(
            12,
            3,
            score_function="sigmoid",
            renormalize=renormalize,
            routed_scaling_factor=2.5,
            selection_bias=True,
            num_expert_groups=num_groups,
            top_k_groups=top_k_groups,
        )
    )
    with torch.no_grad():
        router.e_score_correction_bias.uniform_(-0.2, 0.2)
    theirs.load_state_dict(router.state_dict(), strict=True)
    x = torch.randn(200, 16)
    if isinstance(theirs(x), torch.Tensor):
        pytest.skip("this transformers chooses the experts outside its router")
    logits, weights, ids = theirs(x)
    routing = router(x)
    assert torch.equal(routing.logits, logits)
    assert torch.equal(routing.topk_ids.sort(dim=1).values, ids.sort(dim=1).values)
    # their top-k is unsorted, so the sum that renormalises may round differently
    torch.testing.assert_close(
        dense_weights(routing.topk_ids, routing.topk_weights, 12),
        dense_weights(ids, weights, 12),
        rtol=3e-7,
        atol=0,
    )


def by_best(scores: torch.Tensor, num_best: int, num_groups: int, top_k_groups: int, top_k: int) -> torch.Tensor:
    """Ids, sorted, among the experts of the groups whose `num_best` best scores have the largest sums."""
    groups = scores.view(len(scores), num_groups, -1)
    chosen = groups.topk(num_best, dim=2).values.sum(dim=2).topk(top_k_groups, dim=1).indices
    is_out = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, chosen, False).unsqueeze(2)
    return groups.masked_fill(is_out, -math.inf).flatten(1).topk(top_k, dim=1).indices.sort(dim=1).values


@pytest.mark.parametrize(("top_k", "top_k_groups"), [(2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (6, 3), (8, 4), (3, 1)])
def test_groups_of_megatron(top_k, top_k_groups, caplog):
    """Megatron-LM's group_limited_topk scores a group by its K // top_k_groups best experts; a warning says where."""
    _say_once.cache_clear()
    settings = {"num_expert_groups": 6, "top_k_groups": top_k_groups, "score_function": "sigmoid"}
    for seed in range(2):
        router = make_router(make_config(48, top_k, selection_bias=True, **settings), seed)
    routing = router(torch.randn(300, 16))
    found = routing.topk_ids.sort(dim=1).values
    assert torch.equal(found, by_best(routing.scores, 2, 6, top_k_groups, top_k))
    of_megatron = by_best(routing.scores, top_k // top_k_groups, 6, top_k_groups, top_k)
    is_same = top_k // top_k_groups == 2
    assert torch.equal(found, of_megatron) == is_same
    said = [record.message for record in caplog.records]
    assert len(said) == (not is_same)
    assert all(f"Megatron-LM scores a group by its {top_k // top_k_groups} best experts" in text for text in said)


@pytest.mark.skipif(not hasattr(modeling_deepseek_v2, "DeepseekV2TopkRouter"), reason="came after transformers 5.7")
def test_groups_of_deepseek_v2_are_others(caplog):
    """It scores a group by its one best expert."""
    _say_once.cache_clear()
    sizes = {"n_routed_experts": 12, "num_experts_per_tok": 4, "hidden_size": 16, "num_attention_heads": 4}
    config = DeepseekV2Config(**sizes, n_group=6, topk_group=2, topk_method="group_limited_greedy")
    theirs = modeling_deepseek_v2.DeepseekV2TopkRouter(config)
    router = make_router(make_config(12, 4, num_expert_groups=6, top_k_groups=2, renormalize=False))
    theirs.load_state_dict(router.state_dict(), strict=True)
    x = torch.randn(300, 16)
    _, _, ids = theirs(x)
    routing = router(x)
    assert torch.equal(ids.sort(dim=1).values, by_best(routing.scores, 1, 6, 2, 4))
    assert torch.equal(routing.topk_ids.sort(dim=1).values, by_best(routing.scores, 2, 6, 2, 4))
    assert not torch.equal(ids.sort(dim=1).values, routing.topk_ids.sort(dim=1).values)
    assert "DeepSeek-V2 scores a group by its best expert alone" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_expert_groups": 8, "top_k_groups": 8},
        {"num_expert_groups": 8, "top_k_groups": 4, "score_function": "sigmoid", "selection_bias": True},
        {"num_expert_groups": 64, "top_k_groups": 8},
    ],
    ids=["no groups", "all groups", "DeepSeek-V3", "groups of one"],
)
def test_nothing_is_said_of_groups_that_all_choose_alike(settings, caplog):
    _say_once.cache_clear()
    TopKRouter(make_config(64, 8, **settings))
    assert not caplog.records


def test_hand_written_softmax():
    router = identity_router(4, 2)
    routing = router(torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 0.0, 0.0, 3.5]]))
    assert routing.topk_ids.tolist() == [[2, 1], [3, 0]]
    expected = [[1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))], [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))]]
    torch.testing.assert_close(routing.topk_weights, torch.tensor(expected))
    assert routing.num_nonfinite_rows.item() == 0
    assert routing.num_nonfinite_rows.dtype == torch.int64


def test_the_selection_bias_selects_but_does_not_weigh():
    router = identity_router(4, 2, score_function="sigmoid", renormalize=False, selection_bias=True)
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 10.0]))
    routing = router(torch.tensor([[0.0, 1.0, 2.0, -1.0]]))
    assert routing.topk_ids.tolist() == [[3, 2]]
    torch.testing.assert_close(routing.topk_weights, torch.tensor([[-1.0, 2.0]]).sigmoid())


def test_groups_keep_the_best_sum_of_two_and_singletons_their_one():
    # group 0 has the best single expert (id 1), group 1 the best pair (ids 2 and 3)
    logits = torch.tensor([[-9.0, 2.0, 1.5, 1.5, 0.0, 0.0]])
    paired = identity_router(6, 2, score_function="sigmoid", num_expert_groups=3, top_k_groups=1)
    assert sorted(paired(logits).topk_ids[0].tolist()) == [2, 3]
    single = identity_router(6, 2, score_function="sigmoid", num_expert_groups=6, top_k_groups=2)
    assert single(torch.tensor([[0.0, 5.0, 1.0, 2.0, 4.0, 3.0]])).topk_ids.tolist() == [[1, 4]]


@pytest.mark.parametrize("score_function", sorted(SCORES))
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 3), (7, 5), (60, 6), (16, 16)])
def test_any_number_of_experts(num_experts, top_k, score_function):
    router = make_router(make_config(num_experts, top_k, score_function=score_function))
    routing = router(torch.randn(9, 16))
    assert routing.topk_ids.shape == routing.topk_weights.shape == (9, top_k)
    torch.testing.assert_close(routing.topk_weights.sum(dim=1), torch.ones(9))
    assert all(len(set(row)) == top_k for row in routing.topk_ids.tolist())


def test_no_tokens():
    router = make_router(make_config(6, 2, selection_bias=True))
    x = torch.zeros(0, 16, requires_grad=True)
    routing = router(x)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, 2)
    balance, z = load_balance_loss(routing, 6), z_loss(routing.logits)
    assert balance.item() == z.item() == 0.0
    (balance + z + routing.topk_weights.sum()).backward()
    assert x.grad.shape == (0, 16)
    assert torch.equal(router.weight.grad, torch.zeros(6, 16))
    statistics = routing_statistics(routing.topk_ids, 6)
    assert statistics.num_dead_experts == 6
    assert statistics.max_violation == statistics.entropy == statistics.coefficient_of_variation == 0.0


def test_low_precision_and_autocast_compute_scores_in_fp32():
    router = make_router(make_config(6, 2, selection_bias=True)).bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.load.dtype == torch.int64
    x = torch.randn(20, 16, dtype=torch.bfloat16, requires_grad=True)
    expected = x.float() @ router.weight.float().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
        loss = (routing.topk_weights * torch.randn(20, 2)).sum()
    assert torch.equal(routing.logits, expected)
    assert routing.topk_weights.dtype == routing.scores.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == router.weight.grad.dtype == torch.bfloat16


def test_a_cast_keeps_the_bits_of_the_selection_bias():
    router = make_router(make_config(6, 2, selection_bias=True))
    router.e_score_correction_bias.copy_(torch.linspace(-1, 1, 6))
    before = router.e_score_correction_bias.clone()
    assert torch.equal(router.to(torch.float16).e_score_correction_bias, before)
    assert "e_score_correction_bias" in router.state_dict()
    assert "load" not in router.state_dict()
    assert "e_score_correction_bias" not in make_router(make_config(6, 2)).state_dict()


def test_wrong_shapes_say_so():
    router = make_router(make_config(6, 2))
    with pytest.raises(ValueError, match=r"\(T, 16\) tokens, got shape \(3, 15\)"):
        router(torch.randn(3, 15))
    with pytest.raises(ValueError, match="selection_bias=True"):
        router.update_selection_bias()


@pytest.mark.parametrize("rate", [float("nan"), -1.0, "x", None])
def test_rates_of_the_selection_bias(rate):
    router = make_router(make_config(6, 2, selection_bias=True))
    with pytest.raises(ValueError, match=rf"rate must be finite and not negative, got {rate!r}"):
        router.update_selection_bias(rate)


def test_loading_forgets_what_load_held():
    """It isn't in checkpoints: behind to_empty() it is whatever memory held."""
    config = MoEConfig(8, 4, 6, 2, selection_bias=True)
    with torch.device("meta"):
        router = TopKRouter(config)
    router.to_empty(device="cpu").load.fill_(7)
    router.load_state_dict(TopKRouter(config).state_dict())
    assert not router.load.any()


def test_reduce_load_must_give_the_load():
    router = make_router(make_config(6, 2, selection_bias=True))
    for wrong, got in ((None, "NoneType"), (torch.ones(3), r"\(3,\)")):
        router.reduce_load = lambda load, wrong=wrong: wrong
        with pytest.raises(TypeError, match=rf"reduce_load must return the summed load \(6,\), got {got}: all_reduce"):
            router.update_selection_bias()
    assert (router.e_score_correction_bias == 0).all()


# Gradients


ROUTER_KINDS = [
    pytest.param({}, id="softmax"),
    pytest.param({"renormalize": False, "routed_scaling_factor": 1.5}, id="softmax-plain"),
    pytest.param({"softmax_after_topk": True}, id="softmax-after-topk"),
    pytest.param(
        {"score_function": "sigmoid", "selection_bias": True, "num_expert_groups": 3, "top_k_groups": 2}, id="groups"
    ),
]


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_gradients_in_fp64(kind):
    router = make_router(make_config(6, 2, hidden_size=5, **kind), dtype=torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(7, 2, dtype=torch.float64)

    def losses(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        return (
            (routing.topk_weights * coefficients).sum(),
            load_balance_loss(routing, 6),
            z_loss(routing.logits),
        )

    assert torch.autograd.gradcheck(losses, (x, router.weight))


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_bad_rows_are_skipped_and_change_nothing_else(kind):
    router = make_router(make_config(6, 2, **kind))
    clean = torch.randn(9, 16)
    bad_rows = [0, 4, 8]
    good_rows = [row for row in range(9) if row not in bad_rows]
    x = clean.clone()
    x[0, 3], x[4, 0], x[8] = math.nan, math.inf, 3e38  # the last overflows in the product
    coefficients = torch.randn(9, 2)

    def run(x: torch.Tensor, coefficients: torch.Tensor) -> tuple[Routing, list[torch.Tensor]]:
        x = x.clone().requires_grad_()
        routing = router(x)
        loss = (routing.topk_weights * coefficients).sum()
        loss = loss + load_balance_loss(routing, 6) + z_loss(routing.logits)
        return routing, [loss.detach(), *torch.autograd.grad(loss, (x, router.weight))]

    routing, (loss, dx, dweight) = run(x, coefficients)
    expected_routing, (expected_loss, expected_dx, expected_dweight) = run(clean[good_rows], coefficients[good_rows])
    assert routing.num_nonfinite_rows.item() == 3
    assert (routing.topk_ids[bad_rows] == -1).all()
    assert (routing.topk_weights[bad_rows] == 0).all()
    assert (routing.scores[bad_rows] == 0).all()
    assert (dx[bad_rows] == 0).all()
    assert torch.equal(routing.topk_ids[good_rows], expected_routing.topk_ids)
    torch.testing.assert_close(routing.topk_weights[good_rows], expected_routing.topk_weights)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(dx[good_rows], expected_dx)
    torch.testing.assert_close(dweight, expected_dweight)


@pytest.mark.parametrize("cause", ["tokens", "weight"])
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_nothing_but_bad_rows(kind, cause):
    router = make_router(make_config(6, 2, **kind))
    x = torch.randn(5, 16)
    with torch.no_grad():
        (x if cause == "tokens" else router.weight).fill_(math.nan)
    x.requires_grad_()
    routing = router(x)
    loss = routing.topk_weights.sum() + load_balance_loss(routing, 6) + z_loss(routing.logits)
    loss.backward()
    assert loss.item() == 0.0
    assert routing.num_nonfinite_rows.item() == 5
    assert torch.equal(x.grad, torch.zeros(5, 16))
    assert torch.equal(router.weight.grad, torch.zeros(6, 16))


# The selection bias


def skewed_tokens(num_tokens: int) -> torch.Tensor:
    """Tokens whose first half prefers the first experts (under an identity router over 8 experts)."""
    return torch.randn(num_tokens, 8) + torch.linspace(2.0, -2.0, 8)


def test_bias_updates_drive_a_skewed_router_to_balance():
    torch.manual_seed(0)
    router = identity_router(8, 2, score_function="sigmoid", selection_bias=True)
    first_ids = router(skewed_tokens(512)).topk_ids
    late_ids = []
    for step in range(200):
        routing = router(skewed_tokens(512))
        router.update_selection_bias(rate=0.01)
        if step >= 150:
            late_ids.append(routing.topk_ids)
    assert routing_statistics(first_ids, 8).max_violation > 1.5
    assert routing_statistics(torch.cat(late_ids), 8).max_violation < 0.1


def test_hand_written_bias_update_sums_over_ranks():
    other_rank = torch.tensor([1, 0, 0, 3])
    router = identity_router(4, 1, score_function="sigmoid", selection_bias=True)
    router.reduce_load = lambda load: load.add_(other_rank)
    router(torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 9.0, 0, 0]]))
    assert router.load.tolist() == [2, 2, 0, 0]
    assert router.update_selection_bias(rate=0.5).tolist() == [3, 2, 0, 3]  # mean load 2: expert 1 stays
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.5, -0.5]
    assert router.load.tolist() == [0, 0, 0, 0]


def test_only_training_forwards_and_routed_pairs_are_counted():
    router = make_router(make_config(6, 2, selection_bias=True))
    x = torch.randn(5, 16)
    x[1] = math.nan
    router(x)
    router(x)
    assert router.load.sum().item() == 2 * 4 * 2
    router.eval()
    router(x)
    assert router.load.sum().item() == 2 * 4 * 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_forward_is_counted_once(use_reentrant):
    router = make_router(make_config(6, 2, selection_bias=True))
    num_calls = 0

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return router(x).topk_weights.square().sum()

    x = torch.randn(5, 16, requires_grad=True)
    checkpoint(forward, x, use_reentrant=use_reentrant).backward()
    assert num_calls == 2
    assert router.load.sum().item() == 10
    forward(x).backward()
    assert router.load.sum().item() == 20


def test_compiles_without_graph_breaks():
    router = make_router(make_config(6, 2, selection_bias=True))
    x = torch.randn(5, 16)
    expected = router(x)
    routing = torch.compile(router, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(routing.topk_ids, expected.topk_ids)
    assert torch.equal(routing.topk_weights, expected.topk_weights)
    assert router.load.sum().item() == 20


# Properties


@st.composite
def routers(draw) -> tuple[MoEConfig, int, int]:
    num_groups = draw(st.sampled_from([1, 2, 3, 5]))
    group_size = draw(st.integers(1, 7))
    num_experts = num_groups * group_size
    top_k_groups = draw(st.integers(1, num_groups))
    softmax_after_topk = draw(st.booleans())
    config = make_config(
        num_experts,
        draw(st.integers(1, min(16, top_k_groups * group_size))),
        score_function="softmax" if softmax_after_topk else draw(st.sampled_from(sorted(SCORES))),
        softmax_after_topk=softmax_after_topk,
        renormalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        selection_bias=draw(st.booleans()),
        num_expert_groups=num_groups,
        top_k_groups=top_k_groups,
    )
    return config, draw(st.integers(0, 9)), draw(st.integers(0, 1000))


@settings(max_examples=60, deadline=None)
@given(routers(), st.lists(st.integers(0, 8), max_size=3))
def test_properties_of_any_routing(case, bad_rows):
    config, num_tokens, seed = case
    router = make_router(config, seed)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.normal_()
    x = torch.randn(num_tokens, 16)
    is_bad = torch.zeros(num_tokens, dtype=torch.bool)
    for row in bad_rows:
        if row < num_tokens:
            x[row, row], is_bad[row] = math.nan, True
    with torch.no_grad():
        routing = router(x)
    assert routing.num_nonfinite_rows.item() == is_bad.sum().item()
    assert (routing.topk_ids[is_bad] == -1).all()
    assert (routing.topk_weights[is_bad] == 0).all()
    ids, weights = routing.topk_ids[~is_bad], routing.topk_weights[~is_bad]
    assert ((ids >= 0) & (ids < config.num_experts)).all()
    assert all(len(set(row)) == config.top_k for row in ids.tolist())
    assert (weights >= 0).all()
    if config.renormalize or config.softmax_after_topk:
        sums = weights.sum(dim=1)
        torch.testing.assert_close(sums, torch.full_like(sums, config.routed_scaling_factor))
    group_size = config.num_experts // config.num_expert_groups
    assert all(len(set(row)) <= config.top_k_groups for row in (ids // group_size).tolist())
    statistics = routing_statistics(routing.topk_ids, config.num_experts)
    assert statistics.num_skipped_pairs == is_bad.sum().item() * config.top_k
    assert statistics.num_routed_pairs + statistics.num_skipped_pairs == num_tokens * config.top_k
    assert -1e-9 <= statistics.normalized_entropy <= 1 + 1e-9
