"""Ranks of test_data_parallel.py: `data_parallel_worker.py CASE...` under torchrun says "passed CASE" of each."""

import copy
import io
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from worker_cases import run_cases

import tritonmoe as tm

CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=4, top_k=2)


def model(*, is_frozen: bool = True) -> nn.Sequential:
    """Return a dense layer, experts that are spread, and buffers; only the experts are trained where it is frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), tm.MoELayer(CONFIG), nn.BatchNorm1d(8, momentum=0.5))
    tm.parallelize(net, dist.group.WORLD)
    if is_frozen:
        net.requires_grad_(False)
        for weight in tm.expert_parameters(net):
            weight.requires_grad_(True)
    return net


def grads(net: nn.Module) -> list[torch.Tensor]:
    """Run a step, and give the gradients of this rank's experts."""
    net.zero_grad()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    net(x).square().mean().backward()
    return [weight.grad.to_local().clone() for weight in tm.expert_parameters(net)]


def check_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert other.abs().max() > 1e-5


def everybodys(values: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values)
    return found


def case_whatever_it_is_told() -> None:
    """Steps are those of the module alone, under every setting, in copies, nested, and with hooks."""
    expected = grads(model())
    settings = ("static_graph", "find_unused_parameters", "gradient_as_bucket_view")
    for keywords in ({}, *({name: True} for name in settings)):
        parallel = DistributedDataParallel(model(), **keywords)
        names = [name for name, _ in parallel.named_parameters()]
        for _ in range(3):
            check_same(grads(parallel), expected)
        check_same(grads(copy.deepcopy(parallel)), expected)
        check_same(grads(torch.optim.swa_utils.AveragedModel(parallel)), expected)
        assert (
            [f"module.{name}" for name, _ in model().named_parameters()]
            == names
            == [*dict(parallel.named_parameters())]
        )
        assert parallel._get_ddp_logging_data()["world_size"] == dist.get_world_size()
        with parallel.no_sync():
            check_same(grads(parallel), expected)
    parallel = DistributedDataParallel(model())
    parallel._set_static_graph()
    check_same(grads(parallel), expected)
    for state, hook in ((None, fp16_compress_hook), (PostLocalSGDState(None, None, 1), post_localSGD_hook)):
        parallel = DistributedDataParallel(model())
        parallel.register_comm_hook(state, hook)
        check_same(grads(parallel), expected)
    net = model()
    net[1] = DistributedDataParallel(net[1])
    check_same(grads(DistributedDataParallel(net)), expected)
    assert DistributedDataParallel(model()[1].experts).reducer is not None  # no dense parameter, frozen or not
    with pytest.raises(ValueError, match="keep one rank's experts alone"):
        torch.save(DistributedDataParallel(model()), io.BytesIO())


def case_what_is_frozen() -> None:
    """Frozen parameters and buffers are rank 0's, as ever, and hooks of the module run."""
    net, calls = model(), []
    with torch.no_grad():
        net[0].weight.add_(dist.get_rank())
        net[2].running_mean.add_(dist.get_rank())
    net.register_forward_hook(lambda *_: calls.append(1))
    parallel = DistributedDataParallel(net)
    for _ in range(2):
        grads(parallel)
    parallel(torch.zeros(2, 8))
    assert len(calls) == 3
    first = model()[0].weight
    assert all(torch.equal(weight, first) for weight in everybodys(net[0].weight.detach()))
    before = net[2].running_mean.clone()  # of this rank's batch; the next forward begins with rank 0's
    net.eval()
    parallel(torch.zeros(2, 8))
    assert torch.equal(net[2].running_mean, everybodys(before)[0])


def case_nothing_else_changes() -> None:
    with pytest.raises(ValueError, match=r"mixed_precision.*torch\.autocast"):
        DistributedDataParallel(model(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="is not needed"):
        DistributedDataParallel(model().requires_grad_(False))
    net = nn.Linear(8, 8)
    net._ddp_params_and_buffers_to_ignore = ["weight", ".weight", "bias", ".bias"]
    with pytest.raises(RuntimeError, match="is not needed"):
        DistributedDataParallel(net)


def run_unevenly(parallel: DistributedDataParallel) -> None:
    with parallel.join(throw_on_early_termination=True):
        for step in range(2 + dist.get_rank()):
            grads(parallel)
            assert step < 2


def case_join() -> None:
    """join() lets one rank go on alone, which experts can't; with an end for all ranks it may."""
    for is_frozen in (True, False):
        parallel = DistributedDataParallel(model(is_frozen=is_frozen))
        for join in (parallel.join, lambda parallel=parallel: Join([parallel])):
            with pytest.raises(
                ValueError, match=r"module\.1\.experts are spread over the ranks \[0, 1\].*the same number of batches"
            ):
                join()
        with pytest.raises(RuntimeError, match="exhausted"):
            run_unevenly(parallel)
        parallel = DistributedDataParallel(model(is_frozen=is_frozen))
        with parallel.join(enable=False):
            check_same(grads(parallel), grads(model(is_frozen=is_frozen)))
    with DistributedDataParallel(nn.Linear(8, 8)).join():
        pass


def case_mixing() -> None:
    """What would give every rank the experts of one, or a mean of all, says what to leave out."""
    parallel = DistributedDataParallel(model(is_frozen=False))
    weights = tm.expert_parameters(parallel)
    before = [weight.to_local().clone() for weight in weights]
    sharded = ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.SGD, lr=0.0)
    averaged = PostLocalSGDOptimizer(torch.optim.SGD(weights, lr=0.0), PeriodicModelAverager(period=1, warmup_steps=0))
    grads(parallel)
    for mix in (sharded.step, averaged.step, lambda: dist.broadcast(weights[0].data, 0)):
        with pytest.raises(ValueError, match=r"leave out the parameters that tritonmoe\.expert_parameters"):
            mix()
    assert all(torch.equal(weight.to_local(), one) for weight, one in zip(weights, before, strict=True))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("elsewhere",))
    for placement in (Shard(0), Replicate()):
        other = DTensor.from_local(torch.ones(2), mesh, [placement])
        for mix in (lambda other=other: dist.broadcast(other, 0), lambda other=other: dist.all_reduce(other)):
            with pytest.raises((NotImplementedError, RuntimeError), match="c10d"):  # as PyTorch has it
                mix()
    of_experts = {id(weight) for weight in weights}
    dense = [parameter for parameter in parallel.parameters() if id(parameter) not in of_experts]
    optimizers = ZeroRedundancyOptimizer(dense, torch.optim.SGD, lr=0.1), torch.optim.SGD(weights, lr=0.1)
    reference = DistributedDataParallel(model(is_frozen=False))
    one = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(2):
        check_same(grads(parallel), grads(reference))
        for optimizer in (*optimizers, one):
            optimizer.step()


if __name__ == "__main__":
    run_cases(lambda case: globals()[f"case_{case}"](), sys.argv[1:])
