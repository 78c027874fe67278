"""A measured tile that the compiler refuses is left out with a warning, once, and the table's gives the result."""

import logging

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from tritonmoe.ops.kernels import down, down_grad, launch, up, weight_grad
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.tools.benchmarks.shapes import LayerShape, draw_inputs, operation_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")

OPERATIONS = ("up", "down", "down_grad", "up_grad", "weight_grad W1", "weight_grad W2")
PARTS = {"up": up, "down": down, "down_grad": down_grad, "up_grad": down, "weight_grad": weight_grad}
TOO_LARGE = OutOfResources(300_000, 232_448, "shared memory")
REFUSALS = (TOO_LARGE, triton.CompilationError("", None, "x"), RuntimeError("PassManager::run failed"))


@pytest.fixture(scope="module")
def calls():
    inputs = draw_inputs(LayerShape("small", 3, 2, 32, 32), 9, "uniform", torch.float32, torch.device("cpu"))
    with measured_tiles.using({}):
        return operation_calls(inputs, "triton")


@pytest.fixture
def cached(monkeypatch):
    """Take this dictionary for the cache of tiles."""
    entries: dict[str, dict[str, int]] = {}
    monkeypatch.setattr(measured_tiles, "kept", lambda: entries)
    monkeypatch.setattr(measured_tiles, "_left_out", set())
    return entries


def refuse_narrow_tiles(monkeypatch, operation, error):
    """Let launches of an operation with 16 columns a tile raise; give the columns of those that were tried."""
    tried = []

    def launch_or_raise(kernel, grid, *args, **keywords):
        columns = keywords.get("BLOCK_N", keywords.get("BLOCK_Q"))
        tried.append(columns)
        if columns == 16:
            raise error
        launch.launch(kernel, grid, *args, **keywords)

    monkeypatch.setattr(PARTS[operation.split()[0]], "launch", launch_or_raise)
    return tried


def results_of(call):
    found = call()
    return [tensor for tensor in (found if isinstance(found, tuple) else (found,)) if tensor is not None]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_tables_tile_takes_its_place(operation, error, calls, cached, monkeypatch, caplog):
    call = calls[operation]
    with measured_tiles.using({}), measured_tiles.asked() as asked:
        expected = results_of(call)
    (key,) = asked
    cached[key] = {"block_n": 16}
    tried = refuse_narrow_tiles(monkeypatch, operation, error)
    with caplog.at_level(logging.WARNING, "tritonmoe"):
        for _ in range(2):
            for found, right in zip(results_of(call), expected, strict=True):
                assert torch.equal(found, right)
    assert tried.count(16) == 1
    (record,) = caplog.records
    assert f"the measured tile of {key} is left out" in record.getMessage()
    assert "Run `tritonmoe tune` again" in record.getMessage()


def test_other_errors_and_tiles_that_are_tried_are_not_hidden(calls, cached, monkeypatch, caplog):
    with measured_tiles.using({}), measured_tiles.asked() as asked:
        calls["down"]()
    (key,) = asked
    entry = {key: {"block_n": 16}}
    refuse_narrow_tiles(monkeypatch, "down", TOO_LARGE)
    with measured_tiles.using(entry), pytest.raises(OutOfResources):
        calls["down"]()
    cached.update(entry)
    refuse_narrow_tiles(monkeypatch, "down", RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        calls["down"]()
    assert not caplog.records
    assert not measured_tiles._left_out


def test_the_tables_own_tile_is_refused_as_ever(calls, cached, monkeypatch):
    def refuse(*args, **keywords):
        raise TOO_LARGE

    monkeypatch.setattr(down, "launch", refuse)
    with pytest.raises(OutOfResources):
        calls["down"]()
