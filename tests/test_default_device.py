"""torch.set_default_device, or `with torch.device(...)`, of the caller: what the host keeps for itself stays there.

Here the default device is "meta", whose tensors have no values.
"""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from batches import KERNEL_DEVICE
from placed_batches import REPLICATED
from torch import Tensor

import tritonmoe as tm
from tritonmoe.transports import Transport, TwoLevelTransport

ROOT = Path(__file__).parent.parent / "tritonmoe"
FACTORIES = "arange as_tensor empty eye full linspace ones rand randint randn randperm scalar_tensor tensor zeros"
OVERLAPS = {
    "tokens": tm.OverlapConfig(2),
    "experts": tm.OverlapConfig(2, chunk_by="experts"),
    "capacity": tm.OverlapConfig(2, capacity=5.0),
    "overflow": tm.OverlapConfig(2, capacity=0.2),
    "wire": tm.OverlapConfig(2, wire_dtype=torch.float8_e4m3fn),
    "budget": tm.OverlapConfig(memory_budget_bytes=10**6),
    "auto": tm.OverlapConfig(),
}


def random(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), device="cpu")


def trained(layer: torch.nn.Module, arguments: tuple[Tensor, ...], num_calls: int) -> list[Tensor]:
    x = arguments[0].requires_grad_()
    for _ in range(num_calls):
        layer.zero_grad()
        x.grad = None
        y = layer(*arguments)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]


CASES = (*OVERLAPS, "two levels", "one device", "placement")
FIRST_CASES = {("tokens", "auto"), ("two levels", "auto")}
SLOW_CASES = {(case, "triton") for case in CASES if case not in ("tokens", "two levels")}


def tier(case: tuple[str, str]) -> tuple:
    if case in FIRST_CASES:
        return ()
    return pytest.mark.slow if case in SLOW_CASES else pytest.mark.thorough


CASES_ON_BACKENDS = [pytest.param(*case, marks=tier(case)) for case in itertools.product(CASES, ("auto", "triton"))]


@pytest.mark.parametrize(("case", "backend"), CASES_ON_BACKENDS)
def test_results_are_those_of_the_ordinary_default(case: str, backend: str) -> None:
    num_calls = 8 if case == "auto" else 2  # measured, searched, and tried
    where = KERNEL_DEVICE if backend == "triton" else "cpu"

    def on_rank(transport: Transport) -> list[list[Tensor]]:
        config = tm.MoEConfig(8, 4, 8, 2, load_balance_loss_weight=0.1, shared_intermediate_size=4)
        ranks = {"two levels": lambda: TwoLevelTransport(transport, 2), "one device": lambda: None}
        results = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                generator = torch.Generator().manual_seed(0)
                if case == "placement":
                    layer: torch.nn.Module = tm.GroupedExperts(
                        tm.MoEConfig(8, 4, 6, 2),
                        transport,
                        tm.OverlapConfig(2),
                        placement=tm.ExpertPlacement(REPLICATED[2]),
                        backend=backend,
                        generator=generator,
                        device=where,
                    )
                    ids = torch.randint(0, 6, (7, 2), generator=generator, device="cpu").to(where)
                    weights = random(transport.rank, 7, 2).abs().to(where)
                    arguments = random(transport.rank, 7, 8).to(where), ids, weights
                else:
                    layer = tm.MoELayer(
                        config,
                        ranks.get(case, lambda: transport)(),
                        OVERLAPS.get(case, tm.OverlapConfig(2)),
                        backend=backend,
                        generator=generator,
                        device=where,
                    )
                    arguments = (random(transport.rank, 7, 8).to(where),)
                results.append(trained(layer, arguments, num_calls))
        return results

    size = 4 if case == "two levels" else 2
    for plain, under_meta in tm.run_on_emulated_ranks(on_rank, size, device=where, timeout_s=120):
        assert len(plain) == len(under_meta) >= 4
        for one, other in zip(plain, under_meta, strict=True):
            if case == "auto":  # whose ranks may have tried other plans
                torch.testing.assert_close(one, other)
            else:
                assert torch.equal(one, other)


def host_factories(path: Path) -> Iterator[str]:
    """Return the calls of FACTORIES that leave the device to the caller's default."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in FACTORIES.split():
            names = {keyword.arg for keyword in node.keywords}
            if ast.unparse(node.func).startswith("torch.") and not names & {"device", None}:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_every_new_tensor_names_its_device() -> None:
    """Those in pinned memory, too, which only a GPU makes; kernels/ are run above, the rest are own programs."""
    paths = [
        p
        for p in ROOT.rglob("*.py")
        if not p.relative_to(ROOT).as_posix().startswith(("ops/aot/", "ops/kernels/", "tools/"))
    ]
    assert [found for path in paths for found in host_factories(path)] == []
