"""What every rank of test_resharding runs: `packed_reshard_worker.py FOLDER FORMAT BACKEND STAGE RANK SIZE`.

Each layout loads what another one has saved at the stage before, over another number of ranks.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from held_storages import LargestFloats
from same_bits import assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tritonmoe as tm
from tritonmoe.config.formats import find_format

folder, weight_format, backend = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
stage, rank, size = map(int, sys.argv[4:])
D, F, E = (128, 128, 32) if backend == "torch" else (128, 256, 4) if weight_format == "fp8" else (64, 128, 4)
CONFIG = tm.MoEConfig(hidden_size=D, intermediate_size=F, num_experts=E, top_k=2, weight_format=weight_format)  # type: ignore[arg-type]
LAYOUTS = ("spread", "fsdp", "both")
"""Experts over the ranks; FSDP2 around all; experts over the ranks, and FSDP2 around what is left."""
MOST_DECODED = 2 * 2 * F * D if backend == "torch" else F * D - 1
"""Values of two experts, decoded: of all its experts a rank has four times as many, or more. Kernels decode tiles."""
x = torch.randn(9 if backend == "torch" else 2, D, generator=torch.Generator().manual_seed(rank)).bfloat16()


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, D), tm.MoELayer(CONFIG, backend=backend)).bfloat16()


def laid_out(layout: str, seed: int) -> nn.Module:
    model, options = make(seed), {}
    if layout != "fsdp":
        tm.parallelize(model, dist.group.WORLD)
        options["ignored_params"] = set(tm.expert_parameters(model))
    if layout == "spread":
        return model
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)), mp_policy=policy, **options)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def trained_rows(model: nn.Module) -> Tensor:
    own = x.clone().requires_grad_()
    y = model(own)
    y.float().square().sum().backward()
    return y.detach()


expected = make(0)
tm.QuantizedWeight.pack(torch.zeros(1, 128, 128), weight_format).decode()  # type: ignore[arg-type]  # makes its tables
bytes_of_experts = sum(p.nbytes for n, p in expected.named_parameters() if "experts" in n)
assert bytes_of_experts == find_format(weight_format).bytes_per_value * 3 * E * F * D
torch.set_num_threads(1)
if backend == "triton":
    import interpreter

    interpreter.install()
dist.init_process_group("gloo", init_method=f"file://{folder}/store{stage}", rank=rank, world_size=size)
other = laid_out("spread", seed=8)  # outside of what is watched: making a layer packs an expert of numbers drawn
for number, layout in enumerate(LAYOUTS):
    model = laid_out(layout, seed=0 if stage == 0 else 9)
    with LargestFloats() as largest:
        if stage:
            state = get_model_state_dict(model)
            before = LAYOUTS[(number + 1) % len(LAYOUTS)]
            dcp.load(state, checkpoint_id=folder / f"{before}{stage - 1}")
            set_model_state_dict(model, state)
        dcp.save(get_model_state_dict(model), checkpoint_id=folder / f"{layout}{stage}")
        y = trained_rows(model)
        assert_same_bits(whole(get_model_state_dict(model)), expected.state_dict())
        if layout == "spread":
            tm.gather_state_dicts(model)
            state = model.state_dict()
            assert_same_bits(state, expected.state_dict())
            if rank == 0:
                torch.save(state, folder / f"whole{stage}.pt")
            dist.barrier()
            if stage:
                other.load_state_dict(torch.load(folder / f"whole{stage - 1}.pt"))
                assert torch.equal(other(x), y)
            DistributedDataParallel(model)(x).float().sum().backward()
    most = max(largest.num_values.items(), key=lambda made: made[1])
    assert most[1] <= MOST_DECODED, most
    torch.testing.assert_close(y, trained_rows(make(0)), rtol=2e-2, atol=2e-2)
    written = sum(file.stat().st_size for file in (folder / f"{layout}{stage}").iterdir())
    assert bytes_of_experts < written < 1.2 * bytes_of_experts + 60_000, (written, bytes_of_experts)
dist.destroy_process_group()
