"""torchtitan with and without the override, from the same weights: losses of three steps, and checkpoints both ways.

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

from processes import ENVIRONMENT
from small_data import write_small_data
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchtitan.config import derive
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import DeepEPTokenDispatcher
from torchtitan.models.gpt_oss import gptoss_configs
from torchtitan.models.qwen3 import qwen3_configs

from bench.torchtitan import MODELS, OVERRIDE, RUN, arguments
from tritonmoe import OverlapConfig, run_on_emulated_ranks
from tritonmoe.integrations import torchtitan as integration
from tritonmoe.integrations.torchtitan import FusedExperts, OverlappedRoutedExperts, routed_experts
from tritonmoe.transports import Transport

TOLERANCE = 1e-3


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
        parallelism__expert_parallel_degree=size,
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


def seed(directory: Path, model: str) -> tuple[str, str]:
    """Return the arguments that start from torchtitan's own first weights."""
    path = directory / model / "seed" / "step-0"
    if not path.exists():
        train(directory, model, "seed", "--checkpoint.create_seed_checkpoint")
    return "--checkpoint.initial_load_path", str(path)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_losses_are_torchtitans_own(model: str, size: int, directory: Path) -> None:
    start = seed(directory, model)
    own = train(directory, model, f"own-{size}", *start, size=size)
    ours = train(directory, model, f"ours-{size}", *start, *OVERRIDE, size=size)
    assert own[2] < own[0] - 0.05
    for expected, actual in zip(own, ours, strict=True):
        assert abs(actual - expected) < TOLERANCE


def test_checkpoints_load_both_ways(directory: Path) -> None:
    start = seed(directory, "qwen3")
    path = directory / "qwen3" / "ours-2" / "step-3"
    if not path.exists():
        train(directory, "qwen3", "ours-2", *start, *OVERRIDE, size=2)
    go_on = "--checkpoint.initial_load_path", str(path)
    own = train(directory, "qwen3", "own-goes-on", *go_on, steps=1)
    ours = train(directory, "qwen3", "ours-goes-on", *go_on, *OVERRIDE, steps=1)
    assert abs(own[0] - ours[0]) < TOLERANCE


def experts_config() -> RoutedExperts.Config:
    return qwen3_configs["debugmodel_moe"](attn_backend="flex").layers[0].moe.routed_experts


def test_weights_are_drawn_and_saved_as_torchtitans() -> None:
    config = routed_experts(experts_config(), num_chunks=4)
    assert config.overlap == OverlapConfig(num_chunks=4)
    module: Any = config.build()
    assert isinstance(module, OverlappedRoutedExperts)
    assert isinstance(module.inner_experts, FusedExperts)
    own: Any = experts_config().build()
    for init in (own, module):
        init.init_states(buffer_device=None) if hasattr(init, "init_states") else init.init_weights()
    saved = module.state_dict()
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in own.state_dict().items()}
    for name, value in own.state_dict().items():
        assert abs(saved[name].std() / value.std() - 1) < 0.02, name
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
