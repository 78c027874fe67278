"""What every rank of test_calls_on_processes runs: `packed_calls_worker.py FOLDER FORMAT BACKEND RANK SIZE`."""

import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from packed_weights import PackedCase
from same_bits import assert_same_bits
from test_packed_experts import OVERLAPS, call
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.transports import ProcessGroupTransport, Transport

weight_format: Any = sys.argv[2]
folder, backend, rank, size = sys.argv[1], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
WORK: dict[str, Any] = {"num_tokens": 4 + rank} if backend == "triton" else {"num_tokens": 40 + 3 * rank}
"""The interpreter takes milliseconds for a program."""


def calls(transport: Transport) -> None:
    """Adapters with dropout, and what backward computes again, by every overlap; of the kernels by some."""
    named = OVERLAPS if backend == "torch" else {"experts": OVERLAPS["experts"], "copies": OVERLAPS["copies"]}
    for overlap in named.values():
        for save in ("hidden", "input") if backend == "torch" else ("input",):
            case = PackedCase(weight_format, **WORK, rank=2, bias=True, dropout=0.2)
            options = {"backend": backend, "save": save}
            packed, decoded = (call(case, transport, overlap, is_decoded, **options) for is_decoded in (False, True))
            assert_same_bits(packed, decoded)
    whole = PackedCase(weight_format, **WORK, rank=2, bias=True)
    assert not torch.equal(packed["y"], call(whole, transport, overlap, False, **options)["y"])


def checkpointed(transport: Transport) -> None:
    """A layer under activation checkpointing, in a few rows and in none, whose own adapters drop out alike in both."""
    case = PackedCase(weight_format, rank=2)
    own = slice(rank * case.num_experts // size, (rank + 1) * case.num_experts // size)
    layer = tm.GroupedExperts(
        tm.MoEConfig(
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            num_experts=case.num_experts,
            top_k=case.top_k,
            weight_format=weight_format,
        ),
        transport,
        tm.OverlapConfig(2),
        backend=backend,
    )
    for num_tokens in (2 if rank else 0, 3):
        found = []
        for again in (False, True):
            generator = torch.Generator().manual_seed(rank)
            x = torch.randn(num_tokens, case.hidden, generator=generator).bfloat16().requires_grad_()
            ids = torch.rand(num_tokens, case.num_experts, generator=generator).topk(case.top_k).indices
            weights = torch.rand(num_tokens, case.top_k, generator=generator).requires_grad_()
            leaves = {
                name: leaf.detach()[own].clone().requires_grad_()
                for name, leaf in case.leaves().items()
                if name[-2:] in ("_a", "_b")
            }
            adapters = tm.ExpertAdapters(**leaves, gate_up_scale=0.5, dropout=0.2)  # type: ignore[arg-type]
            run: Any = partial(layer, adapters=adapters)
            torch.manual_seed(9)
            y = checkpoint(run, x, ids, weights, use_reentrant=False) if again else run(x, ids, weights)
            y.float().square().sum().backward()
            found.append({"y": y.detach(), **{n: t.grad for n, t in {"x": x, "w": weights, **leaves}.items()}})
        assert_same_bits(*found)


torch.set_num_threads(1)
if backend == "triton":
    import interpreter

    interpreter.install()
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
transport = ProcessGroupTransport(dist.group.WORLD)
calls(transport)
checkpointed(transport)
dist.destroy_process_group()
