"""`tritonmoe check`: right kernels pass, one that is slightly wrong is named, and where there is none it says why."""

import json
import os

import pytest
import torch

from tritonmoe.config.layer import Projection
from tritonmoe.ops.backends import kernel_check, triton
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels import router_kernels as router
from tritonmoe.ops.kernels.gpus import ARCHITECTURES
from tritonmoe.routing import router_check
from tritonmoe.tools.cli import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")


def test_right_kernels(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "Triton's interpreter"
    assert found["wrong"] == 0
    assert {result["operation"].partition(":")[0] for result in found["results"]} == {
        *("group", "up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad", "router")
    }


def test_precisions_without_kernels_of_their_own_are_said(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = ARCHITECTURES["sm_90"]
    monkeypatch.setattr(launch, "gpu_of", lambda device: hopper)
    monkeypatch.setattr(router_check, "SMALL_ROUTERS", ())
    layers = [layer for layer in kernel_check.CASES if layer.precision is not None]
    monkeypatch.setattr(kernel_check, "SMALL_CASES", [one for one in layers if one.precision.format == "mxfp8"])
    assert main(["check"]) == 0
    assert "mxfp8                    no kernels of its own" in capsys.readouterr().out
    assert main(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["emulated_precisions"] == ["mxfp8"]


@pytest.mark.parametrize("operation", [pytest.param("down", marks=pytest.mark.thorough), "up_grad"])
def test_a_wrong_kernel_is_named(
    operation: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(triton, operation)

    def slightly_wrong(*args: object, **keywords: object) -> torch.Tensor:
        result = right(*args, **keywords)
        result[0] *= 1.1
        return result

    monkeypatch.setattr(triton, operation, slightly_wrong)
    monkeypatch.setattr(router_check, "SMALL_ROUTERS", ())
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert f"  {operation}: largest error" in out
    assert "  tiles of interpreter" in out


@pytest.mark.parametrize(
    ("kernel", "result"),
    [
        ("choose_experts", "weights"),
        pytest.param("router_logits", "logits", marks=pytest.mark.thorough),
        pytest.param("tokens_grad", "gradient of x", marks=pytest.mark.thorough),
    ],
)
def test_a_wrong_router_is_named(
    kernel: str, result: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(router, kernel)

    def slightly_wrong(*args: object) -> object:
        found = right(*args)
        (found[-1] if isinstance(found, tuple) else found)[0] *= 1.1
        return found

    monkeypatch.setattr(router, kernel, slightly_wrong)
    monkeypatch.setattr(kernel_check, "SMALL_CASES", ())
    assert main(["check"]) == 1
    assert f"  router: {result}: largest error" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_small_error_of_every_sum_is_wrong(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its largest error is like that of rounding."""
    right = triton.down

    def last_unit_too_small(a: torch.Tensor, projection: Projection, *args: object, **keywords: object) -> torch.Tensor:
        a = a.clone()
        a[:, -1] *= 0.97
        return right(a, projection, *args, **keywords)

    monkeypatch.setattr(router_check, "SMALL_ROUTERS", ())
    monkeypatch.setattr(triton, "down", last_unit_too_small)
    layer = next(layer for layer in kernel_check.SMALL_CASES if layer.dtype == torch.bfloat16)
    monkeypatch.setattr(kernel_check, "SMALL_CASES", (layer,))
    assert main(["check"]) == 1
    assert "  down: root mean square error" in capsys.readouterr().out


@pytest.mark.thorough
def test_results_that_are_not_finite_are_wrong(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton.gather_sum
    monkeypatch.setattr(router_check, "SMALL_ROUTERS", ())
    monkeypatch.setattr(triton, "gather_sum", lambda *args, **keywords: right(*args, **keywords).fill_(float("nan")))
    assert main(["check"]) == 1
    assert "gather_sum: largest error nan" in capsys.readouterr().out


def test_without_kernels(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    assert main(["check"]) == 2
    assert "there are no kernels to check, since tensors are on cpu" in capsys.readouterr().err
