"""Experts that a GPU's stream copies: every copy and product in order, and the bits of experts in memory.

On a CPU that stands in for a GPU whose copies are late (tests/support/late_device.py).
"""

import copy
import gc
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from late_device import LateDevice, LateStream
from test_offloading import (
    CHUNKS,
    FORMATS,
    HIDDEN,
    KINDS,
    NUM_EXPERTS,
    TOP_K,
    Net,
    compare,
    make_layer,
    step,
)
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.config.formats import WeightFormat
from tritonmoe.overlap.report import LayerReport
from tritonmoe.placement import offloaded as offloaded_module
from tritonmoe.runtime import pinned_memory, streamed
from tritonmoe.transports import Transport, TwoLevelTransport

PLACES = ["cpu", "folder"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    threads = torch.get_num_threads()
    late = LateDevice()
    with monkeypatch.context() as patched:
        late.install(patched)
        yield late
        gc.collect()
        torch.set_num_threads(threads)
    assert not late.faults


def offload(module: nn.Module, place: str, folder: Path, resident_bytes: int = 0) -> Any:
    return tm.offload_experts(module, "cpu" if place == "cpu" else folder, resident_bytes=resident_bytes)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("num_tokens", [1, 40, 900])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_bits_are_those_of_experts_in_memory(
    case: tuple[WeightFormat | None, torch.dtype], place: str, num_tokens: int, tmp_path: Path, device: LateDevice
) -> None:
    resident = make_layer(*case, bias=True)
    offloaded = copy.deepcopy(resident)
    done = offload(offloaded, place, tmp_path, resident_bytes=20_000)
    for seed in range(3):
        expected = step(resident, case[1], num_tokens, seed=seed)
        with device.computing():
            found = step(offloaded, case[1], num_tokens, seed=seed)
        compare(expected, found)
    device.check()
    reader = done.reader()
    assert reader._allocated <= reader.limit_bytes
    assert reader.limit_bytes == 20_000 + 4 * sum(
        weight.expert_bytes for weight in reader.weights
    )  # whatever the number of threads
    if place == "cpu":
        assert not device.host_waits
    figures = reader.figures
    assert (figures.wait_s, figures.pass_s) == (0.0, 0.0), "times of the host are none of a GPU"
    assert figures.device_passes.seconds_so_far() >= figures.device_waits.seconds_so_far()
    assert "6 forwards and backwards of experts took" in str(done)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("save", ["input", "callable", "inference"])
def test_bits_in_other_calls(save: str, place: str, tmp_path: Path, device: LateDevice) -> None:
    activation: Any = (lambda h: h[:, :128] * h[:, 128:].sigmoid()) if save == "callable" else "silu"
    resident = make_layer(dtype=torch.float32, activation=activation)
    if save == "input":
        object.__setattr__(resident, "spec", copy.copy(resident.spec))
        object.__setattr__(resident.spec, "save", "input")
    offloaded = copy.deepcopy(resident)
    offload(offloaded, place, tmp_path)
    with device.computing():
        if save == "inference":
            x, ids, weights = torch.randn(50, HIDDEN), torch.randint(0, NUM_EXPERTS, (50, TOP_K)), torch.rand(50, TOP_K)
            with torch.inference_mode():
                assert torch.equal(resident(x, ids, weights), offloaded(x, ids, weights))
        found = step(offloaded, torch.float32)  # what was copied in inference mode is no hindrance
    compare(step(resident, torch.float32), found)
    device.check()


def backward_elsewhere(device: LateDevice, stream: LateStream, run: Callable[[], None]) -> None:
    """Run something on another thread, as autograd does backwards, on a stream."""

    def on_thread() -> None:
        with device.computing(stream):
            run()

    thread = threading.Thread(target=on_thread)
    thread.start()
    thread.join()


@pytest.mark.parametrize("place", PLACES)
def test_streams_and_threads_take_turns(place: str, tmp_path: Path, device: LateDevice) -> None:
    """Two layers with one reader, forwards on one stream, backwards by another thread there or on a second stream."""
    both = nn.ModuleList([make_layer(dtype=torch.float32) for _ in range(2)])
    offloaded = copy.deepcopy(both)
    offload(offloaded, place, tmp_path)
    streams = [device.stream(), device.stream()]
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        x = torch.randn(30, HIDDEN, generator=generator)
        ids = torch.randint(0, NUM_EXPERTS, (30, TOP_K), generator=generator)
        weights = torch.rand(30, TOP_K, generator=generator)
        results = []
        for layers in (both, offloaded):
            own = x.clone().requires_grad_()
            with device.computing(streams[0]):
                y = layers[1](layers[0](own, ids, weights), ids, weights)
            backward_elsewhere(device, streams[number % 2], lambda y=y: y.square().sum().backward())
            assert own.grad is not None
            results.append({"y": y.detach(), "x": own.grad})
        compare(*results)
    device.check()


@pytest.mark.sweep(1)
@pytest.mark.parametrize("overlap", CHUNKS, ids=lambda of: f"{of.num_chunks}-{of.chunk_by}")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [FORMATS[1], FORMATS[2]], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_bits_over_emulated_ranks(
    num_ranks: int,
    case: tuple[WeightFormat | None, torch.dtype],
    place: str,
    overlap: tm.OverlapConfig,
    tmp_path: Path,
    device: LateDevice,
) -> None:
    """Ranks are threads with streams of their own, on one device."""

    def on_rank(transport: Transport) -> None:
        torch.manual_seed(0)
        resident = make_layer(*case, ranks=transport, overlap=overlap, bias=True)
        offloaded = make_layer(*case, ranks=transport, overlap=overlap, bias=True)
        offload(offloaded, place, tmp_path)
        with device.computing():
            for seed in range(2):
                own = 10 * seed + transport.rank
                compare(step(resident, case[1], seed=own), step(offloaded, case[1], seed=own))

    tm.run_on_emulated_ranks(on_rank, num_ranks)
    device.check()


@pytest.mark.parametrize("kind", ["plain", "two levels", pytest.param("parts", marks=pytest.mark.thorough)])
def test_reports_have_the_waits_of_the_device(kind: str, tmp_path: Path, device: LateDevice) -> None:
    def on_rank(transport: Transport) -> LayerReport | None:
        ranks = TwoLevelTransport(transport, 2) if kind == "two levels" else transport
        experts = make_layer(ranks=ranks, overlap=KINDS[kind])
        offload(experts, "cpu", tmp_path)
        with device.computing():
            step(experts, torch.bfloat16, num_tokens=12)
        return experts.last_report

    for report in tm.run_on_emulated_ranks(on_rank, 4 if kind == "two levels" else 2):
        assert report is not None
        assert report.backward is not None
        for one in (report.forward, report.backward)[
            : 2 if kind == "plain" else 1
        ]:  # some ranks' experts fit all at once
            assert one.loads is not None
            assert one.loads.host_wait_s == 0
            assert one.loads.device_waits
            for steps in filter(None, (one.steps, one.steps_inside)):
                assert sum(of.load_s for of in steps) == pytest.approx(one.loads.wait_s)
            assert "for experts to be read" in str(one)
    device.check()


def make_nets(place: str, path: Path) -> tuple[Net, Net]:
    torch.manual_seed(0)
    resident = Net()
    offloaded = copy.deepcopy(resident)
    offload(offloaded, place, path)
    return resident, offloaded


def run(module: nn.Module, around: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1))
    y = (module if around is None else around)(x)
    y.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    return {"y": y.detach(), **grads}


def test_recomputed_and_copied(tmp_path: Path, device: LateDevice) -> None:
    resident, offloaded = make_nets("cpu", tmp_path)
    expected = run(resident)
    with device.computing():
        checkpoint = torch.utils.checkpoint.checkpoint
        compare(expected, run(offloaded, partial(checkpoint, offloaded, use_reentrant=False)))
        compare(expected, run(copy.deepcopy(offloaded)))
    device.check()


@pytest.mark.thorough
def test_compiled(tmp_path: Path, device: LateDevice) -> None:
    resident, offloaded = make_nets("cpu", tmp_path)
    compare(run(resident), run(offloaded, torch.compile(offloaded, backend="eager")))


def test_a_backward_reads_experts_of_a_module_that_is_gone(tmp_path: Path, device: LateDevice) -> None:
    found = []
    for is_offloaded in (False, True):
        experts = make_layer(dtype=torch.float32)
        if is_offloaded:
            tm.offload_experts(experts, "cpu")
        x = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with device.computing():
            y = experts(x, torch.arange(90).view(30, TOP_K) % NUM_EXPERTS, torch.ones(30, TOP_K))
            del experts
            gc.collect()
            y.square().sum().backward()
        assert x.grad is not None
        found.append({"x": x.grad})
    compare(*found)
    device.check()


@pytest.mark.parametrize("place", PLACES)
def test_memory_goes_when_the_model_does(place: str, tmp_path: Path, device: LateDevice) -> None:
    """Whatever the device still has to do: copies and products that are enqueued have their memory."""
    before = len(streamed.known_handles)
    _, offloaded = make_nets(place, tmp_path)
    with device.computing(), torch.no_grad():
        offloaded(torch.randn(10, 32))
        del offloaded
        gc.collect()
    assert device.is_given_back()
    assert len(streamed.known_handles) == before
    device.check()


def test_what_is_refused_says_the_way_out(tmp_path: Path, device: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    _, offloaded = make_nets("cpu", tmp_path)
    x = torch.randn(10, 32)
    with monkeypatch.context() as patched:
        patched.setattr(offloaded_module, "is_captured", lambda _: True)
        with pytest.raises(
            ValueError, match=r"pinned host memory, and a CUDA graph can't hold .* outside of torch\.cuda"
        ):
            offloaded(x)
    with monkeypatch.context() as patched:
        patched.setattr(offloaded_module, "copies_late", lambda _: False)  # as rows on a CPU are
        with pytest.raises(ValueError, match=r"on a GPU \(CUDA, ROCm\), but their rows are on cpu: move the model"):
            offloaded(x)
        _, other = make_nets("folder", tmp_path)
        with pytest.raises(ValueError, match=r"on a CPU or a GPU \(CUDA, ROCm\), but their rows are on meta"):
            other.to("meta")(x.to("meta"))
    with pytest.raises(ValueError, match="'cuda'"):
        tm.offload_experts(Net(), "cuda")
    experts = make_layer(dtype=torch.float32)
    object.__setattr__(experts, "spec", copy.copy(experts.spec))
    tm.offload_experts(experts, "cpu")
    object.__setattr__(experts.spec, "backend", "reference")
    with pytest.raises(ValueError, match="by the backend 'torch'"):
        step(experts, torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(offloaded_module, "has_late_device", lambda: False)
        with pytest.raises(ValueError, match="there is none here"):
            tm.offload_experts(Net(), "cpu")


def test_a_file_that_is_cut_raises_and_the_memory_is_used_again(tmp_path: Path, device: LateDevice) -> None:
    experts = make_layer(dtype=torch.float32)
    expected = step(experts, torch.float32, 200)
    done = tm.offload_experts(experts, tmp_path)
    path, reader = tmp_path / "experts.safetensors", done.reader()
    whole = path.read_bytes()
    with device.computing():
        os.truncate(path, len(whole) - 1)
        for _ in range(3):
            with pytest.raises(
                tm.OffloadError, match=r"expert \d+ of .* could not be read from .*experts\.safetensors"
            ):
                step(experts, torch.float32, 200)
        reader._executor.submit(lambda: None).result()
        assert reader._allocated <= reader.limit_bytes
        path.write_bytes(whole)
        reader._failed.clear()
        for weight in reader.weights:
            weight.source._state = weight.source._found()
        compare(expected, step(experts, torch.float32, 200))
    device.check()


@pytest.mark.parametrize("num_tokens", [40, 900])
@pytest.mark.parametrize("place", PLACES)
def test_products_of_large_experts(place: str, num_tokens: int, tmp_path: Path, device: LateDevice) -> None:
    """As many pairs for each: batched where they are few, in shapes that are rounded up where they are many."""
    config = tm.MoEConfig(hidden_size=HIDDEN, intermediate_size=512, num_experts=NUM_EXPERTS, top_k=TOP_K)
    resident = tm.GroupedExperts(config, dtype=torch.bfloat16).requires_grad_(False)
    offloaded = copy.deepcopy(resident)
    offload(offloaded, place, tmp_path)
    x = torch.randn(num_tokens, HIDDEN).bfloat16()
    ids = torch.arange(num_tokens * TOP_K).view(num_tokens, TOP_K) % NUM_EXPERTS
    found = []
    with device.computing():
        for experts in (resident, offloaded):
            own = x.clone().requires_grad_()
            y = experts(own, ids, torch.ones(num_tokens, TOP_K))
            y.square().sum().backward()
            assert own.grad is not None
            found.append({"y": y.detach(), "x": own.grad})
    compare(*found)
    device.check()
    assert bool(device.host_waits) == (place == "folder")


def test_pinning_moves_what_is_on_the_cpu_and_may_fail(
    tmp_path: Path, device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's experts are never there twice; where the second module can't be pinned nothing is changed."""
    both = nn.ModuleList([make_layer(dtype=torch.float32), make_layer("mxfp4")])
    expected = [step(both[0], torch.float32), step(both[1], torch.bfloat16)]
    pin, pinned = offloaded_module.pin_weights, []

    def pin_once(weights: Any) -> Any:
        if pinned:
            raise MemoryError("no host memory")
        pinned.append(pin(weights))
        return pinned[0]

    with monkeypatch.context() as patched:
        patched.setattr(offloaded_module, "pin_weights", pin_once)
        with pytest.raises(MemoryError, match="no host memory"):
            tm.offload_experts(both, "cpu")
    memory, offsets = pinned.pop()
    assert both[0].gate_up_proj.data_ptr() == memory.bytes.data_ptr() + offsets["gate_up_proj"]
    del memory
    compare(expected[0], step(both[0], torch.float32))
    tm.offload_experts(both, "cpu")
    with device.computing():
        compare(expected[0], step(both[0], torch.float32))
        compare(expected[1], step(both[1], torch.bfloat16))
    device.check()


def test_experts_larger_than_the_free_host_memory_are_refused(
    tmp_path: Path, device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux would map them, and end a process once they are written; a system that says nothing is asked for them."""
    experts = make_layer(dtype=torch.float32)
    expected = step(experts, torch.float32)
    says = tmp_path / "meminfo"
    monkeypatch.setattr(pinned_memory, "MEMINFO", says)
    num_bytes = sum(weight.numel() * 4 for weight in (experts.gate_up_proj, experts.down_proj))
    says.write_text("MemTotal:  99999999 kB\nMemFree:  99999999 kB\nMemAvailable:          3 kB\n")
    with pytest.raises(
        MemoryError, match=rf"{num_bytes} bytes .* 3072 bytes are free: .* offload_experts\(\) to a folder"
    ):
        tm.offload_experts(experts, "cpu")
    compare(expected, step(experts, torch.float32))
    says.write_text(f"MemAvailable: {num_bytes // 1024 + 1} kB\n")
    tm.offload_experts(experts, "cpu")
    says.unlink()
    tm.offload_experts(make_layer(dtype=torch.float32), "cpu")
    with device.computing():
        compare(expected, step(experts, torch.float32))
    device.check()
