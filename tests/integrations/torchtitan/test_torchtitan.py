"""torchtitan with and without the override, from the same seed: first weights, three losses, and checkpoints both ways.

torchtitan is no part of the extra `test`: `bash .ci/framework torchtitan` runs these tests in a venv that has it.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

from processes import ENVIRONMENT, run_torchrun
from small_data import write_small_data
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchtitan.config import derive
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import DeepEPTokenDispatcher
from torchtitan.models.gpt_oss import gptoss_configs
from torchtitan.models.qwen3 import qwen3_configs

from bench.torchtitan import MODELS, OVERRIDE, RUN, arguments
from tritonmoe import ExpertPrecision, MoEConfig, OverlapConfig, moe_mlp, run_on_emulated_ranks
from tritonmoe.integrations import torchtitan as integration
from tritonmoe.integrations.torchtitan import FusedExperts, OverlappedRoutedExperts, routed_experts
from tritonmoe.routing import TopKRouter
from tritonmoe.transports import Transport

TOLERANCE = 1e-3
WORKER = Path(__file__).parent / "first_weights_worker.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tokenizer and texts, which torchtitan's wheel leaves out."""
    found = tmp_path_factory.mktemp("torchtitan")
    write_small_data(found)
    return found


def train(directory: Path, model: str, name: str, *others: str, size: int = 1, steps: int = 3) -> list[float]:
    """Run torchtitan's program, and return the loss of each step."""
    losses = directory / f"{model}-{name}.json"
    own = arguments(
        directory,
        model,
        name,
        checkpoint__interval=100,
        training__steps=steps,
        training__seq_len=128,
        training__local_batch_size=2,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    ended = subprocess.run(
        [*command, str(RUN), str(losses), *own, "--training.disable_cuda_graphs", *others],
        capture_output=True,
        text=True,
        timeout=600,
        env={**ENVIRONMENT, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(directory / "cache")},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(losses.read_text())


def trained(directory: Path, model: str, kind: str, size: int, expert_parallel: int) -> tuple[list[float], Any]:
    """Return the losses of a run with "own" or "our" experts, and the digests of its first weights; each run once."""
    name = f"{kind}-{size}-{expert_parallel}"
    losses = directory / f"{model}-{name}.json"
    if not losses.exists():
        override = OVERRIDE if kind == "ours" else ()
        settings = "--debug.seed", "3", "--parallelism.expert_parallel_degree", str(expert_parallel)
        train(directory, model, name, *settings, *override, size=size)
    return json.loads(losses.read_text()), json.loads(losses.with_suffix(".weights").read_text())


@pytest.mark.parametrize(("size", "expert_parallel"), [(1, 1), (2, 1), (2, 2)], ids=["one", "fsdp", "ep"])
@pytest.mark.parametrize("model", MODELS)
def test_a_seed_gives_torchtitans_own_weights_and_losses(
    model: str, size: int, expert_parallel: int, directory: Path
) -> None:
    """The first weights bit for bit, on each mesh."""
    (own, own_weights), (ours, our_weights) = (
        trained(directory, model, kind, size, expert_parallel) for kind in ("own", "ours")
    )
    assert our_weights == own_weights
    assert any(name.endswith("w1_EFD") for name in own_weights)
    assert own[2] < own[0] - 0.05
    for expected, actual in zip(own, ours, strict=True):
        assert abs(actual - expected) < TOLERANCE


def test_weights_that_fsdp2_cuts_are_torchtitans_own() -> None:
    run_torchrun(4, WORKER, cases=["cut in F", "cut in E", "cut twice", "cut in E and F"])


def test_checkpoints_load_both_ways(directory: Path) -> None:
    trained(directory, "qwen3", "ours", 2, 2)
    go_on = "--checkpoint.initial_load_path", str(directory / "qwen3" / "ours-2-2" / "step-3")
    own = train(directory, "qwen3", "own-goes-on", *go_on, steps=1)
    ours = train(directory, "qwen3", "ours-goes-on", *go_on, *OVERRIDE, steps=1)
    assert abs(own[0] - ours[0]) < TOLERANCE


@pytest.mark.parametrize("groups", [(None, None), (4, 2), (6, 3)])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_the_router_chooses_as_torchtitans(groups: tuple[int | None, int | None], score_function: Any) -> None:
    """Its node-limited routing scores a group by its two best experts."""
    num_groups, top_k_groups = groups
    gate = Linear.Config(in_features=16, out_features=24)
    sizes = {"num_experts": 24, "top_k": 5}
    config = TokenChoiceTopKRouter.Config(
        gate=gate, num_expert_groups=num_groups, num_limited_groups=top_k_groups, score_func=score_function, **sizes
    )
    theirs: Any = config.build()
    ours = TopKRouter(
        MoEConfig(
            hidden_size=16,
            intermediate_size=8,
            score_function=score_function,
            renormalize=False,
            selection_bias=True,
            num_expert_groups=num_groups or 1,
            top_k_groups=top_k_groups or 1,
            **sizes,
        )
    )
    with torch.no_grad():
        ours.e_score_correction_bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
        theirs.gate.weight.copy_(ours.weight)
    x = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(0))
    weights, ids, _ = theirs(x, ours.e_score_correction_bias)
    routing = ours(x[0])
    dense = [
        torch.zeros(200, 24).scatter(1, *of) for of in ((ids[0], weights[0]), (routing.topk_ids, routing.topk_weights))
    ]
    torch.testing.assert_close(dense[1], dense[0])


def experts_config() -> RoutedExperts.Config:
    return qwen3_configs["debugmodel_moe"](attn_backend="flex").layers[0].moe.routed_experts


def test_weights_are_drawn_and_saved_as_torchtitans() -> None:
    config = routed_experts(experts_config(), num_chunks=4)
    assert config.overlap == OverlapConfig(num_chunks=4)
    module: Any = config.build()
    assert isinstance(module, OverlappedRoutedExperts)
    assert isinstance(module.inner_experts, FusedExperts)
    own: Any = experts_config().build()
    for experts in (own, module):
        torch.manual_seed(0)
        with torch.no_grad():
            experts.init_states()
    saved = module.state_dict()
    assert saved.keys() == own.state_dict().keys()
    for name, value in own.state_dict().items():
        assert torch.equal(saved[name], value), name
    module.load_state_dict(own.state_dict())
    for name, value in module.state_dict().items():
        assert torch.equal(value, own.state_dict()[name])
    gate, up = own.inner_experts.w1_EFD, own.inner_experts.w3_EFD
    assert torch.equal(module.inner_experts.w13_EGD, torch.cat([gate, up], dim=1))


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_gradients_are_torchtitans(num_tokens: int) -> None:
    own: Any = experts_config().build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.05, generator=generator)
    module: Any = routed_experts(experts_config()).build()
    module.load_state_dict(own.state_dict())
    num_experts = own.inner_experts.num_experts
    x = torch.randn(1, num_tokens, 256, generator=generator)
    scores, ids = torch.rand(1, num_tokens, num_experts, generator=generator).topk(8)
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    results = []
    for experts in (own, module):
        given = x.clone().requires_grad_(), scores.clone().requires_grad_()
        out = experts(*given, ids, counts)
        out.square().sum().backward()
        grads = {name: parameter.grad for name, parameter in experts.inner_experts.named_parameters()}
        both = grads.pop("w13_EGD", None)
        if both is not None:
            grads["w1_EFD"], grads["w3_EFD"] = both.tensor_split(2, dim=1)
        results.append({"out": out, "x": given[0].grad, "scores": given[1].grad, **grads})
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 0.02, (name, error)  # of bf16, in which both compute


@pytest.mark.parametrize("kept", [[], [torch.ops.aten.mm.default, torch.ops.aten.topk.default]], ids=["nothing", "mm"])
def test_selective_checkpointing_repeats_no_call(kept: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients are those without checkpointing; full checkpointing repeats the call."""
    calls: list[int] = []
    call = integration.expert_parallel_mlp
    monkeypatch.setattr(
        integration, "expert_parallel_mlp", lambda *a, **k: (calls.append(k["transport"].rank), call(*a, **k))[1]
    )
    selective = {"context_fn": functools.partial(create_selective_checkpoint_contexts, kept)}

    def on_rank(transport: Transport, checkpoints: bool, settings: dict[str, Any]) -> list[torch.Tensor | None]:
        module: Any = routed_experts(experts_config()).build()
        both, down = module.inner_experts.w13_EGD, module.inner_experts.w2_EDF
        generator = torch.Generator().manual_seed(transport.rank)
        num_experts = len(both) // transport.size
        weights = [
            nn.Parameter(torch.randn(num_experts, *of.shape[1:], generator=generator) / 16) for of in (both, down)
        ]
        module.inner_experts.w13_EGD, module.inner_experts.w2_EDF = weights
        module.transport = transport
        x = torch.randn(1, 24, 256, generator=generator, requires_grad=True)
        router = torch.randn(256, len(both), generator=generator, requires_grad=True)

        def block(x: torch.Tensor) -> torch.Tensor:
            scores, ids = torch.softmax(x.tanh() @ router, dim=-1).topk(8)
            return module(x.tanh(), scores, ids, torch.bincount(ids.flatten(), minlength=len(both))).sin()

        out = checkpoint(block, x, use_reentrant=False, **settings) if checkpoints else block(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, router.grad, *(weight.grad for weight in weights)]

    expected = run_on_emulated_ranks(lambda transport: on_rank(transport, False, {}), 2)
    assert len(calls) == 2
    for settings, count in ((selective, 2), ({}, 4)):
        calls.clear()
        found = run_on_emulated_ranks(lambda transport, given=settings: on_rank(transport, True, given), 2)
        assert len(calls) == count
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_result_that_is_changed_in_place_is_refused() -> None:
    out = torch.ones(2, requires_grad=True) * 2
    kept = integration._KeptResult(out)
    out += 1
    with pytest.raises(RuntimeError, match="changed in place under selective"):
        kept.again()


@pytest.mark.parametrize("is_first", [True, False], ids=["experts first", "a product first"])
def test_a_second_backward_is_refused(is_first: bool) -> None:
    """By torch itself where another operation of the region comes first; full checkpointing runs the call again."""
    selective = {"context_fn": functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])}

    def on_rank(transport: Transport) -> None:
        module: Any = routed_experts(experts_config()).build()
        own = len(module.inner_experts.w13_EGD) // transport.size
        for name in ("w13_EGD", "w2_EDF"):
            setattr(module.inner_experts, name, nn.Parameter(getattr(module.inner_experts, name)[:own].detach()))
        module.transport = transport
        router = torch.randn(256, own * transport.size, generator=torch.Generator().manual_seed(0))

        def block(x: torch.Tensor) -> torch.Tensor:
            scores, ids = torch.rand(1, 5, own * transport.size, generator=torch.Generator().manual_seed(1)).topk(8)
            x = x if is_first else x @ (x[0].T @ x[0])
            return module(x, scores, ids, torch.zeros(own * transport.size)) @ router

        x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(2)).requires_grad_()
        checkpoint(block, x, use_reentrant=False).sum().backward(retain_graph=True)
        out = checkpoint(block, x, use_reentrant=False, **selective)
        out.sum().backward(retain_graph=True)
        says = "a second backward .*take full activation checkpointing" if is_first else "backward an extra time"
        with pytest.raises(RuntimeError, match=says):
            out.sum().backward()
        out = checkpoint(block, x, use_reentrant=False)
        for retain_graph in (True, False):
            out.sum().backward(retain_graph=retain_graph)

    run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_experts_multiply_in_an_expert_precision() -> None:
    precision = {"format": "mxfp8", "weight_gradients": "fp8"}
    module = routed_experts(experts_config(), expert_precision=precision, num_chunks=2).build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05)
    x, ids, scores = torch.randn(1, 9, 256), torch.randint(8, (1, 9, 2)), torch.rand(1, 9, 2)
    weights = module.inner_experts.weights()
    rows = x[0].bfloat16(), ids[0], scores[0]
    expected = moe_mlp(*rows, *weights, precision=ExpertPrecision(**precision))
    assert torch.equal(module(x, scores, ids, torch.zeros(1))[0], expected.float())
    assert not torch.equal(moe_mlp(*rows, *weights), expected)
    with pytest.raises(ValueError, match="format must be one of 'fp8_block', 'mxfp8', got 'fp8'"):
        routed_experts(experts_config(), expert_precision={"format": "fp8"})
    with pytest.raises(TypeError, match=r"must be a mapping of what ExpertPrecision takes, got 'mxfp8': write"):
        routed_experts(experts_config(), expert_precision="mxfp8")


def test_what_cannot_run_is_refused() -> None:
    for layer in gptoss_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard").layers:
        with pytest.raises(ValueError, match=r"own RoutedExperts of GroupedExperts \(qwen3, deepseek_v3\), got GptOss"):
            routed_experts(layer.moe.routed_experts)
    config = experts_config()
    dispatcher = derive(config.token_dispatcher, DeepEPTokenDispatcher.Config)
    with pytest.raises(ValueError, match=r"the model asks for DeepEPTokenDispatcher.Config, and tritonmoe exchanges"):
        routed_experts(derive(config, RoutedExperts.Config, token_dispatcher=dispatcher))
    with pytest.raises(TypeError, match="num_chunk"):
        routed_experts(config, num_chunk=4)
    sizes = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "pp": 1}
    cut = ParallelDims(**sizes, tp=2, ep=1, world_size=2)
    with pytest.raises(ValueError, match=r"cuts each expert, .*--parallelism.expert_parallel_degree 2"):
        routed_experts(config).build().parallelize(cut)
    inner = derive(config.inner_experts, GroupedExperts.Config, num_experts=63)
    odd = ParallelDims(**(sizes | {"dp_shard": 2}), tp=1, ep=2, world_size=2)
    with pytest.raises(ValueError, match=r"63 experts can't be divided by --parallelism.expert_parallel_degree 2"):
        routed_experts(derive(config, RoutedExperts.Config, inner_experts=inner)).build().parallelize(odd)
