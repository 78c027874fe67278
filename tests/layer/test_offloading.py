"""Experts in files: the bits of experts in memory, on one device and over ranks, and what users put around layers."""

import copy
import io
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.config.formats import WeightFormat
from tritonmoe.overlap.report import LayerReport
from tritonmoe.runtime.weight_files import WeightFile
from tritonmoe.transports import Transport, TwoLevelTransport

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, RANK = 64, 128, 12, 3, 2
FORMATS: list[tuple[WeightFormat | None, torch.dtype]] = [
    (None, torch.float32),
    (None, torch.bfloat16),
    ("mxfp4", torch.bfloat16),
    ("fp8", torch.bfloat16),
    ("nf4", torch.bfloat16),
]


def make_layer(
    weight_format: WeightFormat | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ranks: Transport | None = None,
    **options: object,
) -> tm.GroupedExperts:
    overlap = options.pop("overlap", None)
    config = tm.MoEConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        top_k=TOP_K,
        weight_format=weight_format,
        **{"num_experts": NUM_EXPERTS, **options},  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(0)
    experts = tm.GroupedExperts(config, ranks, overlap, dtype=dtype, generator=generator)  # type: ignore[arg-type]
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return experts


def step(
    experts: tm.GroupedExperts, dtype: torch.dtype, num_tokens: int = 40, *, adapted: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Return the output and every gradient of a call with random tokens, one of whose experts has no pair."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    leaves = {"x": draw(num_tokens, HIDDEN)}
    ids = torch.randint(-1, NUM_EXPERTS - 1, (num_tokens, TOP_K), generator=generator)
    leaves["topk_weights"] = torch.rand(num_tokens, TOP_K, generator=generator).requires_grad_()
    num_local, adapters = len(experts.expert_ids), None
    if adapted:
        factors = {
            "gate_up_a": draw(NUM_EXPERTS, RANK, HIDDEN, scale=0.1),
            "gate_up_b": draw(NUM_EXPERTS, 2 * INTERMEDIATE, RANK, scale=0.1),
            "down_a": draw(NUM_EXPERTS, RANK, INTERMEDIATE, scale=0.1),
            "down_b": draw(NUM_EXPERTS, HIDDEN, RANK, scale=0.1),
        }
        leaves |= factors
        own = {name: factor[list(experts.expert_ids)] for name, factor in factors.items()}
        assert all(len(factor) == num_local for factor in own.values())
        adapters = tm.ExpertAdapters(**own)
    y = experts(leaves["x"], ids, leaves["topk_weights"], adapters=adapters)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    own_grads = {name: parameter.grad for name, parameter in experts.named_parameters() if parameter.grad is not None}
    experts.zero_grad()
    return {"y": y.detach(), **grads, **own_grads}


def compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.sweep(1)
@pytest.mark.parametrize("num_tokens", [1, 40, 900])
@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_bits_are_those_of_experts_in_memory(
    case: tuple[WeightFormat | None, torch.dtype], num_tokens: int, tmp_path: Path
) -> None:
    resident = make_layer(*case, bias=True)
    offloaded = copy.deepcopy(resident)
    done = tm.offload_experts(offloaded, tmp_path)
    for seed in range(2):
        compare(step(resident, case[1], num_tokens, seed=seed), step(offloaded, case[1], num_tokens, seed=seed))
    assert done.reader()._allocated <= done.reader().limit_bytes
    assert done.reader().figures.num_bytes > 0
    assert [name for name, _ in offloaded.named_parameters()] == ["gate_up_proj_bias", "down_proj_bias"]


@pytest.mark.parametrize("options", [{"transposed": True}, {"gated": True, "interleaved": True}], ids=str)
def test_bits_in_other_layouts(options: dict[str, object], tmp_path: Path) -> None:
    resident = make_layer(dtype=torch.float32, **options)
    offloaded = copy.deepcopy(resident)
    tm.offload_experts(offloaded, tmp_path, resident_bytes=200_000)
    compare(step(resident, torch.float32), step(offloaded, torch.float32))


@pytest.mark.parametrize("save", ["input", "callable", "inference"])
def test_bits_in_other_calls(save: str, tmp_path: Path) -> None:
    activation = (lambda h: h[:, :INTERMEDIATE] * h[:, INTERMEDIATE:].sigmoid()) if save == "callable" else "silu"
    resident = make_layer(dtype=torch.float32, activation=activation)
    if save == "input":
        object.__setattr__(resident, "spec", copy.copy(resident.spec))
        object.__setattr__(resident.spec, "save", "input")
    offloaded = copy.deepcopy(resident)
    tm.offload_experts(offloaded, tmp_path)
    if save == "inference":
        x, ids, weights = torch.randn(50, HIDDEN), torch.randint(0, NUM_EXPERTS, (50, TOP_K)), torch.rand(50, TOP_K)
        with torch.inference_mode():
            assert torch.equal(resident(x, ids, weights), offloaded(x, ids, weights))
        x.requires_grad_()
        offloaded(x, ids, weights).sum().backward()  # what was read in inference mode is no hindrance
        return
    compare(step(resident, torch.float32), step(offloaded, torch.float32))


def test_hooks_on_saved_tensors_see_no_weights(tmp_path: Path) -> None:
    """Such as take activations to a CPU, and bring back other tensors."""
    resident = make_layer(dtype=torch.float32)
    offloaded = copy.deepcopy(resident)
    tm.offload_experts(offloaded, tmp_path)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor.clone()

    expected = step(resident, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compare(expected, step(offloaded, torch.float32))
    assert max(sizes) < resident.gate_up_proj.numel()


CHUNKS = [
    tm.OverlapConfig(num_chunks=1),
    tm.OverlapConfig(num_chunks=3, chunk_by="tokens"),
    tm.OverlapConfig(num_chunks=2, chunk_by="experts"),
]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("overlap", CHUNKS, ids=lambda of: f"{of.num_chunks}-{of.chunk_by}")
@pytest.mark.parametrize("case", FORMATS[1:], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_bits_over_ranks(
    num_ranks: int, case: tuple[WeightFormat | None, torch.dtype], overlap: tm.OverlapConfig, tmp_path: Path
) -> None:
    def on_rank(transport: Transport) -> None:
        torch.manual_seed(0)
        resident = make_layer(*case, ranks=transport, overlap=overlap, bias=True)
        offloaded = make_layer(*case, ranks=transport, overlap=overlap, bias=True)
        tm.offload_experts(offloaded, tmp_path)
        for seed in range(2):
            own = 10 * seed + transport.rank
            compare(step(resident, case[1], seed=own), step(offloaded, case[1], seed=own))

    tm.run_on_emulated_ranks(on_rank, num_ranks)
    assert len(list(tmp_path.iterdir())) == num_ranks


KINDS = {
    "plain": tm.OverlapConfig(2),
    "capacity": tm.OverlapConfig(2, capacity=4.0),
    "parts": tm.OverlapConfig(memory_budget_bytes=20_000),
    "two levels": tm.OverlapConfig(2),
}


@pytest.mark.parametrize("kind", ["plain", "capacity", "two levels", pytest.param("parts", marks=pytest.mark.thorough)])
def test_reports_say_how_long_products_waited(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = WeightFile.read

    def read_slowly(file: WeightFile, memory: memoryview, offset: int) -> None:
        time.sleep(0.02)  # most of a read is waited for, how busy the machine ever is
        read(file, memory, offset)

    monkeypatch.setattr(WeightFile, "read", read_slowly)

    def on_rank(transport: Transport, *, is_offloaded: bool) -> tuple[dict[str, Tensor], LayerReport | None]:
        ranks = TwoLevelTransport(transport, 2) if kind == "two levels" else transport
        experts = make_layer(ranks=ranks, overlap=KINDS[kind])
        if is_offloaded:
            tm.offload_experts(experts, tmp_path)
        return step(experts, torch.bfloat16, num_tokens=12), experts.last_report

    num_ranks = 4 if kind == "two levels" else 2
    resident, offloaded = (  # each in a world of its own: a tuner that has seen calls would choose other chunks
        tm.run_on_emulated_ranks(partial(on_rank, is_offloaded=is_offloaded), num_ranks)
        for is_offloaded in (False, True)
    )
    for (expected, other), (found, report) in zip(resident, offloaded, strict=True):
        compare(expected, found)
        assert report is not None
        assert other is not None
        assert report.backward is not None
        passes = [report.forward, report.backward][: 2 if kind == "plain" else 1]  # some ranks' experts fit all at once
        for one in passes:
            assert one.loads is not None
            assert 0.004 <= one.loads.wait_s <= one.compute_s
            for steps in filter(None, (one.steps, one.steps_inside)):
                waits = [(str(of.step), of.load_s) for of in steps if of.load_s]  # each part has a step of that name
                assert sum(load_s for _, load_s in waits) == pytest.approx(one.loads.wait_s)
                assert all(of.load_s <= of.end_s - of.start_s for of in steps)
                assert all("experts" in step or step == "weight_grad" for step, _ in waits)
            assert "for experts to be read" in str(one)
        assert report.forward.loads is not None
        parts = [part.forward.loads.wait_s for part in report.parts if part.forward.loads is not None]
        assert sum(parts) == pytest.approx(report.forward.loads.wait_s if kind == "parts" else 0.0)
        if kind == "plain":
            assert "more tokens a step, fewer bits (quantize_experts), or more resident_bytes" in str(report)
        assert f"forward: {1e3 * report.forward.total_s:.2f} ms" in str(report)
        assert "to be read" not in str(other)


@pytest.mark.parametrize("is_once", [False, True])
def test_reports_say_how_often_experts_were_read(is_once: bool, tmp_path: Path) -> None:
    overlap = tm.OverlapConfig(4, chunk_by="experts", local_first=False) if is_once else tm.OverlapConfig(4)

    def on_rank(transport: Transport) -> LayerReport | None:
        experts = make_layer(ranks=transport, overlap=overlap, num_experts=48)
        tm.offload_experts(experts, tmp_path)
        generator = torch.Generator().manual_seed(transport.rank)
        x = torch.randn(300, HIDDEN, dtype=torch.bfloat16, generator=generator)
        ids = torch.randint(0, 48, (300, TOP_K), generator=generator)
        experts(x, ids, torch.rand(300, TOP_K))
        return experts.last_report

    for report in tm.run_on_emulated_ranks(on_rank, 2):
        assert report is not None
        loads = report.forward.loads
        assert loads is not None
        assert loads.expert_bytes == 24 * 3 * HIDDEN * INTERMEDIATE * 2
        times = loads.read_bytes / loads.expert_bytes
        assert (0.9 < times < 1.2) if is_once else times > 3
        advice = 'OverlapConfig(chunk_by="experts", local_first=False) reads them once'
        assert (advice in loads._replace(host_wait_s=1.0).words(2.0)) == (not is_once)
        assert advice not in loads._replace(host_wait_s=0.01).words(2.0)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_file_that_is_cut_raises_on_every_rank(when: str, tmp_path: Path) -> None:
    messages: dict[int, str] = {}

    def on_rank(transport: Transport) -> None:
        experts = make_layer(ranks=transport, num_experts=32)
        tm.offload_experts(experts, tmp_path)
        x = torch.randn(200, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        ids, weights = torch.randint(0, 32, (200, TOP_K)), torch.rand(200, TOP_K)
        if when == "backward":
            y = experts(x, ids, weights)
        transport.barrier()
        if transport.rank == 1:
            file = tmp_path / "experts.rank-1-of-2.safetensors"
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size - 1)
        transport.barrier()
        try:
            if when == "forward":
                experts(x, ids, weights)
            else:
                y.sum().backward()
        except RuntimeError as error:
            messages[transport.rank] = f"{type(error).__name__}: {error}"
        assert x.grad is None

    tm.run_on_emulated_ranks(on_rank, 2)
    assert "OffloadError: expert " in messages[1]
    assert "expert " in messages[0]
    assert "could not be read" in messages[0]


def test_bits_of_two_batches(tmp_path: Path) -> None:
    def on_rank(transport: Transport) -> None:
        layers = [make_layer(ranks=transport, overlap=tm.OverlapConfig(2)) for _ in range(2)]
        tm.offload_experts(layers[1], tmp_path)
        found = []
        for layer in layers:
            generator = torch.Generator().manual_seed(transport.rank)
            x = torch.randn(30, HIDDEN, dtype=torch.bfloat16, generator=generator).requires_grad_()
            ids = torch.randint(0, NUM_EXPERTS, (30, TOP_K), generator=generator)
            weights = torch.rand(30, TOP_K, generator=generator).requires_grad_()

            def loss(half: slice) -> Tensor:
                return layer(x[half], ids[half], weights[half]).float().square().sum()  # noqa: B023

            losses = tm.two_batches(loss, slice(0, 17), slice(17, 30))
            sum(losses).backward()
            found.append({"losses": torch.stack([one.detach() for one in losses]), "x": x.grad, "w": weights.grad})
        compare(*found)

    tm.run_on_emulated_ranks(on_rank, 2)


class Net(nn.Module):
    """A layer between others, whose experts are frozen."""

    def __init__(self) -> None:
        super().__init__()
        config = tm.MoEConfig(hidden_size=32, intermediate_size=64, num_experts=12, top_k=2, bias=True)
        self.before, self.moe, self.after = nn.Linear(32, 32), tm.MoELayer(config), nn.Linear(32, 32)
        self.moe.grouped_experts.gate_up_proj.requires_grad_(False)
        self.moe.grouped_experts.down_proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.moe(self.before(x)))


def make_nets(path: Path) -> tuple[Net, Net]:
    torch.manual_seed(0)
    resident = Net()
    offloaded = copy.deepcopy(resident)
    tm.offload_experts(offloaded, path)
    return resident, offloaded


def run(module: nn.Module, around: nn.Module | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = (module if around is None else around)(torch.randn(4, 10, 32, generator=generator))
    y.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    return {"y": y.detach(), **grads}


def test_copies_casts_state_dicts_and_optimizers(tmp_path: Path) -> None:
    resident, offloaded = make_nets(tmp_path)
    compare(run(resident), run(copy.deepcopy(offloaded).to("cpu")))
    saved = io.BytesIO()
    torch.save(offloaded.state_dict(), saved)
    saved.seek(0)
    _, other = make_nets(tmp_path)
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    other.load_state_dict(torch.load(saved))
    compare(run(resident), run(other))
    assert "moe.experts.gate_up_proj" not in offloaded.state_dict()
    assert offloaded.moe.grouped_experts.gate_up_proj.shape == (12, 128, 32)


def test_recomputed_and_compiled(tmp_path: Path) -> None:
    resident, offloaded = make_nets(tmp_path)
    expected = run(resident)

    class Recomputed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(offloaded, x, use_reentrant=False)

    compare(expected, run(offloaded, Recomputed()))
    compiled = torch.compile(offloaded, backend="eager")
    compare(expected, run(offloaded, compiled))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exported program"):
        torch.export.export(offloaded, (torch.randn(4, 10, 32),), strict=False)


def test_files_serve_as_long_as_a_model_lives(tmp_path: Path) -> None:
    """Whatever becomes of their folder, and also for copies, forks of the process and several threads."""
    resident, offloaded = make_nets(tmp_path)
    expected = run(resident)
    torch.manual_seed(1)
    another = Net()
    another_expected = run(another)
    another.report = tm.offload_experts(another, tmp_path)  # under the same names
    compare(another_expected, run(copy.deepcopy(another)))
    shutil.rmtree(tmp_path)
    compare(expected, run(offloaded))
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            compare(expected, run(offloaded))
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    both = nn.ModuleList([Net(), Net()])
    x = torch.randn(4, 10, 32)
    with torch.no_grad():
        wanted = [net(x) for net in both]
        tm.offload_experts(both, tmp_path / "both")
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda number: both[number % 2](x), range(40)))
    assert all(torch.equal(y, wanted[number % 2]) for number, y in enumerate(found))


def test_what_is_refused_says_the_way_out(tmp_path: Path) -> None:
    resident, offloaded = make_nets(tmp_path)
    x = torch.randn(10, 32)
    with pytest.raises(ValueError, match="call it|once"):  # noqa: RUF043
        tm.offload_experts(offloaded, tmp_path)
    with pytest.raises(ValueError, match="before that call"):
        offloaded.load_state_dict(resident.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        resident.load_state_dict(offloaded.state_dict())
    with pytest.raises(ValueError, match="pickle"):
        torch.save(offloaded, io.BytesIO())
    with pytest.raises(ValueError, match="before offload_experts"):
        offloaded.moe.grouped_experts.reset_parameters()
    with pytest.raises(TypeError, match=r"model\.to\(torch\.bfloat16\)"), torch.autocast("cpu", torch.bfloat16):
        offloaded(x)
    with pytest.raises(TypeError, match="cast the model before"):
        copy.deepcopy(offloaded).double()(x.double())
    experts = offloaded.moe.grouped_experts
    with pytest.raises(ValueError, match=r"normal_ is called with a weight of experts.* stay in"):
        nn.init.normal_(experts.gate_up_proj)
    with pytest.raises(ValueError, match="gate_up_proj has no values: the experts of moe"):
        tm.moe_mlp(x, torch.zeros(10, 2, dtype=torch.int64), torch.ones(10, 2), experts.gate_up_proj, experts.down_proj)
    with pytest.raises(ValueError, match="their rows are on meta"):
        copy.deepcopy(offloaded).to("meta")(x.to("meta"))
    replaced = copy.deepcopy(offloaded)
    replaced.moe.grouped_experts.down_proj = nn.Parameter(torch.ones(12, 32, 64))
    with pytest.raises(ValueError, match=r"down_proj of moe\.experts was set since offload_experts"):
        replaced(x)
    with pytest.raises(Exception, match="leave fullgraph=True out"):
        torch.compile(offloaded, backend="eager", fullgraph=True)(x)
    optimizer = torch.optim.SGD(resident.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD was made with"):
        tm.offload_experts(resident, tmp_path)
    del optimizer
    for to, error in (("cpu", ValueError), (3, TypeError)):
        with pytest.raises(error):
            tm.offload_experts(resident, to)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resident_bytes"):
        tm.offload_experts(resident, tmp_path, resident_bytes=-1)
    with pytest.raises(ValueError, match="backend 'torch'"):
        tm.offload_experts(make_layer_of("reference"), tmp_path)
    assert resident.moe.grouped_experts.gate_up_proj.numel() > 0


def make_layer_of(backend: str) -> tm.MoELayer:
    return tm.MoELayer(tm.MoEConfig(hidden_size=32, intermediate_size=32, num_experts=4, top_k=2), backend=backend)


def test_ranks_refuse_what_would_need_the_weights(tmp_path: Path) -> None:
    def on_rank(transport: Transport) -> None:
        experts = make_layer(ranks=transport, overlap=tm.OverlapConfig(num_chunks=1, balance="always"))
        tm.offload_experts(experts, tmp_path)
        x, ids = torch.randn(8, HIDDEN, dtype=torch.bfloat16), torch.zeros(8, TOP_K, dtype=torch.int64)
        with pytest.raises((ValueError, tm.TransportError), match="balance"):
            experts(x, ids, torch.ones(8, TOP_K))
        with pytest.raises(ValueError, match="don't move"):
            tm.rebalance(experts)

    tm.run_on_emulated_ranks(on_rank, 2)
