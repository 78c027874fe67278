"""Every kernel compiles for every target, without a GPU: no spills, within its limits, with its matrix instruction."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget

from bench.codegen import source_hash
from bench.readme.kernel_tables import NUMBERS, compiled_for
from bench.readme.results import ROOT, load
from tritonmoe.config.formats import FORMATS
from tritonmoe.ops.aot import ARCHITECTURES, OTHER_ARCHITECTURES, Compiled, architecture_named
from tritonmoe.ops.aot.compilation import doubt_of
from tritonmoe.ops.aot.machine_code import read_amd
from tritonmoe.ops.kernels import launch

RESULTS = Path(__file__).parents[3] / "bench" / "results"
MODULE = [sys.executable, "-m", "tritonmoe.ops.aot"]
BY_TMA = {
    "up up": 1,
    "up inference up": 1,
    "down grouped_matmul": 2,
    "down_grad down_grad": 1,
    "up_grad grouped_matmul": 2,
    "weight_grad W1 outer_sums": 1,
    "weight_grad W2 outer_sums": 1,
}
"""Kernels that read operands by TMA, and how many."""
REGISTERS_BY_TMA = {"sm_90": 208, "sm_100": 176, "sm_120": 200}
if launch.TRITON_VERSION < (3, 7):
    REGISTERS_BY_TMA = {"sm_90": 242, "sm_100": 177}
"""What a thread of up may use where both its operands come by TMA: no addresses of rows."""
ROUTER_REGISTERS = {
    "router row_products": 176,
    "router choose_experts": 112,
    "router_grad choice_grad": 112,
    "router_grad with losses choice_grad": 128,
    "router_grad row_products": 176,
    "router_grad sums_over_rows": 176 if launch.TRITON_VERSION >= (3, 7) else 192,
}
"""What a thread of the router's kernels may use, on any target. Products have 4 or 8 warps in a program, choices 1: so
two programs and eight fit at least, which hide each other's loads."""
ISSUE_LIMIT = 0.5
"""What a step's instructions may take of the cycles of its products on sm_90."""
ONE_TILE = "bf16 one tile a program"
TMA_TARGETS = (
    "sm_90",
    "sm_100",
    *(["sm_120"] if launch.TRITON_VERSION >= (3, 7) else []),
)
WAITS_FOR_POINTERS = launch.TRITON_VERSION < (3, 7, 1)
"""Whether Blackwell loads nothing asynchronously that comes through pointers."""


@pytest.mark.thorough
def test_interpreter_cannot_compile():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(MODULE, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


def is_in_the_table() -> bool:
    """Return whether the committed table says of this Triton and of these kernels that all are fit on all targets."""
    table = json.loads((RESULTS / "codegen.json").read_text())
    same_kernels = table["source_hash"] == source_hash() and not table["unfit"]
    return same_kernels and triton.__version__ in table["triton_versions"]


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(["sm_90"] if is_in_the_table() else ARCHITECTURES, marks=pytest.mark.thorough),
        pytest.param(ARCHITECTURES, marks=pytest.mark.slow),
    ],
    ids=["what the table doesn't say", "all targets"],
)
def test_kernels_compile_and_fit(targets, tmp_path):
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [*MODULE, "--json", "--targets", *targets]
    if targets is not ARCHITECTURES:  # the table says that the other kernels are fit
        command += ["--kernels", *BY_TMA, *ROUTER_REGISTERS, "up inference gather_rows"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    compiled = json.loads(result.stdout)
    assert {item["target"] for item in compiled} == set(targets)
    assert all(item["registers"] > 0 and item["occupancy"] > 0 for item in compiled)
    for operation in ("up", "down", "down_grad", "up_grad", "weight_grad W1", "weight_grad W2"):
        for target, matrix in (("sm_90", "wgmma"), ("sm_100", "tcgen05")):
            if target not in targets:
                continue
            loops = [
                item["loop"]
                for item in compiled
                if item["kernel"].startswith(f"{operation} ") and item["target"] == target and item["matrix"] == matrix
            ]
            assert loops, f"{operation} on {target}"
            assert all(0 < loop[matrix] < loop["all"] for loop in loops)
    by_key = {(item["variant"], item["kernel"], item["target"]): item for item in compiled}
    for kernel, tma_operands in BY_TMA.items():
        for target in targets:
            if target == "sm_120" and target not in TMA_TARGETS:
                continue
            by_tma, pointers = (by_key.get((variant, kernel, target)) for variant in ("bf16", "bf16 pointers"))
            assert by_tma is not None
            if target in TMA_TARGETS:
                # As many matrix instructions: the same sums, so a row's bits don't depend on how tiles are read.
                assert pointers is not None
                assert by_tma["tma_operands"] == by_tma["loop"]["TMA"] == tma_operands
                assert pointers["tma_operands"] == 0
                assert by_tma["loop"][by_tma["matrix"]] == pointers["loop"][by_tma["matrix"]]
            else:
                assert pointers is None, "compiled twice"
                assert by_tma["tma_operands"] == 0
    for kernel in BY_TMA:
        for target in targets:
            persistent, one_tile = (by_key.get((variant, kernel, target)) for variant in ("bf16", ONE_TILE))
            reads_all = BY_TMA[kernel] == 2
            walks = target == "sm_90" or (target == "sm_100" and (reads_all or not WAITS_FOR_POINTERS))
            walks = walks and not kernel.startswith("weight_grad")
            assert (one_tile is not None) is walks, "compiled twice, or not at all"
            if one_tile is not None:
                # One loop over all tiles of a program: the next one's loads are under way while one is stored.
                assert "store" in persistent["loop"]
                assert "store" not in one_tile["loop"]
                assert persistent["loop"][persistent["matrix"]] == one_tile["loop"][one_tile["matrix"]]
    for kernel in BY_TMA:
        step = by_key["bf16", kernel, "sm_90"]["step"]
        assert step["products_in_flight"] == 1, kernel
        assert step["issue_slots"] <= ISSUE_LIMIT * step["matrix_cycles"], kernel
    for kernel, registers in ROUTER_REGISTERS.items():
        for target in targets:
            found = by_key["bf16", kernel, target]
            assert found["registers"] <= registers
            # where the sums have 8 warps, they take more than 128 registers with Triton 3.6
            takes_more = kernel.endswith("sums_over_rows") and launch.TRITON_VERSION < (3, 7)
            assert found["occupancy"] >= (8 if not found["matrix"] else 1 if takes_more else 2)
    gathered_by_tma = [target for target in TMA_TARGETS if target != "sm_90"]
    for variant, made_for in (("bf16 gathered by TMA", gathered_by_tma), ("bf16 rows copied", ("sm_90", "sm_100"))):
        for target in targets:
            for kernel in ("up up", "up inference up"):
                found = by_key.get((variant, kernel, target))
                assert (found is not None) is (target in made_for), "compiled twice, or not at all"
                if found is not None:
                    assert found["tma_operands"] == 2
                    waits = target == "sm_100" and WAITS_FOR_POINTERS
                    assert ("cp.async" in by_key["bf16", kernel, target]["loop"]) is not waits
                    assert "cp.async" not in found["loop"], "rows through pointers"
                    assert found["registers"] <= REGISTERS_BY_TMA[target]
                    matrix = found["matrix"]
                    assert found["loop"][matrix] == by_key["bf16", kernel, target]["loop"][matrix]
            copies = (variant, "up inference gather_rows", target) in by_key
            assert copies is (variant == "bf16 rows copied" and target in made_for)


@pytest.mark.slow
def test_codes_are_multiplied_by_8_bit_instructions(tmp_path):
    """In tiles of 64 rows and more; nothing spills, and shared memory has the tiles as they are."""
    precisions = {name: gpu.precisions for name, gpu in (ARCHITECTURES | OTHER_ARCHITECTURES).items() if gpu.precisions}
    assert precisions.keys() == {"sm_89", "sm_90", "sm_100", "sm_120", "gfx950"}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [*MODULE, "--json", "--variants", "fp8_block", "mxfp8", "--targets", *precisions]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    products = [item for item in json.loads(result.stdout) if item["expected_matrix"]]
    assert {(item["variant"], item["target"]) for item in products} == {
        (name, target) for target, names in precisions.items() for name in names
    }
    for item in products:
        assert item["matrix"] == item["expected_matrix"], item
        assert item["matrix"].endswith(" e4m3")
        assert item["spills"] == 0
    assert {item["kernel"].split()[-1] for item in products} == {"up", "grouped_matmul", "down_grad"}


@pytest.mark.thorough
def test_packed_weights_are_decoded_to_shared_memory(tmp_path):
    """Their bytes come asynchronously, and what they become is stored where the matrix instruction reads it."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    pairs = [(one, operation) for one in FORMATS for operation in ("down", "up_grad")]
    if is_in_the_table():  # all are fit: each format and each of both directions
        pairs = [*zip(FORMATS, ("down", "up_grad", "down"), strict=True)]
    kernels = [f"{operation} of {one} grouped_matmul" for one, operation in pairs]
    command = [*MODULE, "--json", "--variants", *FORMATS, "--targets", "sm_90", "gfx942", "--kernels", *kernels]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    compiled = json.loads(result.stdout)
    assert {(item["kernel"], item["target"]) for item in compiled} == {
        (kernel, target) for kernel in kernels for target in ("sm_90", "gfx942")
    }
    for item in compiled:
        assert item["matrix"] == item["expected_matrix"]
        assert item["spills"] == 0
        assert item["loop"]["shared"] > 0
        if item["target"] == "sm_90":
            assert item["loop"]["cp.async"] > 0
            assert item["doubt"] == "", "a wgmma reads what was decoded from registers"


COMPILE_ACTIVATIONS = """
from tritonmoe.ops.aot.compilation import compile_one
from tritonmoe.ops.aot import ARCHITECTURES, Variant, record_launches
from tritonmoe.config.activations import POINTWISE, ClampedSwiGLU, SoftcappedSwiGLU

for activation in (*POINTWISE, ClampedSwiGLU(7.0, 1.702, 1.0), SoftcappedSwiGLU(4.0, 25.0)):
    launches = record_launches(Variant(activation=activation), ARCHITECTURES["sm_90"].target)
    for kernel in ("up up", "down_grad down_grad"):
        print(kernel, activation, compile_one("", kernel, launches[kernel], "sm_90").problem, sep=": ")
"""


@(pytest.mark.slow if is_in_the_table() else pytest.mark.thorough)
def test_every_activation_compiles_and_fits(tmp_path):
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE_ACTIVATIONS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 14
    assert [line for line in lines if not line.endswith(": ")] == []


@pytest.mark.parametrize(
    ("target", "registers", "shared_kb", "num_warps", "programs"),
    [
        ("sm_90", 128, 0, 8, 2),  # 16 warps of 128 registers
        ("sm_90", 129, 0, 8, 1),  # registers are given out in eights
        ("sm_90", 168, 100, 4, 2),  # 12 warps, but 101 KB of 228 each
        ("sm_90", 16, 0, 4, 16),  # 64 warps
        ("sm_90", 255, 228, 8, 0),
        ("sm_120", 16, 0, 4, 12),  # 48 warps
        ("gfx942", 128, 32, 8, 2),
        ("gfx942", 256, 64, 4, 1),
        ("gfx950", 256, 64, 4, 2),
    ],
)
def test_occupancy(target, registers, shared_kb, num_warps, programs):
    assert ARCHITECTURES[target].occupancy(registers, shared_kb * 1024, num_warps) == programs


def test_tensor_memory_limits_occupancy():
    assert ARCHITECTURES["sm_100"].occupancy(64, 1024, 4) == 8
    assert ARCHITECTURES["sm_100"].occupancy(64, 1024, 4, tensor_memory_columns=256) == 2


AMD_ASSEMBLY = """
_kernel:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
.LBB0_1:
\tglobal_load_dwordx4 v[0:3], v[4:5], off
.LBB0_2:
\tds_read_b128 v[0:3], v4
\ts_barrier
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_scc1 .LBB0_2
\tglobal_store_dwordx4 v[4:5], v[0:3], off
\ts_cbranch_vccnz .LBB0_1
    .max_flat_workgroup_size: 512
    .vgpr_count:     118
    .vgpr_spill_count: 3
    .wavefront_size: 64
"""


def test_the_innermost_loop_is_counted():
    code = read_amd(AMD_ASSEMBLY)
    assert (code.registers, code.spills, code.num_warps, code.matrix) == (118, 3, 8, "mfma")
    assert code.loop == {"all": 4, "mfma": 1, "shared": 1, "barrier": 1}
    assert code.step == {"instructions": 4, "barriers": 1}


ENTERED_INSIDE = """
_kernel:
\ts_branch .LBB0_2
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_scc0 .LBB0_3
.LBB0_2:
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\ts_branch .LBB0_1
.LBB0_3:
\tglobal_store_dwordx4 v[4:5], v[0:3], off
\ts_endpgm
"""


def test_a_loop_that_begins_in_its_middle():
    code = read_amd(ENTERED_INSIDE + AMD_ASSEMBLY[AMD_ASSEMBLY.index("    .max_flat") :])
    assert code.loop == {"all": 4, "mfma": 1, "load": 1}
    assert code.step == {"instructions": 4, "barriers": 0}


PERSISTENT = """
_kernel:
\ts_cbranch_scc1 .LBB0_4
.LBB0_1:
\tv_add_u32 v0, v0, v1
\ts_cbranch_scc0 .LBB0_2
\ts_barrier
\ts_barrier
\tv_add_u32 v0, v0, v1
.LBB0_2:
\ts_cbranch_scc1 .LBB0_5
.LBB0_6:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_barrier
\ts_cbranch_scc0 .LBB0_3
\tglobal_store_dwordx4 v[4:5], v[0:3], off
.LBB0_3:
\ts_cbranch_scc1 .LBB0_1
.LBB0_4:
\ts_endpgm
.LBB0_5:
\ts_sleep 1
\ts_cbranch_scc1 .LBB0_5
\ts_branch .LBB0_6
    .max_flat_workgroup_size: 512
    .vgpr_count:     118
    .vgpr_spill_count: 0
    .wavefront_size: 64
"""


def test_a_step_of_a_persistent_loop_has_neither_a_tiles_beginning_nor_its_end():
    """Nor is the branch back from a wait behind the kernel's end taken for a shorter loop."""
    code = read_amd(PERSISTENT)
    assert code.loop == {"all": 11, "mfma": 1, "store": 1, "barrier": 3}
    assert code.step == {"instructions": 7, "barriers": 1}


def test_a_step_passes_the_matrix_instruction():
    """Though a shorter way through the loop leaves it out."""
    code = read_amd(PERSISTENT.replace("scc0 .LBB0_2", "scc0 .LBB0_3"))
    assert code.step == {"instructions": 10, "barriers": 3}


@pytest.mark.parametrize(
    ("measured", "problem"),
    [
        ({}, ""),
        ({"spills": 16}, ""),
        ({"spills": 24}, "spills 24 bytes"),
        ({"spills": 8, "looped_spills": 2}, "spills in a loop: 2 loads and stores of 8 bytes"),
        ({"target": "gfx942", "expected_matrix": "", "spills": 1}, "spills 1 registers"),
        ({"shared_bytes": 228 * 1024}, "needs 233472 bytes of shared memory, there are 232448"),
        ({"occupancy": 0}, "no program fits: 128 registers, 8 warps"),
        ({"matrix": "mma.sync"}, "its loop has mma.sync, not wgmma"),
        ({"matrix": ""}, "its loop has no matrix instruction, not wgmma"),
        ({"tma_operands": 2, "loop": {"wgmma": 4, "TMA": 1}}, "its loop has 1 TMA loads for 2 descriptors"),
        ({"error": "PTXASError: no"}, "PTXASError: no"),
    ],
)
def test_what_is_unfit(measured, problem):
    fit = {"registers": 128, "num_warps": 8, "occupancy": 1, "matrix": "wgmma", "expected_matrix": "wgmma"}
    assert Compiled("bf16", "up", **({"target": "sm_90"} | fit | measured)).problem == problem


@pytest.mark.parametrize(
    ("name", "like", "target"),
    [
        ("sm_90", "sm_90", GPUTarget("cuda", 90, 32)),
        ("sm_87", "sm_86", GPUTarget("cuda", 87, 32)),
        ("sm_103", "sm_100", GPUTarget("cuda", 103, 32)),
        ("sm_121", "sm_120", GPUTarget("cuda", 121, 32)),
        ("gfx90a", "gfx90a", GPUTarget("hip", "gfx90a", 64)),
        ("gfx908", "gfx90a", GPUTarget("hip", "gfx908", 64)),
    ],
)
def test_a_card_that_is_not_listed_has_what_its_family_has(name, like, target):
    found = architecture_named(name)
    assert found.target == target
    assert vars(replace(found, name=like)) == vars(architecture_named(like))


def test_cards_that_nobody_knows():
    assert architecture_named("gfx1100").target == GPUTarget("hip", "gfx1100", 32)
    for name in ("sm_75", "sm_90a", "90", "gfx803", ""):
        with pytest.raises(ValueError, match=f"a target must be one of sm_80, .*, got '{name}'"):
            architecture_named(name)


@pytest.mark.parametrize("ptxas", ["12.8", "12.9", "13.0", "13.2", "13.3", "14.0"])
def test_wgmma_of_registers_needs_a_ptxas_that_keeps_them(ptxas):
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    of_memory = f"\t{product} {{%r1,%r2,%r3,%r4}}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    of_registers = f"\t{product} {{%r1,%r2,%r3,%r4}}, {{%r5,%r6,%r7,%r8}}, %rd2, %p1, 1, 1, 0;"
    assert doubt_of(of_memory, ptxas) == ""
    doubt = doubt_of(f"{of_memory}\n{of_registers}", ptxas)
    assert bool(doubt) == (ptxas not in ("13.3", "14.0"))
    assert Compiled("", "up up", "sm_90", occupancy=1, doubt=doubt).problem == doubt


def test_pages_count_the_kinds_of_gpu_as_the_code_does() -> None:
    """Kernels are compiled for all kinds, whole layers for some of them; every page says the same numbers."""
    whole, others = len(ARCHITECTURES), len(OTHER_ARCHITECTURES)
    assert len(compiled_for(load("codegen"))) == whole + others
    every, six, three = (NUMBERS[number] for number in (whole + others, whole, others))
    said = {
        "README.md": (
            f"kernels compiled for {every} kinds of GPU |",
            f"{every} kinds of GPU, and tested without hardware on {six},",
        ),
        "docs/index.md": (f"kernels compiled for {every} kinds of GPU |",),
        "docs/kernels.md": (f"size for {six} kinds of GPU", f"four of the {six} targets", f"all {six} targets"),
        "CONTRIBUTING.md": (f"for {six} kinds of GPU", f"variants for {three} more"),
        "virtual_gpu/README.md": (f"for {every} kinds of GPU", f"{six} of them", f"four of the {six}"),
    }
    for page, words in said.items():
        text = " ".join((ROOT / page).read_text().split())
        assert [word for word in words if word not in text] == [], page
        assert re.findall(r"\w+ GPUs that need not be there|compiled for \w+ GPUs", text) == [], page
