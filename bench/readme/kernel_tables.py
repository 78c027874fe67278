"""Tables of kernels and of moe_mlp: compiled code, times on a CPU, bounds."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from bench.codegen import PACKED_STEP_KERNELS, STEP_KERNELS
from bench.launch import NUM_EXPERTS, NUM_TOKENS, PEER_EXPERTS, PEER_TOKENS, PEER_TOP_K, TOP_K
from bench.readme.results import RESULTS, load, spread, table_head, table_row, where
from tritonmoe.ops import aot
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.tools.benchmarks.roofline import kernel_work, product_flops
from tritonmoe.tools.benchmarks.shapes import GPU_SHAPES
from tritonmoe.tools.planner.cluster_presets import CLUSTERS

__all__ = [
    "NUMBERS",
    "bounds_table",
    "codegen_epilogues_table",
    "codegen_packed_table",
    "codegen_steps_table",
    "codegen_table",
    "compiled_for",
    "conformance_table",
    "decoding_table",
    "launch_parts_table",
    "launch_table",
    "moe_mlp_table",
    "tile_runs_code_table",
    "tile_runs_table",
]


def moe_mlp_table(name: str) -> str:
    data = load(name)
    has_dense = all("dense" in case for case in data["results"])  # measured since the bench has it
    lines = [
        f"`python -m bench.moe_mlp` on {where(data['environment'])}. Milliseconds, median (quartiles) of "
        f"{data['results'][0]['times']['tritonmoe']['samples']} interleaved rounds in "
        "three placements of the tensors; ratio is the best other implementation's time over ours"
        f"{', and dense that of dense products of the same FLOPs' * has_dense}.",
        "",
        *table_head(
            *("E, K, D, F", "T", "dtype", "pass", "tritonmoe", "best of transformers", "ratio"), *["dense"] * has_dense
        ),
    ]
    for case in data["results"]:
        best = case["best_other"]
        lines.append(
            f"| {', '.join(map(str, case['E_K_D_F']))} | {case['T']} | {case['dtype']} | {case['pass']} | "
            f"{spread(case['times']['tritonmoe'])} | {best} {spread(case['times'][best])} | {case['ratio']:.2f} |"
            + (f" {case['dense']:.2f} |" if has_dense else "")
        )
    return "\n".join(lines)


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
"""Small numbers in words."""


def compiled_for(codegen: dict) -> list[str]:
    """Return the kinds of GPU that the results of bench.codegen have compiled kernels for."""
    by_target = (worst for row in codegen["results"] for worst in row["worst"].values())
    return sorted({target for worst in by_target for target in worst})


def codegen_table(name: str) -> str:
    """Return the worst of each kernel under the newest Triton, below a sentence that counts all of them."""
    if not (RESULTS / f"{name}.json").exists():
        return "`python -m bench.codegen`: not run yet."
    data = load(name)
    *older, newest = data["triton_versions"]
    shown = [row for row in data["results"] if newest in row["worst"]]
    targets = list(dict.fromkeys(target for row in shown for target in row["worst"][newest]))
    most_spilled = max(
        figures[data["figures"].index("spills")]
        for row in data["results"]
        for by_target in row["worst"].values()
        for figures in by_target.values()
    )
    *others, last = aot.OTHER_ARCHITECTURES
    lines = [
        f"`python -m bench.codegen` with Triton {' and '.join([*older, newest])}: {data['num_kernels']} kernels of "
        f"{data['num_variants']} layouts, gates, dtypes, shapes and batch sizes, {len(data['unfit'])} of them unfit (a "
        "spill in a loop or of more than 16 bytes, too much shared memory, a missing matrix instruction). "
        f"For {', '.join(others)} and {last} only the variants of the test suite are compiled. Kernels that spill "
        f"up to {most_spilled} bytes of a thread outside of their loops, so that one more program fits on a "
        "multiprocessor: "
        f"{data['num_spilling']}. The table has the worst variant of each kernel with Triton {newest}. A cell has the "
        "most registers, the most KB of shared memory, and the fewest programs side by side on a multiprocessor.",
        "",
        *table_head("kernel", *targets),
    ]
    for row in shown:
        cells = {target: _codegen_cell(data["figures"], worst) for target, worst in row["worst"][newest].items()}
        lines.append(table_row(row["kernel"], *(cells.get(target, "-") for target in targets)))
    return "\n".join(lines)


def _codegen_cell(names: list[str], worst: list[int]) -> str:
    figures = dict(zip(names, worst, strict=True))
    return f"{figures['registers']}, {figures['shared_bytes'] / 1024:.0f}, {figures['occupancy']}"


def codegen_steps_table(name: str) -> str:
    """Return what a step of each product costs on every target, under both Tritons."""
    data = load(name)
    lines = [
        "`python -m bench.codegen --steps`, Qwen3-30B-A3B in bf16. A step multiplies one piece of the depth; a tile's "
        "beginning and end, which a persistent loop has too, are no part of it. Cells: instructions of a warp (of the "
        "whole persistent loop); on NVIDIA the cycles in which a scheduler issues them, of those that the products "
        "take; barriers; on sm_90 the groups of wgmma that run on behind the wait; and FLOP per byte that a tile reads "
        "from the L2 cache.",
        "",
        *_steps(data, STEP_KERNELS, data["triton_versions"]),
    ]
    return "\n".join(lines)


def codegen_packed_table(name: str) -> str:
    """Return what a step of each product with packed weights costs on every target, under the newest Triton."""
    data = load(name)
    newest = data["triton_versions"][-1]
    lines = [
        f"`python -m bench.codegen --steps` with Triton {newest}, packed weights of gpt-oss (mxfp4), DeepSeek-V3 (fp8) "
        "and Qwen3-30B-A3B (nf4), many rows for each expert. Cells as above, but that bytes of the L2 cache count as "
        "if weights were bf16.",
        "",
        *_steps(data, PACKED_STEP_KERNELS, [newest]),
    ]
    return "\n".join(lines)


def _steps(data: dict, kernels: Iterable[str], versions: Iterable[str]) -> Iterator[str]:
    rows = data["results"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    yield from table_head("kernel, Triton", *targets)
    for kernel, version in itertools.product(kernels, versions):
        cells = {row["target"]: _step_cell(row) for row in rows if (row["kernel"], row["triton"]) == (kernel, version)}
        yield table_row(f"{kernel}, {version}", *(cells[target] for target in targets))


EPILOGUES = ("up up", "down grouped_matmul", "down_grad down_grad", "up_grad grouped_matmul")
"""The products whose programs walk, so that a tile's beginning and end stand in the loop."""


def codegen_epilogues_table(name: str) -> str:
    """Return what a tile's beginning and end cost, in the table `name` and in that of today's kernels."""
    tables = load(name), load("codegen_steps")
    places = [(row["triton"], row["target"]) for row in tables[0]["results"] if row["kernel"] == EPILOGUES[0]]
    around = [
        {
            (row["kernel"], row["triton"], row["target"]): row["loop_instructions"] - row["instructions"]
            for row in table["results"]
        }
        for table in tables
    ]
    lines = [
        f"`python -m bench.codegen --steps`, Qwen3-30B-A3B in bf16, at commit {tables[0]['commit']} and now: "
        "instructions of a warp in the persistent loop that are no part of a step, so a tile's beginning and end, "
        "before and after. A dash: no program walks.",
        "",
        *table_head("kernel", *(f"{target}, {version}" for version, target in places)),
    ]
    for kernel in EPILOGUES:
        pairs = [tuple(one[kernel, version, target] for one in around) for version, target in places]
        cells = (f"{before}, {after}" if before else "-" for before, after in pairs)
        lines.append(table_row(kernel, *cells))
    return "\n".join(lines)


def _step_cell(row: dict) -> str:
    around = row["loop_instructions"]
    cell = [f"{row['instructions']}{f' ({around})' if around > 2 * row['instructions'] else ''}"]
    if "issue_slots" in row:
        cell.append(f"{row['issue_slots'] / row['matrix_cycles']:.0%}")
    cell.append(str(row["barriers"]))
    if "products_in_flight" in row:
        cell.append(f"{row['products_in_flight']} runs on")
    cell.append(f"{2 * row['rows'] * row['columns'] * row['depth'] / row['l2_bytes']:.0f}")
    return ", ".join(cell)


def tile_runs_code_table(name: str) -> str:
    """Return what each way to get tiles makes of the machine code."""
    data = load(name)
    rows = {(row["way"], row["kernel"], row["target"]): row for row in data["code"]}
    ways, kernels, targets = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    lines = [
        f"`python -m bench.tile_runs` with Triton {data['triton']}, Qwen3-30B-A3B in bf16, on "
        f"{' and '.join(targets)}. Cells: instructions of a step, registers of a thread, and whether the next tile is "
        "loaded while one is stored.",
        "",
        *table_head("way to get tiles", *(kernel.split(" ")[0] for kernel in kernels)),
    ]
    for way in ways:
        cells = []
        for kernel in kernels:
            found = [rows[way, kernel, target] for target in targets]
            steps = " and ".join(f"{row['step']}, {row['registers']}" for row in found)
            cells.append(f"{steps}: {'yes' if all(row['stores_in_loop'] for row in found) else 'no'}")
        lines.append(table_row(way, *cells))
    return "\n".join(lines)


def tile_runs_table(name: str) -> str:
    """Return how long the grids take by the model."""
    data = load(name)
    times = {(row["way"], row["start"]): row for row in data["model"]}
    starts = list(dict.fromkeys(start for _, start in times))
    lines = [
        f"A model, no measurement: `python -m bench.tile_runs`, {data['multiprocessors']} multiprocessors, of which an "
        f"exchange holds 0 to 32, all of the time or a part, and 2 to 100 tiles for each, in {data['drawn']} draws. "
        "Cells: the time until the last tile is computed, in that of one tile a program: the mean, and the most.",
        "",
        *table_head("programs have", *(f"starting costs {start:.0%} of a tile" for start in starts)),
    ]
    for way in dict.fromkeys(way for way, _ in times):
        found = [times[way, start] for start in starts]
        lines.append(table_row(way, *(f"{row['mean']:.2f}, {row['most']:.2f}" for row in found)))
    return "\n".join(lines)


def conformance_table(name: str) -> str:
    """Return how many cases are exact with each Triton on each card, those that are not, and what some of them cost."""
    data = load(name)
    versions = data["triton_versions"]
    run = [row for row in data["results"] if "registers" not in row["outcomes"][versions[0]]]
    counts: dict[tuple[str, str], Counter[str]] = {}
    others: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in run:
        for version in versions:
            counts.setdefault((row["card"], version), Counter())[row["outcomes"][version]["outcome"]] += 1
        cells = tuple(_outcome_cell(row["outcomes"][version]) for version in versions)
        if set(cells) != {"exact"}:
            others.setdefault((row["case"], cells), []).append(row["card"])
    lines = [
        f"`python -m bench.conformance`, {len({row['case'] for row in run})} cases. *Exact*: every number equals "
        "float64's. *Fault*: the order of memory or an address is not what the card asks for. *Not known*: the virtual "
        "GPU doesn't know an instruction, so nothing is said of the card.",
        "",
        *table_head("card", *(f"Triton {version}" for version in versions)),
    ]
    for card in dict.fromkeys(row["card"] for row in run):
        found = (sorted(counts[card, version].items()) for version in versions)
        lines.append(table_row(card, *(", ".join(f"{number} {outcome}" for outcome, number in one) for one in found)))
    lines += ["", "The cases that are not exact with all of them:", "", *table_head("case", "card", *versions)]
    lines += [table_row(case, ", ".join(cards), *cells) for (case, cells), cards in others.items()]
    lines += [
        "",
        "Of two cases only the machine code is read. Cells: registers of a thread, what it spills (bytes on NVIDIA, "
        "registers on AMD), instructions of the loop.",
        "",
        *table_head("case", "card", *versions),
    ]
    for row in data["results"]:
        if row not in run:
            costs = (
                [row["outcomes"][version][what] for what in ("registers", "spills", "loop")] for version in versions
            )
            lines.append(table_row(row["case"], row["card"], *(", ".join(map(str, one)) for one in costs)))
    return "\n".join(lines)


def _outcome_cell(found: dict) -> str:
    """Return an outcome, what is wrong, and the instruction that is not known."""
    outcome, detail = found["outcome"], found.get("detail", "")
    if outcome == "not known":
        instruction = re.search(r"doesn't know ([\w.:]+)", detail)
        return f"not known: `{instruction[1]}`" if instruction else "not known"
    return f"{outcome}: {detail.rpartition(': ')[2]}" if outcome in ("wrong", "fault") else outcome


H100 = CLUSTERS["H100"].gpu
BOUND_KERNELS = ("up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad W1", "weight_grad W2")


def bounds_table(num_tokens: str) -> str:
    """Return the times that a GPU's peak rates allow, which needs no measurement."""
    lines = [
        f"T = {num_tokens}, bf16, H100 SXM at its peak of {H100.tflops['bf16']:.0f} TFLOP/s and {H100.memory_tb_per_s} "
        "TB/s (NVIDIA H100 data sheet: 1979 TFLOP/s bf16 with sparsity, half of it dense; 3.35 TB/s). Cells: FLOP per "
        "byte, shortest time in microseconds, and m where memory sets it.",
        "",
        *table_head("shape", *BOUND_KERNELS, "forward", "forward + backward"),
    ]
    for shape in GPU_SHAPES.values():
        work = kernel_work(shape, int(num_tokens))
        cells = [
            f"{work[name].intensity:.0f}, {work[name].seconds(H100) * 1e6:.0f}"
            f"{' m' if work[name].bound(H100) == 'memory' else ''}"
            for name in BOUND_KERNELS
        ]
        forward_s = sum(work[name].seconds(H100) for name in ("group", "up", "down", "gather_sum"))
        both_s = sum(item.seconds(H100) for item in work.values())
        forward, both = (product_flops(shape, int(num_tokens), backward=backward) for backward in (False, True))
        rates = [f"{flops / seconds / 1e12:.0f} TFLOP/s" for flops, seconds in ((forward, forward_s), (both, both_s))]
        lines.append(table_row(shape.name, *cells, *rates))
    return "\n".join(lines)


def decoding_table(target: str) -> str:
    """Return how many programs read the weights for one token, in bf16, which needs no measurement."""
    columns_of = (f"{product}: columns of a tile, programs" for product in ("up", "down"))
    lines = [*table_head(f"one token on {target}", *columns_of)]
    for shape in GPU_SHAPES.values():
        with measured_tiles.using({}):
            launches = aot.record_launches(aot.Variant.of(shape, torch.bfloat16, 1), aot.TARGETS[target])
        cells = [
            f"{launches[kernel].constexprs['BLOCK_N'] * columns}, {launches[kernel].grid[0]}"
            for kernel, columns in (("up inference up", 2 if shape.layout.gated else 1), ("down grouped_matmul", 1))
        ]
        lines.append(table_row(shape.name, *cells))
    return "\n".join(lines)


def launch_table(name: str) -> str:
    data = load(name)
    lines = [*table_head("what", "launches", "us of the host")]
    for row in data["results"]:
        quartiles = f"{row['lower_quartile_us']:.0f} to {row['upper_quartile_us']:.0f}"
        lines.append(f"| {row['what']} | {row['launches'] or '-'} | {row['median_us']:.0f} ({quartiles}) |")
    sizes = f"T={NUM_TOKENS}, E={NUM_EXPERTS}, K={TOP_K}, bf16"
    return "\n".join(
        [
            *lines,
            "",
            f"{sizes}; of transformers' grouped_mm T={PEER_TOKENS}, E={PEER_EXPERTS}, K={PEER_TOP_K}, by PyTorch's CPU "
            f"kernels; a GPU's launches would come on top. Median (quartiles) of {data['results'][0]['samples']} "
            f"slices. `python -m bench.launch`, one thread; {where(data['environment'])}.",
        ]
    )


def launch_parts_table(name: str) -> str:
    data = load(name)
    wholes = [row for row in data["results"] if "parts" in row]
    passes = [row["what"].partition(", ")[2] for row in wholes]
    lines = [*table_head("what", *[f"{name}: {kind}" for name in passes for kind in ("own", "its launches")])]
    parts = [{part["what"]: part for part in row["parts"]} for row in wholes]
    for what in parts[1]:
        counts = [of[what][kind] if what in of else 0 for of in parts for kind in ("own", "launches")]
        lines.append(table_row(what, *[f"{count / 1e3:,.1f}" if count else "-" for count in counts]))
    sums = [sum(part[kind] for part in of.values()) for of in parts for kind in ("own", "launches")]
    lines.append(table_row("all", *[f"{count / 1e3:,.1f}" for count in sums]))
    return "\n".join(
        [
            *lines,
            "",
            "Thousands of instructions of one call of moe_mlp. "
            f"`python -m bench.launch --instructions`, which counts with callgrind; {where(data['environment'])}.",
        ]
    )
