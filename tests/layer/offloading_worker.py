"""Ranks of test_offloading_processes.py: `offloading_worker.py FOLDER CASE...` says "passed CASE" of each."""

import copy
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from test_offloading import FORMATS, HIDDEN, NUM_EXPERTS, TOP_K, Net, compare, make_layer, step
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from worker_cases import run_cases

import tritonmoe as tm
from tritonmoe.transports import ProcessGroupTransport

FOLDER = Path(sys.argv[1])
_numbers = itertools.count()


def new_folder() -> Path:
    return FOLDER / str(next(_numbers))


def case_bits() -> None:
    """Outputs and gradients of every format are those of experts in memory."""
    transport = ProcessGroupTransport(dist.group.WORLD)
    overlaps = tm.OverlapConfig(2), tm.OverlapConfig(2, chunk_by="experts")
    for number, case in enumerate(FORMATS[1:]):
        overlap = overlaps[number % 2]
        resident, offloaded = (make_layer(*case, ranks=transport, overlap=overlap, bias=True) for _ in range(2))
        tm.offload_experts(offloaded, new_folder(), resident_bytes=20_000)
        for seed in range(2):
            own = 10 * seed + transport.rank
            compare(step(resident, case[1], seed=own), step(offloaded, case[1], seed=own))


def case_files() -> None:
    """A file that is cut or can't be read raises an error with the expert's name on every rank; all go on."""
    transport = ProcessGroupTransport(dist.group.WORLD)
    for victim, (how, when) in enumerate(itertools.product(("cut", "unreadable"), ("forward", "backward"))):
        folder = new_folder()
        experts = make_layer(ranks=transport, num_experts=48, overlap=tm.OverlapConfig(2))
        tm.offload_experts(experts, folder)
        x = torch.randn(200, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        ids, weights = torch.randint(0, 48, (200, TOP_K)), torch.rand(200, TOP_K)
        if when == "backward":
            y = experts(x, ids, weights)
        if transport.rank == victim % 2:
            (path,) = folder.glob(f"*rank-{transport.rank}*")
            if how == "cut":
                os.truncate(path, path.stat().st_size // 2)
            else:
                file = next(iter(experts.__dict__["_tritonmoe_offloaded"].weights_by_key.values())).source
                os.dup2(os.open(folder, os.O_RDONLY), file._descriptor)
        transport.barrier()
        started = time.perf_counter()
        expected = tm.OffloadError if transport.rank == victim % 2 else tm.TransportError
        with pytest.raises(expected, match=rf"expert \d+ of .* could not be read from .*rank-{victim % 2}-of-2"):
            experts(x, ids, weights) if when == "forward" else y.sum().backward()
        assert time.perf_counter() - started < 20
        assert x.grad is None
        transport.rebuild()
        tm.offload_experts(other := make_layer(ranks=transport), new_folder())
        ids = torch.randint(0, NUM_EXPERTS, (200, TOP_K))
        other(x, ids, weights).sum().backward()
        assert x.grad is not None


def pair(prepare: Callable[[Net], object] = lambda net: None) -> tuple[Net, Net]:
    """Return two nets of the same weights, prepared alike, the second one with experts in files."""
    torch.manual_seed(0)
    resident = Net()
    offloaded = copy.deepcopy(resident)
    prepare(resident)
    prepare(offloaded)
    tm.offload_experts(offloaded, new_folder())
    return resident, offloaded


def gradients(net: nn.Module, around: nn.Module | None = None) -> dict[str, Tensor]:
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(dist.get_rank()))
    y = (net if around is None else around)(x)
    y.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    net.zero_grad()
    return {"y": y.detach(), **{n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}}


def case_wrapped() -> None:
    """DistributedDataParallel and fully_shard see what is left; before or behind them, over ranks or not."""
    resident, offloaded = pair()
    compare(
        gradients(resident, DistributedDataParallel(resident)), gradients(offloaded, DistributedDataParallel(offloaded))
    )
    resident, offloaded = pair(lambda net: fully_shard(net.before))
    for net in (resident, offloaded):
        fully_shard(net.moe.grouped_experts)
        fully_shard(net.moe)
        fully_shard(net)
    compare(gradients(resident), gradients(offloaded))
    resident, offloaded = pair(lambda net: tm.parallelize(net, dist.group.WORLD, overlap=tm.OverlapConfig(2)))
    compare(
        gradients(resident, DistributedDataParallel(resident)), gradients(offloaded, DistributedDataParallel(offloaded))
    )
    compare(gradients(resident), gradients(offloaded, torch.compile(offloaded, backend="eager")))


def case_states() -> None:
    """State dicts of spread experts have what is left, in whichever order they were asked for."""

    def gathered(net: Net) -> None:
        tm.parallelize(net, dist.group.WORLD)
        tm.gather_state_dicts(net)

    resident, offloaded = pair(gathered)
    whole, left = resident.state_dict(), offloaded.state_dict()
    assert whole.keys() - left.keys() == {"moe.experts.gate_up_proj", "moe.experts.down_proj"}
    compare(left, {name: whole[name] for name in left})
    offloaded = pair(lambda net: tm.parallelize(net, dist.group.WORLD, overlap=tm.OverlapConfig(2)))[1]
    state = get_model_state_dict(offloaded)
    torch.distributed.checkpoint.save(state, checkpoint_id=FOLDER / "checkpoint")
    torch.distributed.checkpoint.load(state, checkpoint_id=FOLDER / "checkpoint")
    set_model_state_dict(offloaded, state)


def case_refused() -> None:
    """Wrappers that hold the experts already are named."""
    for wrap, words in (
        (DistributedDataParallel, "DistributedDataParallel was made with"),
        (
            partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu")),
            "a rank's part",
        ),
        (fully_shard, "is a DTensor"),
    ):
        wrapped = wrap(Net().requires_grad_(True))
        with pytest.raises(ValueError, match=words):
            tm.offload_experts(wrapped, new_folder())
        wrapped(torch.randn(4, 32)).sum().backward()  # nothing has changed


if __name__ == "__main__":
    run_cases(lambda case: globals()[f"case_{case}"](), sys.argv[2:])
