"""The router's kernels against plain PyTorch in fp64: values, every gradient, ties, skipped tokens."""

import math
from dataclasses import dataclass, field
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE
from tolerance import assert_close_to_exact
from uninitialised import nan_filled_memory

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.routing import RoutingRule
from tritonmoe.config.scores import SCORES, ScoreName
from tritonmoe.ops import aot
from tritonmoe.ops.kernels import launch, router_products
from tritonmoe.ops.kernels.router_choice import choose_experts
from tritonmoe.ops.kernels.router_choice_grad import choice_grad
from tritonmoe.ops.kernels.router_counts import count_pairs
from tritonmoe.ops.kernels.router_kernels import route, route_grad
from tritonmoe.ops.kernels.scores import KERNEL_FUNCTIONS
from tritonmoe.routing import TopKRouter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEEPSEEK = {
    "score_function": "sigmoid",
    "selection_bias": True,
    "num_expert_groups": 8,
    "top_k_groups": 4,
    "routed_scaling_factor": 2.5,
}
DEEPSEEK_V4 = {"score_function": "sqrtsoftplus", "selection_bias": True, "routed_scaling_factor": 1.5}


@dataclass(frozen=True)
class Case:
    """A router, and its tokens' number and dtype."""

    dtype: torch.dtype
    num_tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    settings: dict = field(default_factory=dict)
    bad_rows: tuple[int, ...] = ()

    @property
    def config(self):
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_experts", "top_k")}
        return MoEConfig(intermediate_size=8, **sizes, **self.settings)


CASES = {
    "bf16": Case(BF16, 70, 72, 60, 6, bad_rows=(0, 69)),
    "fp16-odd": Case(FP16, 33, 71, 12, 3, {"renormalize": False, "routed_scaling_factor": 1.5}, (5,)),
    "bf16-odd": Case(BF16, 9, 37, 7, 7, {"score_function": "sigmoid"}),
    "fp32": Case(FP32, 33, 40, 60, 6, bad_rows=(32,)),
    "deepseek": Case(BF16, 40, 64, 64, 8, DEEPSEEK, (3, 4)),
    "deepseek-v4": Case(BF16, 20, 40, 24, 6, {**DEEPSEEK_V4, "renormalize": True}, (2,)),
    "sqrtsoftplus-fp32": Case(FP32, 12, 33, 9, 2, {**DEEPSEEK_V4, "renormalize": False}),
    "groups-of-one": Case(BF16, 9, 16, 10, 2, {**DEEPSEEK, "num_expert_groups": 10}),
    "softmax-after-topk": Case(BF16, 20, 40, 32, 4, {"softmax_after_topk": True, "routed_scaling_factor": 1.5}, (1,)),
    "most-experts": Case(BF16, 5, 16, 1024, 16),
    "one-expert": Case(BF16, 1, 1, 1, 1),
    "no-tokens": Case(BF16, 0, 16, 6, 2),
}


class Operands:
    """A router's random operands; those of bad rows give logits that are no numbers."""

    def __init__(self, case):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

        tokens, experts, width = case.num_tokens, case.num_experts, case.hidden_size
        self.case, self.rule = case, RoutingRule.of(case.config)
        self.x = draw(tokens, width).to(case.dtype)
        for row in case.bad_rows:
            self.x[row, row % width] = math.nan
        self.weight = draw(experts, width, scale=width**-0.5).to(case.dtype)
        self.bias = draw(experts, scale=0.1) if case.config.selection_bias else None
        self.grads = draw(tokens, experts), draw(tokens, experts), draw(tokens, case.top_k)

    def plain(self, dtype, grads):
        """Return what PyTorch's operations give in `dtype`: results by name, with the gradients that `grads` bring."""
        router = TopKRouter(self.case.config, backend="torch", device=DEVICE, dtype=dtype)
        with torch.no_grad():
            router.weight.copy_(self.weight)
            if self.bias is not None:
                router.e_score_correction_bias.copy_(self.bias)
        x = self.x.to(dtype).requires_grad_()
        routing = router(x)
        results = routing.logits, routing.scores, routing.topk_weights
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        outputs, grad_outputs = zip(*pairs, strict=True)
        dx, dweight = torch.autograd.grad(outputs, (x, router.weight), grad_outputs)
        return {
            "logits": torch.where(routing.topk_ids[:, :1] >= 0, routing.logits, 0.0),
            "scores": routing.scores,
            "topk_ids": routing.topk_ids,
            "topk_weights": routing.topk_weights,
            "counts": torch.cat([routing.load, routing.num_nonfinite_rows.view(1)]),
            "dx": dx,
            "dweight": dweight,
        }

    def by_kernels(self, grads):
        with nan_filled_memory():
            routed = route(self.x, self.weight, self.bias, self.rule)
            saved = self.x, self.weight, routed.scores, routed.topk_ids, routed.topk_weights
            dx, dweight = route_grad(*saved, grads, self.rule, (True, True))
        is_finite = routed.logits.isfinite().all(dim=1)
        assert torch.equal(is_finite, routed.topk_ids[:, 0] >= 0)
        logits = torch.where(is_finite[:, None], routed.logits, 0.0)
        return {**routed._asdict(), "logits": logits, "dx": dx, "dweight": dweight}


def compare(case, grads=None):
    operands = Operands(case)
    grads = operands.grads if grads is None else grads(*operands.grads)
    actual = operands.by_kernels(grads)
    plain, exact = (operands.plain(dtype, grads) for dtype in (case.dtype, torch.float64))
    for name in ("topk_ids", "counts"):
        assert torch.equal(actual[name], exact[name]), name
        assert actual[name].dtype == torch.int64
    for name in ("logits", "scores", "topk_weights", "dx", "dweight"):
        assert_close_to_exact(name, actual[name], plain[name], exact[name])
    bad_rows = list(case.bad_rows)
    assert (actual["topk_ids"][bad_rows] == -1).all()
    assert not actual["topk_weights"][bad_rows].any()
    assert not actual["scores"][bad_rows].any()
    assert not actual["dx"][bad_rows].any()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    compare(CASES[name])


GIVEN = {
    "weights": lambda logits, scores, weights: (None, None, weights),
    "scores": lambda logits, scores, weights: (None, scores, None),
    "logits": lambda logits, scores, weights: (logits, None, None),
    "expanded": lambda logits, scores, weights: tuple(
        grad[:1, :1].expand(grad.shape) for grad in (logits, scores, weights)
    ),
    "transposed": lambda *grads: tuple(grad.T.contiguous().T for grad in grads),
}


@pytest.mark.parametrize("given_grads", GIVEN)
@pytest.mark.parametrize("name", ["bf16-odd", "softmax-after-topk"])
def test_each_gradient_alone_and_in_any_strides(name, given_grads):
    compare(CASES[name], GIVEN[given_grads])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_weight_that_is_no_number_leaves_nothing_to_route(dtype):
    operands = Operands(Case(dtype, 5, 16, 6, 2))
    operands.weight[3, 4] = math.nan
    found = operands.by_kernels(operands.grads)
    assert found["counts"].tolist() == [0, 0, 0, 0, 0, 0, 5]
    assert not any(found[name].any() for name in ("scores", "topk_weights", "dx", "dweight"))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_and_weights_in_any_strides(dtype):
    near, far = Operands(Case(dtype, 9, 24, 12, 3)), Operands(Case(dtype, 9, 24, 12, 3))
    far.x = torch.stack([near.x, near.x.new_full(near.x.shape, math.nan)], 1).flatten(0, 1)[::2]
    far.weight = near.weight.T.contiguous().T
    expected, actual = (operands.by_kernels(operands.grads) for operands in (near, far))
    if dtype == BF16:  # PyTorch's product may round otherwise
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_a_token_s_bits_do_not_depend_on_the_others():
    whole, part = (Operands(Case(BF16, 70, 40, 60, 6)) for _ in range(2))
    part.x, part.grads = whole.x[66:69], tuple(grad[66:69] for grad in whole.grads)
    expected, actual = (operands.by_kernels(operands.grads) for operands in (whole, part))
    for name in ("logits", "scores", "topk_ids", "topk_weights", "dx"):
        assert torch.equal(actual[name], expected[name][66:69]), name


def test_a_weight_s_gradient_is_cut_into_pieces(monkeypatch):
    monkeypatch.setattr(router_products, "ROWS_PER_SPLIT", 32)
    compare(Case(BF16, 100, 24, 4, 2, bad_rows=(60,)))


@pytest.mark.parametrize(("version", "num_stages"), [((3, 7, 0), [1, 1, 1]), ((3, 7, 1), [3, 3, 5])])
def test_products_on_blackwell_copy_asynchronously_only_where_fences_are(version, num_stages, monkeypatch):
    monkeypatch.setattr(launch, "TRITON_VERSION", version)
    x, weight = torch.empty(100, 64, dtype=BF16, device="meta"), torch.empty(64, 64, dtype=BF16, device="meta")
    with launch.recording(aot.TARGETS["sm_100"]) as launches:
        routed = route(x, weight, None, RoutingRule(2))
        saved = x, weight, routed.scores, routed.topk_ids, routed.topk_weights
        route_grad(*saved, (None, None, routed.topk_weights), RoutingRule(2), (True, True))
    assert [item.options["num_stages"] for item in launches if "BLOCK_N" in item.constexprs] == num_stages


def test_every_score_has_its_kernel_functions():
    assert set(SCORES) == set(KERNEL_FUNCTIONS) == set(get_args(ScoreName))
    with pytest.raises(KeyError, match="tanh"):
        choose_experts(torch.ones(1, 4, device=DEVICE), None, RoutingRule(2, "tanh"))


@pytest.mark.parametrize("name", ["sigmoid", "sqrtsoftplus"])
def test_scores_of_any_logit_and_their_slopes(name):
    """Relative to fp64, as far as fp32 has normal numbers; far below, nothing is NaN."""
    logits = torch.cat([torch.linspace(-85, 85, 171), torch.tensor([-1e30, -200.0, -1e-6, 0.0, 1e-6, 200.0, 1e30])])
    rule = RoutingRule(1, name, renormalize=False)
    scores, ids, weights = choose_experts(logits[:, None].to(DEVICE), None, rule)
    grads = torch.ones_like(scores)
    slopes = choice_grad(scores, ids, weights, (None, grads, None), rule, FP32)
    exact = logits.double().requires_grad_()
    exact_scores = SCORES[name](exact)
    (exact_slopes,) = torch.autograd.grad(exact_scores.sum(), exact)
    plain = logits.clone().requires_grad_()
    plain_scores = SCORES[name](plain)
    (plain_slopes,) = torch.autograd.grad(plain_scores.sum(), plain)
    # A kernel's slope is of the rounded score, which is 1 from a logit of 17 on where it is a sigmoid. A GPU raises 2
    # to the logit over log(2), a number up to 123 that is rounded to 2^-18: so far are exponentials off, relatively.
    slopes_atol = 6e-8 if name == "sigmoid" else 1e-20
    for found, found_slopes in ((scores.cpu()[:, 0], slopes.cpu()[:, 0]), (plain_scores, plain_slopes)):
        torch.testing.assert_close(found.double(), exact_scores.detach(), rtol=1e-5, atol=1e-37)
        torch.testing.assert_close(found_slopes.double(), exact_slopes, rtol=1e-5, atol=slopes_atol)


def test_ties_go_to_the_smaller_id():
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [[1, 1, 1, 1, 1], [0, 2, -0.0, 2, 2], [-0.0, 0, -1, 0, -1], [nan, 1, 2, 3, 4], [1, 2, inf, 0, 0]], device=DEVICE
    )
    for rule in (RoutingRule(3), RoutingRule(3, softmax_after_topk=True), RoutingRule(3, score_function="sigmoid")):
        _, ids, weights = choose_experts(logits, None, rule)
        assert ids.tolist() == [[0, 1, 2], [1, 3, 4], [0, 1, 3], [-1] * 3, [-1] * 3]
        assert not weights[3:].any()
        assert count_pairs(ids, 5).tolist() == [2, 3, 1, 2, 1, 2]


def test_groups_of_equal_scores():
    """Of equal groups the first ones are eligible, though an expert elsewhere is as good."""
    logits = torch.tensor([[3.0, 1, 2, 2, 2, 2, 4, 0]], device=DEVICE)
    rule = RoutingRule(4, score_function="sigmoid", num_expert_groups=4, top_k_groups=2)
    bias = torch.zeros(8, device=DEVICE)
    assert choose_experts(logits, bias, rule)[1].tolist() == [[2, 3, 4, 5]]


def test_experts_that_a_bias_forbids_come_last():
    logits = torch.tensor([[3.0, 2, 1, 0]], device=DEVICE)
    bias = torch.tensor([-math.inf, 0, -math.inf, 0], device=DEVICE)
    scores, ids, weights = choose_experts(logits, bias, RoutingRule(4, score_function="sigmoid", renormalize=False))
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert torch.equal(weights, scores.gather(1, ids))


@st.composite
def rules(draw):
    num_groups, group_size = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 7))
    top_groups, after = draw(st.integers(1, num_groups)), draw(st.booleans())
    return num_groups * group_size, RoutingRule(
        draw(st.integers(1, min(16, top_groups * group_size))),
        score_function="softmax" if after else draw(st.sampled_from(sorted(SCORES))),
        softmax_after_topk=after,
        renormalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_expert_groups=num_groups,
        top_k_groups=top_groups,
    )


@settings(max_examples=20, deadline=None)
@given(rules(), st.integers(0, 20), st.booleans(), st.integers(0, 99))
def test_any_rule(case, num_tokens, has_bias, seed):
    """Compare the choice and its gradients on logits that are few integers, so that many scores are equal."""
    num_experts, rule = case
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (num_tokens, num_experts), generator=generator).float()
    bias = torch.randint(-2, 3, (num_experts,), generator=generator) / 8 if has_bias else None
    grads = [torch.randn(num_tokens, width, generator=generator) for width in (num_experts, num_experts, rule.top_k)]
    arguments = [None if given is None else given.to(DEVICE) for given in (logits, bias)]
    scores, ids, weights = choose_experts(*arguments, rule)
    counts = count_pairs(ids, num_experts)
    dlogits = choice_grad(scores, ids, weights, tuple(grad.to(DEVICE) for grad in grads), rule, FP32)

    scores, ids, weights, counts, dlogits = (result.cpu() for result in (scores, ids, weights, counts, dlogits))
    ranked_by = logits if rule.softmax_after_topk else scores
    ranked_by = ranked_by if bias is None else ranked_by + bias
    groups = ranked_by.unflatten(1, (rule.num_expert_groups, -1))
    of_groups = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(dim=2)
    eligible = of_groups.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_k_groups]
    is_eligible = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, eligible, True)
    ranked_by = torch.where(is_eligible.repeat_interleave(groups.shape[2], 1), ranked_by, -math.inf)
    assert torch.equal(ids, ranked_by.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_k])
    assert counts.tolist() == [*torch.bincount(ids.flatten(), minlength=num_experts).tolist(), 0]

    exact = logits.double().requires_grad_()
    exact_scores = SCORES[rule.score_function](exact)
    weighed_by = exact if rule.softmax_after_topk else exact_scores
    exact_weights = weighed_by.gather(1, ids)
    if rule.softmax_after_topk:
        exact_weights = exact_weights.softmax(1)
    elif rule.renormalize:
        exact_weights = exact_weights / (exact_weights.sum(dim=1, keepdim=True) + 1e-20)
    exact_weights = exact_weights * rule.routed_scaling_factor
    results = exact, exact_scores, exact_weights
    loss = sum((result * grad).sum() for result, grad in zip(results, grads, strict=True))
    (exact_dlogits,) = torch.autograd.grad(loss, exact)
    for actual, right in ((scores, exact_scores), (weights, exact_weights), (dlogits, exact_dlogits)):
        torch.testing.assert_close(actual.double(), right.detach(), rtol=2e-6, atol=2e-6)
