"""What every rank of test_packed_experts.py runs: `packed_worker.py FOLDER FORMAT RANK SIZE`."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from same_bits import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tritonmoe as tm
from tritonmoe.config.formats import find_format
from tritonmoe.experts.packed_parameters import from_bytes

folder, weight_format, rank, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_experts": 8, "top_k": 2}
PACKED, PLAIN = tm.MoEConfig(**SIZES, weight_format=weight_format), tm.MoEConfig(**SIZES)  # type: ignore[arg-type]
x = torch.randn(33 + rank, 64, generator=torch.Generator().manual_seed(5 + rank)).bfloat16()


def make(config: tm.MoEConfig, *ranks: object, seed: int = 0) -> tm.MoELayer:
    torch.manual_seed(seed)
    return tm.MoELayer(config, *ranks).bfloat16()  # type: ignore[arg-type]


def decoded(layer: tm.MoELayer) -> tm.MoELayer:
    """Return the same layer with plain weights, spread over the ranks."""
    experts = layer.grouped_experts
    state = {"router.weight": layer.router.weight}
    for name in ("gate_up_proj", "down_proj"):
        of_bytes = getattr(experts, name), getattr(experts, f"{name}_scales")
        parts = from_bytes(find_format(weight_format), *of_bytes)
        state[f"experts.{name}"] = tm.QuantizedWeight(weight_format, *parts).decode()  # type: ignore[arg-type]
    plain = make(PLAIN, dist.group.WORLD)
    plain.load_state_dict(state)
    return plain


def results(layer: nn.Module) -> list[torch.Tensor]:
    own = x.clone().requires_grad_()
    y = layer(own)
    y.square().sum().backward()
    assert own.grad is not None
    return [y.detach(), own.grad]


def fsdp(whole: tm.MoELayer, policy: MixedPrecisionPolicy | None, is_spread: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), copy.deepcopy(whole))
    model = model.bfloat16() if policy is None else model.float()
    options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    mesh = init_device_mesh("cpu", (size,))
    if is_spread:
        tm.parallelize(model, dist.group.WORLD)
        options["ignored_params"] = set(tm.expert_parameters(model))
    fully_shard(model, mesh=mesh, **options)
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    y = model(x if policy is None else x.float())
    y.float().sum().backward()
    assert bool(torch.isfinite(y).all())


def check() -> None:
    whole = make(PACKED)
    plain = decoded(whole)
    expected = results(plain)
    assert_same_bits(results(make(PACKED, dist.group.WORLD)), expected)
    layer = copy.deepcopy(whole)
    tm.parallelize(layer, dist.group.WORLD)
    assert_same_bits(results(layer), expected)
    layer.half().bfloat16().float().bfloat16()
    router = plain.router.weight.detach().half().bfloat16()
    assert torch.equal(layer.router.weight, router)
    y = layer(x)
    plain.router.weight.data.copy_(router)
    assert torch.equal(y, plain(x))

    dcp.save(layer.state_dict(), checkpoint_id=folder / "dcp")
    for config, ranks in ((PACKED, (dist.group.WORLD,)), (PACKED, ())):
        other = make(config, *ranks, seed=9)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=folder / "dcp")
        other.load_state_dict(state)
        assert torch.allclose(other(x).float(), y.float(), atol=2e-2, rtol=2e-2)
    with pytest.raises(BaseException, match=r"mismatch|Missing"):
        dcp.load(make(PLAIN).state_dict(), checkpoint_id=folder / "dcp")

    tm.gather_state_dicts(layer)
    state = layer.state_dict()
    saved = {name: value for name, value in whole.state_dict().items() if "experts" in name}
    assert_same_bits({name: state[name] for name in saved}, saved)
    with pytest.raises(ValueError, match="weight_format as the saved layer"):
        make(PLAIN).load_state_dict(state, strict=False)

    def ddp(is_spread: bool) -> None:
        model = nn.Sequential(nn.Linear(64, 64), copy.deepcopy(whole)).bfloat16()
        if is_spread:
            tm.parallelize(model, dist.group.WORLD)
        DistributedDataParallel(model)(x).sum().backward()

    for is_spread in (False, True):
        ddp(is_spread)
        fsdp(whole, None, is_spread)
        fsdp(whole, MixedPrecisionPolicy(param_dtype=torch.bfloat16), is_spread)
        half: Callable[[], None] = lambda is_spread=is_spread: fsdp(  # noqa: E731
            whole, MixedPrecisionPolicy(param_dtype=torch.float16), is_spread
        )
        with pytest.raises((TypeError, tm.TransportError), match=r"cast x to bf16|refused"):
            half()


torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
check()
dist.destroy_process_group()
