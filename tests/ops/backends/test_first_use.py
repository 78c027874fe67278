"""backend="auto" takes a GPU's kernels where they were seen to be right, else PyTorch's operations."""

import json
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from triton.compiler.errors import CompilationError

from tritonmoe import __version__
from tritonmoe.config.activations import ClampedSwiGLU
from tritonmoe.config.layer import ExpertLayout, KernelOptions, MoEConfig, Projection
from tritonmoe.ops.backends import backend_choice, choose, first_use, kernel_check
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.ops.backends import triton as triton_backend
from tritonmoe.ops.backends.kernel_check import Checked, Distance, cases_like
from tritonmoe.ops.backends.ops import CalledLayer
from tritonmoe.routing import Routing, router, router_check

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
machine_of = first_use._machine
RIGHT = Checked("bf16", "up: h", {"largest": Distance(0.01, 0.02)})
WRONG = Checked("bf16", "down", {"largest": Distance(0.3, 0.02)})


@pytest.fixture(autouse=True)
def a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand for a machine whose card is new, and this process too; kept results go to a folder of the test's own."""
    monkeypatch.setenv("TRITONMOE_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(first_use, "_machine", lambda device: "a card")
    first_use._found.clear()
    backend_choice._choose.cache_clear()
    router._are_right.cache_clear()
    yield
    first_use._found.clear()
    backend_choice._choose.cache_clear()
    router._are_right.cache_clear()


def ask(*checked: Checked, calls: list | None = None, dtype: torch.dtype = torch.bfloat16) -> bool:
    def compare() -> Iterator[Checked]:
        if calls is not None:
            calls.append(None)
        yield from checked

    return first_use.are_right(CPU, dtype, "experts", compare)


def test_a_checkout_that_nobody_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    discover = Distribution.discover
    monkeypatch.setattr(
        Distribution, "discover", lambda **of: iter(()) if of.get("name") == "tritonmoe" else discover(**of)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert f"tritonmoe {__version__}" in str(machine_of(CUDA))
    assert machine_of(CPU) is None


def test_what_is_right_is_kept(tmp_path: Path) -> None:
    calls: list[None] = []
    assert ask(RIGHT, calls=calls)
    assert ask(WRONG, calls=calls), "asked once in a process"
    first_use._found.clear()
    assert ask(WRONG, calls=calls), "and once for a machine"
    assert len(calls) == 1
    assert json.loads((tmp_path / "new" / "checked.json").read_text()) == {"right": ["experts bfloat16 on a card"]}
    assert not ask(WRONG, calls=calls, dtype=torch.float16), "another dtype has other kernels"
    assert ask(RIGHT, calls=calls, dtype=torch.float32)
    assert len(json.loads((tmp_path / "new" / "checked.json").read_text())["right"]) == 2


@pytest.mark.parametrize("error", [0.3, float("nan")])
def test_what_is_wrong_is_named_and_asked_again(error: float, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    calls: list[None] = []
    wrong = Checked("bf16", "down", {"largest": Distance(error, 0.02), "root mean square": Distance(0.1, 0.2)})
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        assert not ask(RIGHT, wrong, calls=calls)
        assert not ask(RIGHT, calls=calls)
    assert len(caplog.records) == len(calls) == 1
    assert "(experts bfloat16 on a card)" in caplog.text
    assert f"down: largest error {error:.2g}, 0.02 is allowed" in caplog.text
    assert "root mean square" not in caplog.text
    assert "`tritonmoe check`" in caplog.text
    assert not (tmp_path / "new" / "checked.json").exists()
    first_use._found.clear()
    assert ask(RIGHT, calls=calls)
    assert len(calls) == 2


def test_no_mode_of_the_caller_reaches_the_comparison() -> None:
    """A recompute counts saved tensors, inference mode refuses gradients, fake tensors have no values."""
    packed: list[torch.Tensor] = []

    def compare() -> Iterator[Checked]:
        x = torch.ones(3, requires_grad=True)
        y = (x.exp() * 2).sum()
        assert torch.autograd.grad(y, x)[0].tolist() == pytest.approx([2 * torch.e] * 3)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
        yield RIGHT

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            FakeTensorMode(),
            saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            assert first_use.are_right(CPU, torch.bfloat16, "experts", compare)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert packed == []


def test_an_error_is_the_callers_and_no_answer() -> None:
    def compare() -> Iterator[Checked]:
        raise torch.OutOfMemoryError("no memory")
        yield RIGHT

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        first_use.are_right(CPU, torch.bfloat16, "experts", compare)
    assert ask(RIGHT)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc"]),
        CompilationError("", None, "tf32 is not supported"),
        RuntimeError("PassManager::run failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_triton_cannot_compile_pytorch_computes(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[None] = []

    def compare() -> Iterator[Checked]:
        calls.append(None)
        raise error
        yield RIGHT

    for _ in range(2):
        assert not first_use.are_right(CPU, torch.bfloat16, "experts", compare)
    assert len(calls) == len(caplog.records) == 1
    said = f"can't compile kernels here (experts bfloat16 on a card): {type(error).__name__}"
    assert said in caplog.text


def test_ranks_that_are_threads_ask_once() -> None:
    calls: list[None] = []

    def compare() -> Iterator[Checked]:
        calls.append(None)
        time.sleep(0.1)
        yield RIGHT

    def run() -> None:
        first_use.are_right(CPU, torch.bfloat16, "experts", compare)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_result_that_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "new").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        assert ask(RIGHT)
    assert "checked again in every process" in caplog.text
    assert str(tmp_path / "new") in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"right": 3}'])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "checked.json"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=r"checked\.json"):
        ask(RIGHT)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_experts_in_the_interpreter(is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison that "auto" asks for, of a small layer."""
    monkeypatch.setattr(kernel_check, "CASES", kernel_check.SMALL_CASES)
    right = triton_backend.gather_sum

    def slightly_wrong(*args: object, **keywords: object) -> torch.Tensor:
        return right(*args, **keywords) * 1.1

    if is_wrong:
        monkeypatch.setattr(triton_backend, "gather_sum", slightly_wrong)
    assert backend_choice._are_experts_right(CPU, torch.float32) is not is_wrong


OWN = CalledLayer(ExpertLayout(interleaved=True, transposed=True), ClampedSwiGLU(7.0), 24, 16, True)


def test_layers_like_a_calls_own() -> None:
    cases = cases_like(OWN, torch.bfloat16, KernelOptions(batch_invariant=True), 256, 6)
    sizes = [(case.num_tokens, case.num_experts, case.top_k, case.options.num_sms) for case in cases]
    assert sizes == [(342, 8, 6, None), (16, 8, 6, None), (342, 8, 6, 2)]
    assert all(case.options.batch_invariant and case.bias and case.layout == OWN.layout for case in cases)
    large = cases_like(OWN._replace(hidden_size=7168, intermediate_size=2880), torch.bfloat16, KernelOptions(), 1, 1)
    assert (large[0].hidden_size, large[0].intermediate_size, large[0].num_experts) == (1024, 1088, 2)
    of_a_callable = cases_like(OWN._replace(activation=None), torch.bfloat16, KernelOptions(), 8, 2)
    assert [case.activation for case in of_a_callable] == [None, "silu", "silu", "silu"]
    names = {
        cases_like(layer, torch.bfloat16, KernelOptions(), 8, 2)[0].name
        for layer in (
            OWN,
            OWN._replace(has_bias=False),
            OWN._replace(layout=ExpertLayout()),
            OWN._replace(activation="gelu"),
            OWN._replace(weight_formats=("mxfp4", "mxfp4")),
            OWN._replace(weight_formats=("mxfp4", None)),
            OWN._replace(weight_formats=(None, "mxfp4")),
        )
    }
    assert len(names) == 7


PACKED = CalledLayer(ExpertLayout(), "silu", 64, 32, False, ("mxfp4", "nf4"))


@pytest.mark.thorough
@pytest.mark.parametrize("is_wrong", [False, True])
def test_decoding_is_checked(is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with packed weights alone, those of plain ones don't show."""
    right = triton_backend.up_grad

    def slightly_wrong(dh: torch.Tensor, projection: Projection, *args: object, **keywords: object) -> torch.Tensor:
        dx = right(dh, projection, *args, **keywords)
        return dx if projection.scales is None else dx * 1.1

    if is_wrong:
        monkeypatch.setattr(triton_backend, "up_grad", slightly_wrong)
    assert backend_choice._are_experts_right(CPU, torch.bfloat16, KernelOptions(), 2, 2, PACKED) is not is_wrong


@pytest.mark.parametrize("is_wrong", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_calls_own_layer_is_checked(is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with one activation and layout alone, the first of all checked layers doesn't show."""
    right = triton_backend.up

    def slightly_wrong(x: torch.Tensor, projection: Projection, *args: object, **keywords: object) -> tuple:
        h, a = right(x, projection, *args, **keywords)
        return h, a * 1.1 if projection.layout.interleaved and a is not None else a

    monkeypatch.setattr(kernel_check, "CASES", kernel_check.SMALL_CASES)
    if is_wrong:
        monkeypatch.setattr(triton_backend, "up", slightly_wrong)
    assert backend_choice._are_experts_right(CPU, torch.float32)
    of_call = torch.float32, KernelOptions(), 3, 2, OWN
    assert backend_choice._are_experts_right(CPU, *of_call) is not is_wrong


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ("3.6.0", "lacks a barrier"),
        ("3.7.0+git1", "upgrade it to 3.7.1"),
        ("3.7.1", None),
        ("3.10.0", None),
        (None, None),
    ],
)
def test_blackwell_before_the_barrier(
    installed: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_choice, "_triton_version", lambda: installed)
    monkeypatch.setattr(first_use, "are_right", lambda *_: True)
    for capability in ((9, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(backend_choice, "_compute_capability", lambda index, found=capability: found)
        backend_choice._choose.cache_clear()
        with caplog.at_level(logging.INFO, "tritonmoe"):
            chosen = choose("auto", CUDA, torch.bfloat16)
        refused = capability == (10, 3) and reason is not None
        assert chosen is (torch_backend if refused else triton_backend)
        assert choose("triton", CUDA, torch.bfloat16) is triton_backend
    assert (reason or "chose torch") in caplog.text or reason is None


@pytest.mark.parametrize("is_wrong", [False, True])
def test_routers_in_the_interpreter(is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = router_check.route_by_kernels

    def slightly_wrong(*args: object, **keywords: object) -> Routing:
        routing = right(*args, **keywords)
        return replace(routing, scores=routing.scores * 1.1)

    if is_wrong:
        monkeypatch.setattr(router_check, "route_by_kernels", slightly_wrong)
    assert router._are_kernels_right(CPU, torch.float32) is not is_wrong


@pytest.mark.parametrize("are_right", [True, False])
def test_auto_takes_what_is_right(are_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "are_right", lambda *_: are_right)
    assert choose("auto", CUDA, torch.bfloat16) is (triton_backend if are_right else torch_backend)
    assert choose("triton", CUDA, torch.bfloat16) is triton_backend
    if not are_right:
        with pytest.raises(ValueError, match="its kernels are wrong here"):
            choose("auto", CUDA, torch.bfloat16, KernelOptions(batch_invariant=True))


def test_what_a_graph_captures_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be compared then: kernels are taken, and compared at the first call behind it."""
    monkeypatch.setattr(kernel_check, "check_layer", lambda *_: [WRONG])
    monkeypatch.setattr(router, "check_router", lambda *_: [WRONG])
    for captured in (True, False):
        monkeypatch.setattr(first_use, "is_captured", lambda device, captured=captured: captured)
        assert choose("auto", CUDA, torch.bfloat16) is (triton_backend if captured else torch_backend)
        assert router._are_kernels_right(CUDA, torch.bfloat16) is captured


@pytest.mark.parametrize("are_right", [True, False])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_auto_takes_a_router_that_is_right(are_right: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    monkeypatch.setattr(first_use, "are_right", lambda *_: are_right)
    monkeypatch.setattr(router, "is_fused", lambda *_: True)
    monkeypatch.setattr(router, "route_by_torch", lambda *_: ways.append("torch"))
    monkeypatch.setattr(router, "route_by_kernels", lambda *_: ways.append("triton"))
    router.TopKRouter(MoEConfig(8, 8, 4, 2), backend=backend)(torch.ones(3, 8))
    assert ways == ["triton" if are_right or backend == "triton" else "torch"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert backend_choice._are_experts_right(CUDA, dtype)
        assert router._are_kernels_right(CUDA, dtype)
