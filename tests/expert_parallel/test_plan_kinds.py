"""A kind of plan can be deleted: calls of the other kinds then have the same bits, and their tests pass."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritonmoe as tm
from tritonmoe.expert_parallel import run_call
from tritonmoe.expert_parallel.plans import KIND_NAMES, PLAN_KINDS
from tritonmoe.transports import Transport

ROOT = Path(__file__).parent.parent.parent
DELETED = {
    # the folders and files of a kind, what else is made of it alone, and its names elsewhere
    "halves": (
        ["expert_parallel/plans/halves.py", "integrations/transformers/model_halves.py"],
        ["Halves", "HalvedForward", "two_batches"],
    ),
    "copies": (["expert_parallel/plans/copies"], ["Copies"]),
    "bounded": (["expert_parallel/plans/bounded.py"], ["Bounded"]),
}
NAMING = ("__init__.py", "expert_parallel/plans/__init__.py", "integrations/transformers/__init__.py")
"""The files that name a kind beside its own, and are read when the package is imported."""
OTHERS = {
    "halves": ("ranks 2 C3", "ranks 2 copies", "levels C3", "recompute capacity", "replicas C3"),
    "copies": ("ranks 2 C3", "halves C3", "levels C3", "recompute capacity", "replicas C3"),
    "bounded": ("ranks 2 C3", "ranks 2 copies", "halves C3", "recompute capacity", "replicas C3"),
}


def delete(kind: str, root: Path) -> None:
    """Copy the package to root without a kind of plan."""
    package = root / "tritonmoe"
    shutil.copytree(ROOT / "tritonmoe", package, ignore=shutil.ignore_patterns("__pycache__"))
    paths, names = DELETED[kind]
    for path in paths:
        shutil.rmtree(package / path) if (package / path).is_dir() else (package / path).unlink()
    modules = [path.removesuffix(".py").replace("/", ".") for path in paths]
    for path in NAMING:
        text = (package / path).read_text()
        for module in modules:
            text = re.sub(rf"^from tritonmoe\.{re.escape(module)}\S* import .*\n", "", text, flags=re.MULTILINE)
        for name in names:
            text = re.sub(rf'(?m)^    "{name}",\n', "", text)
            text = re.sub(rf"\b{name}, ", "", text)
        (package / path).write_text(text)


def run(*arguments: str, path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    ended = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=path)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", DELETED)
def test_without_a_kind_the_others_are_as_they_were(kind: str, tmp_path: Path) -> None:
    delete(kind, tmp_path)
    record = str(ROOT / "tests" / "support" / "record_bits.py")
    run("-c", f"import tritonmoe; assert tritonmoe.__file__.startswith({str(tmp_path)!r})", path=tmp_path)
    run(record, str(tmp_path / "with.json"), "--only", *OTHERS[kind], path=ROOT)
    run(record, str(tmp_path / "without.json"), "--only", *OTHERS[kind], path=tmp_path)
    with_kind, without = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("with", "without"))
    assert with_kind == without
    assert len(without) >= 8


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.thorough if kind == "copies" else pytest.mark.slow) for kind in DELETED],
)
def test_without_a_kind_the_tests_of_the_others_pass(kind: str, tmp_path: Path) -> None:
    delete(kind, tmp_path)
    tests = str(ROOT / "tests" / "expert_parallel" / "test_expert_parallel.py")
    where = f"pythonpath={tmp_path} {ROOT / 'tests' / 'support'}"
    run("-m", "pytest", "-n", "0", "-q", "-o", where, tests, path=tmp_path)


def test_the_last_kind_takes_what_is_left() -> None:
    assert PLAN_KINDS[-1].name == "plain"
    assert len(set(KIND_NAMES)) == len(PLAN_KINDS)


def test_ranks_that_try_kinds_in_another_order_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks raise before a row moves, and go on."""
    call_header = run_call.call_header

    def reordered(call, kinds):
        return call_header(call, kinds[::-1] if call.transport.rank == 1 and call.sequence == 0 else kinds)

    monkeypatch.setattr(run_call, "call_header", reordered)
    config = tm.MoEConfig(8, 4, num_experts=4, top_k=2)

    def on_rank(transport: Transport) -> None:
        layer = tm.MoELayer(config, transport, tm.OverlapConfig(1))
        with pytest.raises(tm.CountMismatch, match="plan_kinds"):
            layer(torch.ones(3, 8))
        assert layer(torch.ones(3, 8)).shape == (3, 8)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
