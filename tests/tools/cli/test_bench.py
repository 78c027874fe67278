"""`tritonmoe bench` where a benchmark's packages are missing, or its ranks."""

import sys

import pytest
import torch.distributed

from tritonmoe.errors import TransportError
from tritonmoe.tools import benchmarks
from tritonmoe.tools.benchmarks import overlap
from tritonmoe.tools.cli import bench, main


@pytest.mark.parametrize("name", ["transformers"])
def test_transformers_is_missing(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    # As in a process that has not loaded them yet.
    for module in [module for module in sys.modules if module.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, f"{benchmarks.__name__}.{name}", raising=False)
    assert main(["bench", name, "--rounds", "1"]) == 2
    assert capsys.readouterr().err.endswith(
        f"tritonmoe bench {name} needs transformers: pip install 'tritonmoe[bench]'\n"
    )


def test_a_module_of_ours_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load", lambda name: __import__("tritonmoe.nothing"))
    with pytest.raises(ModuleNotFoundError, match=r"tritonmoe\.nothing"):
        main(["bench", "overlap"])


def test_a_peer_is_missing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fails(*given: object, **named: object) -> None:
        raise TransportError("rank 1 did not come")

    monkeypatch.setattr(overlap, "measure_rank", fails)
    assert main(["bench", "overlap", "--emulate", "2", "--model", "tiny"]) == 1
    assert capsys.readouterr().err == "tritonmoe bench overlap: TransportError: rank 1 did not come\n"


def test_one_rank_is_not_enough(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Under torchrun and mpiexec, where their number is no argument."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        assert main(["bench", "overlap"]) == 2
    finally:
        if torch.distributed.is_initialized():  # it is left for the process to end
            torch.distributed.destroy_process_group()
    assert "ranks must be 2 or more and divide the 8 experts of coarse, got 1" in capsys.readouterr().err
