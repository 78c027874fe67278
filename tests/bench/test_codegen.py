"""python -m bench.codegen: one Triton after another in a process of its own, and a hash of what was compiled."""

import json
import sys
from pathlib import Path

import pytest

from bench import codegen
from tritonmoe.ops import aot
from tritonmoe.ops.aot import ARCHITECTURES
from tritonmoe.ops.aot.compilation import FEW_BYTES


@pytest.fixture
def no_compiling(monkeypatch):
    """Take the compiler's and pip's place: remember commands, give one row. Triton 9.9 is installed."""
    monkeypatch.setattr(codegen.importlib.metadata, "version", lambda package: "9.9")
    commands = []
    row = {"variant": "odd", "kernel": "up up", "target": "sm_90", "registers": 9, "occupancy": 2, "problem": ""}

    class Done:
        returncode = 0
        stdout = json.dumps([row])

    def run(command, env=None, **kwargs):
        if command[1:3] == ["-m", "pip"]:
            (Path(command[command.index("--target") + 1]) / "triton").mkdir(parents=True)
        commands.append((command, env))
        return Done()

    monkeypatch.setattr(codegen.subprocess, "run", run)
    return commands, row, Done


def run(tmp_path, *arguments):
    return codegen.main(["--overlays", str(tmp_path / "tritons"), "--json", str(tmp_path / "table.json"), *arguments])


def test_both_tritons_are_in_the_table(tmp_path, no_compiling):
    commands, _, _ = no_compiling
    assert run(tmp_path, "--triton-versions", "3.6.0", "9.9") == 0
    (pip, _), (older, older_environment), (newest, newest_environment) = commands
    assert pip[-1] == "triton==3.6.0"
    assert older == newest == [sys.executable, "-m", "tritonmoe.ops.aot", "--json", "--workers", "2", "--all"]
    assert older_environment["PYTHONPATH"].startswith(str(tmp_path / "tritons" / "3.6.0"))
    assert str(tmp_path) not in newest_environment["PYTHONPATH"]
    assert "TRITON_INTERPRET" not in older_environment | newest_environment
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["source_hash"] == codegen.source_hash()
    (row,) = table["results"]
    assert list(row["worst"]) == table["triton_versions"] == ["3.6.0", "9.9"]


def test_the_table_has_the_worst_of_each_kernel_and_rows_are_kept_on_demand(tmp_path, no_compiling):
    _, row, done = no_compiling
    others = [row | {"registers": 8, "occupancy": 1, "spills": 4}, row | {"error": "no"}, row | {"kernel": "down"}]
    unfit = row | {"target": "sm_80", "problem": "spills 99 bytes"}
    done.stdout = json.dumps([row, *others, unfit])
    rows_file = tmp_path / "rows.json"
    assert run(tmp_path, "--triton-versions", "9.9", "--rows", str(rows_file)) == 1
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["figures"] == ["registers", "spills", "shared_bytes", "occupancy"]
    assert [table[name] for name in ("num_kernels", "num_variants", "num_spilling")] == [5, 1, 1]
    assert [row["problem"] for row in table["unfit"]] == ["spills 99 bytes"]
    assert table["results"] == [
        {"kernel": "up up", "num_kernels": 4, "worst": {"9.9": {"sm_90": [9, 4, 0, 1], "sm_80": [9, 0, 0, 2]}}},
        {"kernel": "down", "num_kernels": 1, "worst": {"9.9": {"sm_90": [9, 0, 0, 2]}}},
    ]
    rows = json.loads(rows_file.read_text())
    assert rows["source_hash"] == table["source_hash"]
    assert len(rows["results"]) == 5
    assert "spills" not in rows["results"][0]


def test_steps_are_a_table_of_their_own(tmp_path, no_compiling):
    commands, row, done = no_compiling
    done.stdout = json.dumps([row | {"step": {"instructions": 9, "barriers": 0}, "loop": {"all": 12}}])
    assert run(tmp_path, "--triton-versions", "9.9", "--steps") == 0
    ((command, _),) = commands
    assert command[command.index("--variants") :] == [
        "--variants",
        codegen.STEP_VARIANT,
        *codegen.STEP_FORMATS,
        "--kernels",
        *codegen.STEP_KERNELS,
        *codegen.PACKED_STEP_KERNELS,
    ]
    (written,) = json.loads((tmp_path / "table.json").read_text())["results"]
    where = {"triton": "9.9", "kernel": "up up", "target": "sm_90"}
    assert written == where | {"instructions": 9, "barriers": 0, "loop_instructions": 12}
    done.stdout = json.dumps([row | {"variant": codegen.STEP_VARIANT, "loop": {"all": 12}}])
    assert run(tmp_path, "--triton-versions", "9.9") == 0
    (written,) = json.loads((tmp_path / "table.json").read_text())["results"]
    assert written["loops"] == {"9.9": {"sm_90": 12}}


def test_a_triton_that_pip_does_not_find(tmp_path, monkeypatch, capsys):
    def fails(command, **options):
        raise codegen.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(codegen.subprocess, "run", fails)
    assert run(tmp_path, "--triton-versions", "0.0") == 2
    assert "Triton 0.0 could not be installed into" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


def test_a_downloaded_triton_is_kept(tmp_path, no_compiling):
    commands, _, _ = no_compiling
    for _ in range(2):
        assert run(tmp_path, "--triton-versions", "3.6.0") == 0
    assert sum(command[1:3] == ["-m", "pip"] for command, _ in commands) == 1


def test_an_unfit_kernel_and_a_compiler_that_fails(tmp_path, no_compiling):
    _, row, done = no_compiling
    done.stdout = json.dumps([row | {"problem": "spills 8 bytes"}])
    done.returncode = 1
    assert run(tmp_path, "--triton-versions", "3.6.0") == 1
    assert (tmp_path / "table.json").exists()
    (tmp_path / "table.json").unlink()
    done.returncode, done.stdout = 2, ""
    assert run(tmp_path, "--triton-versions", "3.6.0") == 2
    assert not (tmp_path / "table.json").exists()


def test_the_hash_follows_the_kernels(tmp_path, monkeypatch):
    for name in ("ops/aot/launches.py", "ops/aot/variants.py", "ops/backends/triton.py", "ops/kernels/up.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one\n")
    monkeypatch.setattr(codegen, "ROOT", tmp_path)
    seen = {codegen.source_hash()}
    for name in ("ops/kernels/up.py", "ops/aot/launches.py", "ops/aot/variants.py", "ops/backends/triton.py"):
        (tmp_path / name).write_text("two\n")
        seen.add(codegen.source_hash())
    (tmp_path / "ops/kernels/new.py").write_text("")
    seen.add(codegen.source_hash())
    (tmp_path / "ops/aot/machine_code.py").write_text("reads what came out\n")
    assert len(seen) == 6
    assert codegen.source_hash() in seen


@pytest.mark.parametrize(
    ("file", "command"), [(codegen.RESULT, "codegen"), (codegen.STEPS, "codegen --steps")], ids=["all", "steps"]
)
def test_the_committed_table_is_of_these_sources(file, command):
    table = json.loads((codegen.ROOT.parent / file).read_text())
    assert table["source_hash"] == codegen.source_hash(), f"stale: run python -m bench.{command}"
    assert len(table["triton_versions"]) == 2
    versions = {version for row in table["results"] for version in row.get("worst", {row.get("triton"): None})}
    assert versions == set(table["triton_versions"])


def test_the_committed_table_is_of_the_kernels_that_its_hash_says():
    """A hash that was written without compiling shows where the two tables hold the same loops."""
    rows = json.loads((codegen.ROOT.parent / codegen.RESULT).read_text())["results"]
    steps = json.loads((codegen.ROOT.parent / codegen.STEPS).read_text())["results"]
    loops = {
        (version, row["kernel"], target): loop
        for row in rows
        for version, by_target in row.get("loops", {}).items()
        for target, loop in by_target.items()
    }
    assert loops == {
        (row["triton"], row["kernel"], row["target"]): row["loop_instructions"]
        for row in steps
        if row["kernel"] in codegen.STEP_KERNELS
    }
    recorded = aot.record_launches(aot.VARIANTS[codegen.STEP_VARIANT], ARCHITECTURES["sm_90"].target)
    assert {kernel.split()[-1] for kernel in recorded} <= {row["kernel"].split()[-1] for row in rows}


def test_every_kernel_of_the_committed_table_is_fit():
    table = json.loads((codegen.ROOT.parent / codegen.RESULT).read_text())
    assert table["unfit"] == []
    assert table["figures"] == list(codegen.FIGURES)
    for row in table["results"]:
        for by_target in row["worst"].values():
            for _, spills, _, occupancy in by_target.values():
                assert spills <= FEW_BYTES, row["kernel"]
                assert occupancy >= 1, row["kernel"]


ISSUE_LIMITS = {"sm_80": 0.55, "sm_90": 0.5, "sm_100": 1.3, "sm_120": 0.3}
"""What a step's instructions may take of the cycles of its products, in one scheduler."""


def test_steps_of_the_committed_table_keep_their_limits():
    """Issuing leaves room between matrix instructions, and wgmma runs on while the next step is prepared."""
    rows = json.loads((codegen.ROOT.parent / codegen.STEPS).read_text())["results"]
    rows = [row for row in rows if row["kernel"] in codegen.STEP_KERNELS]
    assert len(rows) == 2 * len(ARCHITECTURES) * len(codegen.STEP_KERNELS)
    for row in rows:
        limit = ISSUE_LIMITS.get(row["target"])
        assert (limit is None) == ("issue_slots" not in row)
        if limit is not None:
            assert row["issue_slots"] <= limit * row["matrix_cycles"], row
        assert row.get("products_in_flight", 1) == 1, row
        assert ("products_in_flight" in row) == (row["target"] == "sm_90")
        assert row["barriers"] <= 8, row


DECODING_LIMITS = {"mxfp4": (15, 21), "fp8": (15, 27), "nf4": (24, 38)}
"""Instructions of a thread for each value of a tile that it decodes, all those of a step among them: of NVIDIA's 256
threads, and of AMD's 512."""


def test_decoding_keeps_its_limits():
    table = json.loads((codegen.ROOT.parent / codegen.STEPS).read_text())
    rows = [row for row in table["results"] if row["kernel"] in codegen.PACKED_STEP_KERNELS]
    assert len(rows) == 2 * len(ARCHITECTURES) * len(codegen.PACKED_STEP_KERNELS)
    for row in rows:
        is_amd = row["target"].startswith("gfx")
        values = row["columns"] * row["depth"] / (512 if is_amd else 256)
        assert row["instructions"] <= DECODING_LIMITS[row["kernel"].split()[2]][is_amd] * values, row
        assert row["barriers"] <= 10, row
