"""`python -m bench.readme [--check]`: write the tables of README and docs, or check that they are current."""

import argparse
import ast
import json
import re
import statistics
import sys
from pathlib import Path

import torch

from tritonmoe import aot
from tritonmoe.benchmarks.overlap_table import shown
from tritonmoe.benchmarks.roofline import H100, backward_flops, forward_flops, kernel_work
from tritonmoe.benchmarks.shapes import GPU_SHAPES
from tritonmoe.kernels.tiles import measured as measured_tiles

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("design", "diagnosis", "kernels", "planning")))
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def load_all(prefix: str) -> list[dict]:
    """Give what is in the files prefix_*.json, in the order of their names."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{prefix}_*.json"))]


def where(environment: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"{environment['device']}, {environment['cores']} cores, {versions}, {environment['date']}"


def spread(times: dict) -> str:
    return f"{times['median_ms']:.1f} ({times['lower_quartile_ms']:.1f} to {times['upper_quartile_ms']:.1f})"


def moe_mlp_table(name: str) -> str:
    data = load(name)
    lines = [
        f"`python -m bench.moe_mlp` on {where(data['environment'])}. Milliseconds, median (quartiles) of "
        f"{data['results'][0]['times']['tritonmoe']['samples']} interleaved rounds in "
        "three placements of the tensors; ratio is the best other implementation's time over ours.",
        "",
        "| E, K, D, F | T | dtype | pass | tritonmoe | best of transformers | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in data["results"]:
        best = case["best_other"]
        lines.append(
            f"| {', '.join(map(str, case['E_K_D_F']))} | {case['T']} | {case['dtype']} | {case['pass']} | "
            f"{spread(case['times']['tritonmoe'])} | {best} {spread(case['times'][best])} | {case['ratio']:.2f} |"
        )
    return "\n".join(lines)


def fixed_experts_table(name: str) -> str:
    data = load(name)
    lines = [
        f"`python -m bench.fixed_experts` on {where(data['environment'])}: 2 **emulated** ranks and link, experts of "
        f"a fixed duration. Milliseconds, median (quartiles) of {data['results'][0]['samples']} interleaved rounds.",
        "",
        "| variant | time | multiple of max(compute, communication) |",
        "| --- | --- | --- |",
    ]
    for row in data["results"]:
        lines.append(f"| {row['variant']} | {spread(row)} | {row['multiple_of_bound']:.2f} |")
    return "\n".join(lines)


def scheduler_table(name: str) -> str:
    data = load(name)
    lines = [
        f"`python -m bench.scheduler` on {where(data['environment'])}, one chunk, LocalTransport, against moe_mlp.",
        "",
        "| E, K, D, F | T | pass | moe_mlp | through the executor | overhead |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in data["results"]:
        lines.append(
            f"| {', '.join(map(str, case['E_K_D_F']))} | {case['T']} | {case['pass']} | "
            f"{spread(case['times']['bare'])} | {spread(case['times']['executor'])} | {case['overhead']:+.1%} |"
        )
    return "\n".join(lines)


def codegen_table(name: str) -> str:
    """Give the kernels of the default variant under the newest Triton, below a sentence that counts all variants'."""
    if not (RESULTS / f"{name}.json").exists():
        return "`python -m bench.codegen`: not run yet."
    data = load(name)
    *older, newest = data["triton_versions"]
    rows = data["results"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    shown = [row for row in rows if row["triton"] == newest and row["variant"] == variants[0]]
    problems = sum("problem" in row for row in rows)
    lines = [
        f"`python -m bench.codegen` with Triton {' and '.join([*older, newest])}: {len(rows)} kernels of "
        f"{len(variants)} layouts, gates, dtypes, shapes and batch sizes, {problems} of them unfit (a spill, too much "
        f"shared memory, a missing matrix instruction). Below: {variants[0]}, Triton {newest}. A cell has registers, "
        "KB of shared memory, programs side by side on a multiprocessor, and the matrix instruction in the loop.",
        "",
        f"| kernel | {' | '.join(targets)} |",
        f"| --- |{' --- |' * len(targets)}",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in shown):
        cells = {row["target"]: codegen_cell(row) for row in shown if row["kernel"] == kernel}
        lines.append(f"| {kernel} | {' | '.join(cells.get(target, '-') for target in targets)} |")
    return "\n".join(lines)


def codegen_cell(row: dict) -> str:
    if "error" in row:
        return "error"
    sizes = f"{row['registers']}, {row.get('shared_bytes', 0) / 1024:.0f}, {row['occupancy']}"
    return ", ".join(filter(None, (sizes, row.get("matrix"), "TMA" if row.get("tma_operands") else "")))


GPU_COLUMNS = ((32768, "forward"), (32768, "forward+backward"), (4096, "forward+backward"), (8, "forward"))


def gpu_table(name: str) -> str:
    """Give forward and forward + backward of every shape; a cell that no file has says so."""
    data = load(name) if (RESULTS / f"{name}.json").exists() else {"results": []}
    layers = {
        (case["shape"], case["T"]): case
        for case in data["results"]
        if case["kind"] == "layer" and case["routing"] == "uniform"
    }
    device = data["environment"]["device"] if layers else "a GPU: not measured yet"
    lines = [
        f"`python -m bench.gpu` on {device}. TFLOP/s of moe_mlp in bf16, its fraction of dense products of the same "
        "FLOPs in the same rounds, and how many times as fast as the fastest peer; uniform routing.",
        "",
        f"| shape | {' | '.join(f'T = {num_tokens}, {run}' for num_tokens, run in GPU_COLUMNS)} |",
        f"| --- |{' --- |' * len(GPU_COLUMNS)}",
    ]
    for shape in GPU_SHAPES:
        cells = [gpu_cell(layers.get((shape, num_tokens), {}), run) for num_tokens, run in GPU_COLUMNS]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_cell(case: dict, run: str) -> str:
    if "out_of_memory" in case:
        return "out of memory"
    if "failed" in case:
        return "failed"
    if run not in case:
        return "not measured yet"
    measured = case[run]
    ours = measured["tritonmoe"]
    others = [times["median_ms"] for name, times in measured.items() if name not in ("tritonmoe", "dense products")]
    ratio = f", {min(others) / ours['median_ms']:.2f}x" if others else ""
    return f"{ours['tflops']:.0f}, {ours.get('fraction_of_dense', 0):.2f}{ratio}"


BOUND_KERNELS = ("up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad W1", "weight_grad W2")


def bounds_table(num_tokens: str) -> str:
    """Give the times that a card's peak rates allow, which needs no measurement."""
    lines = [
        f"T = {num_tokens}, bf16, {H100.name} at its peak of {H100.tflops:.0f} TFLOP/s and {H100.tb_per_s} TB/s "
        f"({H100.source}). Cells: FLOP per byte, shortest time in microseconds, and m where memory sets it.",
        "",
        f"| shape | {' | '.join(BOUND_KERNELS)} | forward | forward + backward |",
        f"| --- |{' --- |' * len(BOUND_KERNELS)} --- | --- |",
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
        forward = forward_flops(shape, int(num_tokens))
        both = forward + backward_flops(shape, int(num_tokens))
        rates = [f"{flops / seconds / 1e12:.0f} TFLOP/s" for flops, seconds in ((forward, forward_s), (both, both_s))]
        lines.append(f"| {shape.name} | {' | '.join([*cells, *rates])} |")
    return "\n".join(lines)


def decoding_table(target: str) -> str:
    """Give how many programs read the weights for one token, in bf16, which needs no measurement."""
    lines = [
        f"| one token on {target} | up: columns of a tile, programs | down: columns of a tile, programs |",
        "| --- | --- | --- |",
    ]
    for shape in GPU_SHAPES.values():
        with measured_tiles.using({}):
            launches = aot.record_launches(aot.Variant.of(shape, torch.bfloat16, 1), aot.TARGETS[target])
        cells = [
            f"{launches[kernel].constexprs['BLOCK_N'] * columns}, {launches[kernel].grid[0]}"
            for kernel, columns in (("up inference up", 2 if shape.layout.gated else 1), ("down grouped_matmul", 1))
        ]
        lines.append(f"| {shape.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def transformers_table(name: str) -> str:
    data = load(name)
    layers, width, inner, experts, top_k = data["results"][0]["layers_D_F_E_K"]
    lines = [
        f"`python -m bench.transformers` on {where(data['environment'])}. A Qwen3-MoE-like model ({layers} layers, "
        f"D={width}, F={inner}, E={experts}, K={top_k}) and its first MoE block, all in one process and in turn. "
        "Every call has another batch, the same for all. Milliseconds, median (quartiles); decode is 16 tokens at "
        "batch 1; ratio is the best other implementation's time over ours.",
        "",
        "| | pass | T | dtype | routing (MaxVio) | tritonmoe | best of transformers | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in data["results"]:
        best = case["best_other"]
        lines.append(
            f"| {case['subject']} | {case['pass']} | {case['T']} | {case['dtype']} | "
            f"{case['routing']} ({case['max_violation']:.1f}) | {spread(case['times']['tritonmoe'])} | "
            f"{best} {spread(case['times'][best])} | {case['ratio']:.2f} |"
        )
    return "\n".join(lines)


def expert_parallel_table(name: str) -> str:
    if not (RESULTS / f"{name}.json").exists():
        return "`python -m bench.expert_parallel --netns 2`: not measured yet."
    data = load(name)
    results = data["results"]
    layers, width, inner, experts, top_k = results["layers_D_F_E_K"]
    sequences = results.get("sequences", 1)
    command = "python -m bench.expert_parallel --netns 2" + (f" --sequences {sequences}" if sequences > 1 else "")
    lines = [
        f"`{command}` on {where(data['environment'])}: {results['link']}, one core and "
        f"one thread each. Forward and backward of a Qwen3-MoE-like model ({layers} layers, D={width}, F={inner}, "
        f"E={experts}, K={top_k}) in {results['dtype']}, {results['tokens']} tokens a rank, under transformers' FSDP "
        f"and expert parallelism. {results['best_other']} computes {results['compute_over_communication']:.2f} times "
        f"as long as it communicates; tritonmoe is {results['ratio']:.2f} times as fast. Milliseconds, median "
        "(quartiles).",
        "",
        "| ep_implementation, experts_implementation | step | on a link of 40 Gbit/s | MB sent by a rank |",
        "| --- | --- | --- | --- |",
    ]
    for variant, case in results["variants"].items():
        lines.append(
            f"| {variant} | {spread(case['step'])} | {spread(case['step_on_fast_link'])} | {case['sent_mb']:.0f} |"
        )
    return "\n".join(lines)


def two_batches_table(name: str) -> str:
    data = load(name)
    results = data["results"]
    setting = results["arguments"]
    tokens = setting["sequences"] * setting["length"]
    rows = "" if setting["wire_dtype"] is None else f", rows sent in {setting['wire_dtype']}"
    command, ranks = f"python -m bench.two_batches --netns {setting['netns']}", "experts spread over the ranks"
    if setting["wire_dtype"] is not None:
        command += f" --wire-dtype {setting['wire_dtype']}"
    if setting["node_size"] is not None:
        command += f" --node-size {setting['node_size']}"
        ranks = f"experts spread over nodes of {setting['node_size']} ranks on two levels, the link a node's uplink"
    shared = "one core and one thread each" if setting["netns"] <= data["environment"]["cores"] else "which share cores"
    lines = [
        f"`{command}` on {where(data['environment'])}: {setting['netns']} network namespaces, {shared}. Forward and "
        f"backward of a Qwen3-MoE-like model ({setting['layers']} layers, D={setting['hidden_size']}, "
        f"F={setting['intermediate_size']}, E={setting['experts']}, K={setting['top_k']}) in {setting['dtype']}{rows}, "
        f"{setting['sequences']} sequences of {setting['length']} tokens ({tokens}) a rank, {ranks}, dense weights "
        f"replicated and not reduced, {setting['rounds']} interleaved rounds. Milliseconds, median (quartiles); what "
        "is gained is the median of the rounds' ratios; the bound is the longer of the step in halves on 40 Gbit/s "
        "and the wire's time.",
        "",
        '| link | two batches | in 2 chunks | one batch | "auto" | serial | one device, no exchange | wire alone | two '
        'batches over one | in 2 chunks | "auto" over one | beside the bound |',
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rate in results["rates"]:
        variants = ("two batches", "two batches in 2 chunks", "one batch", "auto", "serial", "one device")
        steps = " | ".join(spread(rate["step"][variant]) for variant in variants)
        lines.append(
            f"| {rate['rate']} | {steps} | {rate['communication_alone_ms']:.0f} | "
            f"{rate['faster_than_one_batch']:.2f} times as fast | {rate['in_2_chunks_faster_than_one_batch']:.2f} "
            f"times | {rate['auto_faster_than_one_batch']:.2f} times | "
            f"{rate['beside_bound']:.2f} |"
        )
    return "\n".join(lines)


def one_rank_in_halves(name: str) -> str:
    """Give in words what halves take on one rank, where nothing is exchanged."""
    data = load(name)
    (rate, *_), rounds = data["results"]["rates"], data["results"]["arguments"]["rounds"]
    times = {
        variant: spread(rate["step"][variant]) for variant in ("two batches", "one half after the other", "one batch")
    }
    return (
        f"On one rank there is nothing to hide. By `python -m bench.two_batches --netns 1` on "
        f"{where(data['environment'])}, {rounds} interleaved rounds, the step of the table below takes "
        f"{times['two batches']} ms with two batches, and {times['one half after the other']} ms with the same halves "
        "one after the other: "
        f"{rate['beside_one_by_one']:.2f} times as long, by the median of the rounds' ratios. As one batch it takes "
        f"{times['one batch']} ms: smaller products cost the rest."
    )


def doctor_table(prefix: str) -> str:
    """Give one row for every file of results whose name starts with `prefix`."""
    data = load_all(prefix)
    columns = {
        "cause of 15 % or more first": ("of 15 %: cause first", "of 15 %: number"),
        "of 8 to 15 %": ("of 8 to 15 %: cause first", "of 8 to 15 %: number"),
        "healthy with a finding": ("healthy: false alarms", "healthy: number"),
        "both of two said": ("two causes: both said", "two causes: number"),
    }
    lines = [
        f"`python -m bench.doctor` on {where(data[0]['environment'])}: medians of 9 interleaved calls, experts that "
        "sleep. Shares, with the number of scenarios that they are of; errors are relative.",
        "",
        f"| scenarios | ranks | seeds | {' | '.join(columns)} | culprit right | gain within 15 % | "
        "gain, median error | replay, median error | worst |",
        f"| {' | '.join(['---'] * (len(columns) + 8))} |",
    ]
    for one in data:
        summary, scenarios = one["results"]["summary"], one["results"]["scenarios"]
        numbers = [scenario["number"] for scenario in scenarios]
        cells = [f"{summary['scenarios']}, {one['results']['where']}"]
        cells += [", ".join(map(str, sorted({scenario["ranks"] for scenario in scenarios})))]
        cells += [f"{min(numbers)} to {max(numbers)}"]
        cells += [as_share(summary[share]) + f" of {summary[number]}" for share, number in columns.values()]
        cells += [as_share(summary[name]) for name in ("culprit right", "gain within 15 %")]
        cells += [
            "-" if summary[name] is None else f"{100 * summary[name]:.1f} %"
            for name in ("gain: median error", "replay: median error", "replay: worst error")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def overlap_table(prefix: str) -> str:
    """Give one row for every file of results whose name starts with `prefix`."""
    data = load_all(prefix)
    if not data:
        return "`tritonmoe bench overlap --netns 2`: not measured yet."
    results = data[0]["results"]
    lines = [
        f"`tritonmoe bench overlap --netns {results['ranks']}` on {where(data[0]['environment'])}: network namespaces, "
        f"gloo, one core and one thread each, the link's rate chosen by `--compute-ratio`; {results['dtype']}, "
        f"T tokens a rank. Milliseconds, medians of {results['rounds']} interleaved rounds; ratios are "
        "medians of the rounds' own. bound_ratio is of max(T_compute, T_communication), pass_bound_ratio of each "
        "pass's: a backward can't hide what the forward exposes.",
        "",
        "| E, K, D, F | T | routing | pass | T_compute | T_communication | T_serial | T_overlapped | bound_ratio | "
        "pass_bound_ratio | speed_up | auto's bound_ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in data:
        results, summary = one["results"], one["results"]["summary"]
        times = [f"{summary[f'T_{kind}']['median_ms']:.1f}" for kind in ("compute", "communication", "serial")]
        over = summary["overlapped"]
        ratios = [shown(over, name, quartiles=False) for name in ("bound_ratio", "pass_bound_ratio", "speed_up")]
        ratios.append(shown(summary["auto"], "bound_ratio", quartiles=False))
        wire = f", wire_dtype {results['wire_dtype']}" if results.get("wire_dtype") else ""
        lines.append(
            f"| {', '.join(map(str, results['E_K_D_F']))} | {results['tokens']} | {results['routing']} | "
            f"{results['pass']}{wire} | {' | '.join(times)} | {spread(over)}: "
            f"{over['variant'].removeprefix('overlapped ')} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def two_levels_table(prefix: str) -> str:
    """Give one row for every file of results whose name starts with `prefix`."""
    data = load_all(prefix)
    if not data:
        return "`tritonmoe bench overlap --netns 4 --node-size 2`: not measured yet."
    results = data[0]["results"]
    lines = [
        f"`tritonmoe bench overlap --netns {results['ranks']} --node-size 2` on {where(data[0]['environment'])}: "
        f"{results['ranks']} network namespaces, gloo, every rank's link 1 Gbit/s; {results['model']} (E, K, D, F = "
        f"{', '.join(map(str, results['E_K_D_F']))}), T = {results['tokens']} a rank, {results['pass']} in "
        f"{results['dtype']}. Milliseconds, medians of {results['rounds']} interleaved rounds; bytes by the counters "
        "of the nodes' uplinks, all nodes together.",
        "",
        "| uplink of a node | one level | two levels | auto on two levels | two_levels_speed_up | MB, one level | "
        "MB, two levels | computed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in data:
        results, summary = one["results"], one["results"]["summary"]
        cells = [results["link"].rpartition(" ")[2]]
        for best in (summary["T_overlapped"], summary["T_two levels"]):
            cells.append(f"{spread(best)}: C={best['variant'].split(' C=')[1]}")
        cells += [
            spread(results["variants"]["auto on two levels"]),
            shown(summary, "two_levels_speed_up", quartiles=False),
        ]
        sent = results["uplink_bytes"]
        total = [sum(sent["one level"]), sum(sent["two levels"]), results["two_levels_computed_bytes"]]
        cells += [f"{count / 1e6:.2f}" for count in total]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def auto_table(name: str) -> str:
    if not (RESULTS / f"{name}.json").exists():
        return "`tritonmoe bench auto --netns 2`: not measured yet."
    data = load(name)
    results = data["results"]
    lines = [
        f"`tritonmoe bench auto --netns {results['ranks']}` on {where(data['environment'])}: {results['link']}, "
        f"{results['pass']} in {results['dtype']}, T = {results['tokens']} a rank. What a layer chooses by itself "
        f"against the fastest plan of a sweep, measured again beside it: {results['auto_excess_median']:+.1%} in the "
        f"median, {results['auto_excess_largest']:+.1%} at worst. The simulator against all overlapped plans of the "
        f"sweeps: {results['simulator_error_median']:.1%} in the median, {results['simulator_error_largest']:.1%} at "
        "worst. Milliseconds, median (quartiles).",
        "",
        "| link | E, K, D, F | routing | auto | fastest of the sweep | auto over it | over the best without overlap | "
        "the simulator's error: median, largest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in results["cases"]:
        again, winner = case["again_ms"], case["winner"]
        errors = sorted(abs(error) for error in case["errors"].values())
        lines.append(
            f"| {case['rate']} | {', '.join(map(str, case['E_K_D_F']))} | {case['routing']} | "
            f"{spread(again['auto'])} | {spread(again[winner])}: {winner.removeprefix('overlapped ')} | "
            f"{case['auto_over_winner']['median'] - 1:+.1%} | {case['auto_over_serial']['median'] - 1:+.1%} | "
            f"{statistics.median(errors):.1%}, {errors[-1]:.1%} |"
        )
    return "\n".join(lines)


def plan_table(name: str) -> str:
    """Give one row for every published table that the planner is compared with, and what was fitted to it."""
    lines = [
        "| published table | judged | median error | worst error | targets | fitted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for table in load(name)["results"]:
        num_judged = sum(row["judged"] for row in table["rows"])
        source = table["source"].split(" and ")[0]
        cells = [f"[{table['name']}]({source})", f"{num_judged} of {len(table['rows'])} rows"]
        targets = []
        for kind in ("median", "worst"):
            error, target = table[f"{kind}_error"], table[f"{kind}_target"]
            cells.append("-" if error is None else f"{error:.2%}")
            if target is not None:
                targets.append(f"{kind} {target:.2%} {'met' if error <= target else '**missed**'}")
        lines.append(f"| {' | '.join([*cells, ', '.join(targets) or '-', table['fitted']])} |")
    return "\n".join(lines)


def plan_rows_table(name: str) -> str:
    """Give every published row, measured and predicted."""
    lines = []
    for table in load(name)["results"]:
        lines += ["", f"{table['name']}:", ""]
        lines += ["| | measured | predicted | error | |", "| --- | --- | --- | --- | --- |"]
        for row in table["rows"]:
            predicted = "-" if row["predicted"] is None else f"{row['predicted']:,.5g}"
            error = "-" if row["error"] is None else f"{row['error']:+.2%}"
            note = "fitted" if row["fitted"] else row["note"]
            lines.append(f"| {row['what']} | {row['measured']:,.5g} {row['unit']} | {predicted} | {error} | {note} |")
    return "\n".join(lines[1:])


def upcycle_table(name: str) -> str:
    command = "`python examples/upcycle_smollm2.py`"
    if not (RESULTS / f"{name}.json").exists():
        return f"{command}: not measured yet."
    data = load(name)
    results = data["results"]
    greedy, perplexity = results["greedy"], results["perplexity"]
    lines = [
        f'{command} on {where(data["environment"])}: {results["model"]} upcycled, init="copy". Greedy text of '
        f"{greedy['new_tokens']} tokens is the same for {greedy['equal']} of {greedy['prompts']} prompts; perplexity "
        f"on {perplexity['tokens']} tokens of Shakespeare is {perplexity['dense']:.4f} before and "
        f"{perplexity['upcycled']:.4f} after.",
        "",
        "| experts, top-k, granularity | largest difference of a logit | of the largest logit | parameters | active |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in results["equality"]:
        lines.append(
            f"| {case['num_experts']}, {case['top_k']}, {case['granularity']} | {case['max_error']:.1e} | "
            f"{case['relative_error']:.1e} | {case['dense_parameters']:,} to {case['parameters']:,} | "
            f"{case['active_parameters']:,} |"
        )
    if "training" not in results:
        lines += ["", "How far its experts specialise in training: not measured yet."]
    else:
        training = results["training"]
        before, after = training["before"], training["after"]
        is_seen = after["rise_when_shuffled"] > 3 * after["standard_error"]
        lines += [
            "",
            f"{training['steps']} steps of {training['tokens']} tokens train the {training['layers']} last layers, "
            "with 8 experts, top-2 and an auxiliary loss. On tokens of other works, "
            f"{training['held_out_tokens']} of them, the loss is then {after['loss']:.3f} instead of "
            f"{before['loss']:.3f}, and the largest excess of an expert's load (MaxVio, mean over layers) "
            f"{after['max_violation']:.2f} instead of {before['max_violation']:.2f}. Where tokens go to each other's "
            f"experts, every expert keeping its load, the loss is higher by {after['rise_when_shuffled']:.4f} "
            f"(standard error {after['standard_error']:.4f}), and before training by "
            f"{abs(before['rise_when_shuffled']):.0e}: "
            + ("that much is each expert's own." if is_seen else "that its experts specialise can't be told from it."),
        ]
    return "\n".join(lines)


def files_table(package: str) -> str:
    """Give every file of a package with the first line of its docstring, a room's own line before its files."""
    lines = ["| file | what it is |", "| --- | --- |"]
    for path in sorted(
        (ROOT / package).rglob("*.py"), key=lambda path: (path.parent.parts, path.name != "__init__.py", path.name)
    ):
        name = path.relative_to(ROOT / package)
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} has no docstring"
        is_room = name.name == "__init__.py"
        shown = f"**{name.parent}/**" if is_room and name.parent.parts else name.as_posix()
        first_line = docstring.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {shown} | {first_line} |")
    return "\n".join(lines)


TABLES = {
    "files": files_table,
    "auto": auto_table,
    "doctor": doctor_table,
    "one_rank_in_halves": one_rank_in_halves,
    "overlap": overlap_table,
    "plan": plan_table,
    "plan_rows": plan_rows_table,
    "two_batches": two_batches_table,
    "two_levels": two_levels_table,
    "upcycle": upcycle_table,
    "expert_parallel": expert_parallel_table,
    "transformers": transformers_table,
    "bounds": bounds_table,
    "decoding": decoding_table,
    "moe_mlp": moe_mlp_table,
    "fixed_experts": fixed_experts_table,
    "scheduler": scheduler_table,
    "codegen": codegen_table,
    "gpu": gpu_table,
}


def render(text: str) -> str:
    """Give a page with everything between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match) -> str:
        kind, name = match.group(1), match.group(2)
        return f"<!-- table {kind} {name} -->\n{TABLES[kind](name)}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) ([\w.-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the README is not what would be written")
    arguments = parser.parse_args()
    rendered = {page: render(page.read_text()) for page in PAGES}
    stale = [page.name for page, text in rendered.items() if page.read_text() != text]
    if arguments.check:
        sys.exit(f"{', '.join(stale)}: stale, run python -m bench.readme" if stale else None)
    for page, text in rendered.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
