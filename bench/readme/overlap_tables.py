"""Tables of layers over several ranks: what overlap hides, what a layer chooses, what the scheduler costs."""

import statistics

from bench.readme.results import RESULTS, load, load_all, spread, table_head, table_row, where
from tritonmoe.tools.benchmarks.overlap_report import marks, shown

__all__ = [
    "auto_table",
    "expert_parallel_table",
    "memory_budget_table",
    "one_rank_in_halves",
    "overlap_table",
    "rebalance_table",
    "sure_overlap",
    "two_batches_table",
    "two_levels_table",
]


def rebalance_table(name: str) -> str:
    data = load(name)
    found = data["results"]
    lines = [
        f"`python -m bench.rebalance` on {where(data['environment'])}: {found['ranks']} **emulated** ranks, links of "
        f"{found['rate']}, experts that sleep {found['pair_us']:g} us for each pair, E=64, K=8, D=512, F=256, routing "
        f"that stays skewed. After {found['steps']} steps with `every={found['every']}`; milliseconds of a step, "
        f"median (quartiles) of {found['step']['stay']['samples']} interleaved rounds.",
        "",
        *table_head("experts", "busiest rank over the mean", "step", "over the best placement's"),
    ]
    words = {
        "stay": "where they were",
        "move": "moved by `tm.rebalance`",
        "best": "the best placement of a long search",
    }
    best = found["step"]["best"]["median_ms"]
    for variant, row in found["step"].items():
        share = row["median_ms"] / best
        lines.append(f"| {words[variant]} | {found['imbalance'][variant]:.3f} | {spread(row)} | {share:.2f} |")
    return "\n".join(lines)


def overlap_table(prefix: str) -> str:
    """Return one row for every file of results whose name starts with `prefix`."""
    data = load_all(prefix)
    if not data:
        return "`tritonmoe bench overlap --netns 2`: not measured yet."
    results = data[0]["results"]
    is_older = any("T_pass_bound" not in one["results"]["summary"] for one in data)
    of_rounds = " T_pass_bound was not recorded: pass_bound_ratio is the median of the rounds'." if is_older else ""
    lines = [
        f"`tritonmoe bench overlap --netns {results['ranks']}` on {where(data[0]['environment'])}: network namespaces, "
        f"gloo, one core and one thread each, the link's rate chosen by `--compute-ratio`; {results['dtype']}, "
        f"T tokens a rank. Milliseconds, medians of {results['rounds']} interleaved rounds; ratios are of these "
        "medians. bound_ratio is the time over max(T_compute, T_communication), pass_bound_ratio the time over "
        f"the longer side of each pass: a backward can't hide what the forward exposes.{of_rounds}",
        "",
        *table_head(
            "E, K, D, F",
            "T",
            "routing",
            "pass",
            "T_compute",
            "T_communication",
            "T_serial",
            "T_overlapped",
            "bound_ratio",
            "pass_bound_ratio",
            "speed_up",
            "auto's bound_ratio",
        ),
    ]
    for one in data:
        results, summary = one["results"], one["results"]["summary"]
        times = [f"{summary[f'T_{kind}']['median_ms']:.1f}" for kind in ("compute", "communication", "serial")]
        over, auto = ({**summary[kind], "marks": marks(summary[kind], summary)} for kind in ("overlapped", "auto"))
        ratios = [shown(over, name) for name in ("bound_ratio", "pass_bound_ratio", "speed_up")]
        ratios.append(shown(auto, "bound_ratio"))
        wire = f", wire_dtype {results['wire_dtype']}" if results.get("wire_dtype") else ""
        lines.append(
            f"| {', '.join(map(str, results['E_K_D_F']))} | {results['tokens']} | {results['routing']} | "
            f"{results['pass']}{wire} | {' | '.join(times)} | {spread(over)}: "
            f"{over['variant'].removeprefix('overlapped ')} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def sure_overlap(name: str) -> dict:
    """Return the figures of merit of a file's fastest overlapped schedule, none of which may be doubtful."""
    summary = load(name)["results"]["summary"]
    doubtful = marks(summary["overlapped"], summary)
    assert not doubtful, f"{name}: {doubtful}"
    return summary["overlapped"]


def two_levels_table(prefix: str) -> str:
    """Return one row for every file of results whose name starts with `prefix`."""
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
        *table_head(
            "uplink of a node",
            "one level",
            "two levels",
            "auto on two levels",
            "two_levels_speed_up",
            "MB, one level",
            "MB, two levels",
            "computed",
        ),
    ]
    for one in data:
        results, summary = one["results"], one["results"]["summary"]
        cells = [results["link"].rpartition(" ")[2]]
        for best in (summary["T_overlapped"], summary["T_two levels"]):
            cells.append(f"{spread(best)}: C={best['variant'].split(' C=')[1]}")
        cells += [
            spread(results["variants"]["auto on two levels"]),
            shown(summary, "two_levels_speed_up"),
        ]
        sent = results["uplink_bytes"]
        total = [sum(sent["one level"]), sum(sent["two levels"]), results["two_levels_computed_bytes"]]
        cells += [f"{count / 1e6:.2f}" for count in total]
        lines.append(table_row(*cells))
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
        *table_head(
            "link",
            "E, K, D, F",
            "routing",
            "auto",
            "fastest of the sweep",
            "auto over it",
            "over the best without overlap",
            "the simulator's error: median, largest",
        ),
    ]
    for case in results["cases"]:
        again, winner = case["again_ms"], case["winner"]
        errors = sorted(abs(error) for error in case["errors"].values())
        lines.append(
            f"| {case['rate']} | {', '.join(map(str, case['E_K_D_F']))} | {case['routing']} | "
            f"{spread(again['auto'])} | {spread(again[winner])}: {winner.removeprefix('overlapped ')} | "
            f"{case['auto_over_winner'] - 1:+.1%} | {case['auto_over_serial'] - 1:+.1%} | "
            f"{statistics.median(errors):.1%}, {errors[-1]:.1%} |"
        )
    return "\n".join(lines)


def expert_parallel_table(name: str) -> str:
    if not (RESULTS / f"{name}.json").exists():
        return "`tritonmoe bench expert_parallel --netns 2`: not measured yet."
    data = load(name)
    results = data["results"]
    layers, width, inner, experts, top_k = results["layers_D_F_E_K"]
    sequences = results.get("sequences", 1)
    command = "tritonmoe bench expert_parallel --netns 2" + (f" --sequences {sequences}" if sequences > 1 else "")
    lines = [
        f"`{command}` on {where(data['environment'])}: {results['link']}, one core and "
        f"one thread each. Forward and backward of a Qwen3-MoE-like model ({layers} layers, D={width}, F={inner}, "
        f"E={experts}, K={top_k}) in {results['dtype']}, {results['tokens']} tokens a rank, under transformers' FSDP "
        f"and expert parallelism. With {results['best_other']} compute takes "
        f"{results['compute_over_communication']:.2f} times as long as communication, and tritonmoe is "
        f"{results['ratio']:.2f} times as fast. Milliseconds, median (quartiles).",
        "",
        *table_head("ep_implementation, experts_implementation", "step", "on a link of 40 Gbit/s", "MB sent by a rank"),
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
        "is gained is the ratio of these medians; the bound is the longer of the step in halves on 40 Gbit/s "
        "and the wire's time.",
        "",
        *table_head(
            "link",
            "two batches",
            "in 2 chunks",
            "one batch",
            '"auto"',
            "serial",
            "one device, no exchange",
            "wire alone",
            "two batches over one",
            "in 2 chunks",
            '"auto" over one',
            "beside the bound",
        ),
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
    """Return in words what halves take on one rank, where nothing is exchanged."""
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
        f"{rate['beside_one_by_one']:.2f} times as long. As one batch it takes "
        f"{times['one batch']} ms: smaller products cost the rest."
    )


def memory_budget_table(name: str) -> str:
    """Return what a rank holds with a memory budget and without, a row for each routing."""
    found = load(name)
    budget_mb = found["results"]["budget_mb"]
    columns = "without a budget", "expected", f"with {budget_mb:.0f} MB", "expected"
    lines = [*table_head("routing", *columns, "time, with over without")]
    for result in found["results"]["routings"]:
        low, high = result["ratios"]
        lines.append(
            table_row(
                result["routing"],
                *(
                    f"{result[f'{variant}_{of}']:.0f} MB"
                    for variant in ("without", "with")
                    for of in ("mb", "expected_mb")
                ),
                f"{result['ratio']:.2f} ({low:.2f} to {high:.2f})",
            )
        )
    of = found["results"]
    caption = (
        "The most that a rank holds above what it held before the step, as Linux counts it; "
        f"{of['ranks']} gloo processes, {of['layers']} layers, T={of['tokens']} a rank, D={of['hidden']}, "
        f"F={of['intermediate']}, E={of['experts']}, K={of['top_k']}, fp32; forward and backward, the peak of the "
        f"busiest rank in {of['rounds']} steps, and the median and range of the ratios of steps that follow each "
        "other. Without a budget a call has four chunks. Expected is `peak_bytes()` of the pairs that each expert has "
        "in these steps, and what it doesn't count: gradients of all weights, inputs and outputs of layers. "
        f"`python -m bench.memory_budget`; {where(found['environment'])}."
    )
    return "\n".join([*lines, "", caption])
