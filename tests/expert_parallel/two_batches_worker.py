"""Ranks of test_two_batches_processes.py: `two_batches_worker.py CASE...` under torchrun says "passed CASE" of each."""

import signal
import sys
import threading
import time
from collections.abc import Callable

import greenlet
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from worker_cases import run_cases

import tritonmoe as tm

CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=8, top_k=2, shared_intermediate_size=4)


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8, dtype=dtype)
        self.moe = tm.MoELayer(CONFIG, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.dense(x))
        return x + self.moe(x)


class Net(nn.Module):
    """A model that takes the two halves of a batch at once, or the batch whole."""

    def __init__(self, is_checkpointed: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*[Block(dtype) for _ in range(3)])
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        if first == 0:
            return self.loss(x)
        return sum(tm.two_batches(self.loss, x[:first], x[first:]))

    def loss(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return x.square().sum()


def spread(ranks: DeviceMesh | None = None, **settings) -> Net:
    net = Net(**settings)
    tm.parallelize(net, dist.group.WORLD if ranks is None else ranks)
    return net


def here(num_sequences: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(num_sequences + dist.get_rank(), 4, 8, generator=generator, dtype=torch.float64)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    loss.backward()
    found = [whole(parameter.grad).clone() for parameter in net.parameters()]
    net.zero_grad()
    return found


def assert_equal_to_whole(net: nn.Module, run: Callable[[Tensor, int], Tensor], **tolerance: float) -> None:
    x = here()
    expected = gradients(net, run(x, 0))
    for first in (2, 3):
        got = gradients(net, run(x, first))
        for grad, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(grad, wanted, **tolerance)
    for grad, again in zip(got, gradients(net, run(x, first)), strict=True):
        assert torch.equal(grad, again)


def case_gloo() -> None:
    for is_checkpointed in (False, True):
        net = spread(is_checkpointed=is_checkpointed)
        assert_equal_to_whole(net, net)


def case_one_by_one() -> None:
    """The halves' backwards in two runs of the graph, though both start from the same view of the weights."""
    net, x = spread(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))), here()
    expected = gradients(net, net(x))
    first, second = tm.two_batches(net.loss, x[:2], x[2:])
    first.backward()
    for grad, wanted in zip(gradients(net, second), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def case_ddp() -> None:
    """One reduction for both halves, and the gradients of one batch."""
    net = DistributedDataParallel(spread())
    num_reductions = []
    net.register_comm_hook(None, lambda _, bucket: count(num_reductions, bucket))
    assert_equal_to_whole(net, net)
    per_step = len(num_reductions) / 4
    assert per_step == 1, per_step
    # The halves may also be two calls of the wrapper itself.
    assert_equal_to_whole(
        net, lambda x, first: net(x) if first == 0 else sum(tm.two_batches(net, x[:first], x[first:]))
    )


def count(reductions: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    reductions.append(bucket.index())
    averaged = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return averaged.then(lambda future: future.value()[0])


def case_accumulation() -> None:
    net = DistributedDataParallel(spread())
    x = here()

    def run(first: int) -> list[Tensor]:
        with net.no_sync():
            net(x, first).backward()
        return gradients(net, net(2 * x, first))

    for grad, wanted in zip(run(2), run(0), strict=True):
        torch.testing.assert_close(grad, wanted)


def freed(net: nn.Module) -> int:
    """How many parameters that FSDP2 has gathered have no memory now."""
    states = [m._get_fsdp_state()._fsdp_param_group for m in net.modules() if isinstance(m, FSDPModule)]
    gathered = [p for group in states if group is not None for p in group.fsdp_params]
    return sum(hasattr(p, "_unsharded_param") and p._unsharded_param.untyped_storage().size() == 0 for p in gathered)


def check_fsdp(shard: Callable[[Net], None], **settings) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))
    plain = spread(mesh, **settings)
    assert_equal_to_whole(plain, plain)
    x = here()
    expected = gradients(plain, plain(x, 2) / dist.get_world_size())
    net = spread(mesh, **settings)
    shard(net)
    assert_equal_to_whole(net, net)
    got = gradients(net, net(x, 2))
    for name, grad, wanted in zip(dict(net.named_parameters()), got, expected, strict=True):
        if ".experts." not in name:  # those are averaged by the layer already
            dist.all_reduce(wanted)
            torch.testing.assert_close(grad, wanted, msg=name)


def case_fsdp() -> None:
    """Every block and its experts are gathered when they are called, and let go."""
    seen = []

    def shard(net: Net, reshard: bool = True) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))
        for block in net.blocks:
            fully_shard(block.moe.experts, mesh=mesh["replica"], reshard_after_forward=reshard)
            fully_shard(block, reshard_after_forward=reshard)
        fully_shard(net, reshard_after_forward=reshard)
        net.blocks[2].register_forward_pre_hook(lambda *_: seen.append(freed(net)))

    for is_checkpointed in (False, True):
        check_fsdp(shard, is_checkpointed=is_checkpointed)
        assert min(seen) > 0, "nothing was let go"
        seen.clear()
        check_fsdp(lambda net: shard(net, False), is_checkpointed=is_checkpointed)
        seen.clear()


def case_fsdp_lets_go_too_early() -> None:
    """A parameter that a block uses behind its experts is let go when the first half leaves the block."""

    class WithNorm(Block):
        def __init__(self) -> None:
            super().__init__(torch.float64)
            self.norm = nn.LayerNorm(8, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x))

    for reshard in (False, True):
        net = Net()
        net.blocks = nn.Sequential(*[WithNorm() for _ in range(2)])
        tm.parallelize(net, dist.group.WORLD)
        experts = set(tm.expert_parameters(net))
        for block in net.blocks:
            fully_shard(block, ignored_params=experts & set(block.parameters()), reshard_after_forward=reshard)
        fully_shard(net, ignored_params=experts)
        if reshard:
            with pytest.raises(RuntimeError, match="reshard_after_forward=False"):
                net(here(), 2)
            net.blocks[0].moe.experts.transport.rebuild()
        else:
            assert_equal_to_whole(net, net)


def train(net: Net) -> None:
    while True:
        net(here(), 2).backward()


def case_interrupted() -> None:
    """Ctrl-C on one rank ends the step there at once, and on the others before their timeout."""
    net = spread()
    net(here(), 2).backward()
    is_victim = dist.get_rank() == 1
    started = time.perf_counter()
    if is_victim:
        threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt if is_victim else tm.TransportError):
        train(net)
    assert time.perf_counter() - started < 10
    assert greenlet.getcurrent().parent is None
    net.blocks[0].moe.experts.transport.rebuild()
    net.zero_grad()
    net(here(), 2).backward()


def case_mixed_precision() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))
    net = spread(mesh, dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in net.blocks:
        fully_shard(block.moe.experts, mesh=mesh["replica"], mp_policy=policy)
        fully_shard(block, mp_policy=policy)
    x = here().float()
    expected, got = gradients(net, net(x)), gradients(net, net(x, 2))
    for grad, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, wanted, atol=0.03 * wanted.abs().max().item(), rtol=0.03)


if __name__ == "__main__":
    run_cases(lambda case: globals()[f"case_{case}"](), sys.argv[1:])
