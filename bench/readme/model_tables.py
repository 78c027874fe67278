"""Tables of whole models, and the README's own, of the figures that matter most."""

from bench.expert_precision import LAST
from bench.readme.kernel_tables import NUMBERS, compiled_for
from bench.readme.overlap_tables import sure_overlap
from bench.readme.results import RESULTS, load, load_all, spread, table_head, table_row, where
from tritonmoe.tools.benchmarks.timing import ratio

__all__ = [
    "adapters_table",
    "headline_table",
    "offload_table",
    "quantized_model_table",
    "quantized_table",
    "routing_replay_table",
    "torchtitan_table",
    "transformers_table",
    "upcycle_table",
]


def transformers_table(name: str) -> str:
    data = load(name)
    layers, width, inner, experts, top_k = data["results"][0]["layers_D_F_E_K"]
    lines = [
        f"`tritonmoe bench transformers` on {where(data['environment'])}. A Qwen3-MoE-like model ({layers} layers, "
        f"D={width}, F={inner}, E={experts}, K={top_k}) and its first MoE block, all in one process and in turn. "
        "Every call has another batch, the same for all. Milliseconds, median (quartiles); decode is 16 tokens at "
        "batch 1; ratio is the best other implementation's time over ours.",
        "",
        *table_head("", "pass", "T", "dtype", "routing (MaxVio)", "tritonmoe", "best of transformers", "ratio"),
    ]
    for case in data["results"]:
        best = case["best_other"]
        lines.append(
            f"| {case['subject']} | {case['pass']} | {case['T']} | {case['dtype']} | "
            f"{case['routing']} ({case['max_violation']:.1f}) | {spread(case['times']['tritonmoe'])} | "
            f"{best} {spread(case['times'][best])} | {case['ratio']:.2f} |"
        )
    return "\n".join(lines)


def routing_replay_table(name: str) -> str:
    """Return how far bf16 and fp32 agree on the experts of each token, before and under a replay."""
    data = load(name)
    lines = [
        f"`python -m bench.routing_replay` on {where(data['environment'])}: random Qwen3-MoE-like models, their "
        f"routing in fp32 recorded for {data['results'][0]['tokens']} tokens, then the same in bf16. Shares are means "
        "over layers; KL is of the next token's distribution, from fp32.",
        "",
        *table_head(
            "layers, E, K", "equal ids", "tokens with equal ids", "replayed", "KL", "KL, replayed", "bytes a token"
        ),
    ]
    for row in data["results"]:
        lines.append(
            f"| {row['layers']}, {row['num_experts']}, {row['top_k']} | {row['equal_ids']:.2%} | "
            f"{row['equal_tokens']:.2%} | {row['equal_ids_replayed']:.0%} | {row['kl']:.1e} | "
            f"{row['kl_replayed']:.1e} | {row['bytes_per_token']:.0f} |"
        )
    return "\n".join(lines)


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
        *table_head(
            "experts, top-k, granularity",
            "largest difference of a logit",
            "of the largest logit",
            "parameters",
            "active",
        ),
    ]
    for case in results["equality"]:
        lines.append(
            f"| {case['num_experts']}, {case['top_k']}, {case['granularity']} | {case['max_error']:.1e} | "
            f"{case['relative_error']:.1e} | {case['dense_parameters']:,} to {case['parameters']:,} | "
            f"{case['active_parameters']:,} |"
        )
    if "training" not in results:
        lines += ["", "How far the experts specialise in training: not measured yet."]
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
            f"{after['max_violation']:.2f} instead of {before['max_violation']:.2f}. If tokens swap their experts at "
            "random, so that every expert keeps its load, the loss rises by "
            f"{after['rise_when_shuffled']:.4f} (standard error {after['standard_error']:.4f}); before training it "
            f"rises by {abs(before['rise_when_shuffled']):.0e}. "
            + ("So the experts have specialised." if is_seen else "So whether experts have specialised can't be told."),
        ]
    return "\n".join(lines)


def headline_table(_: str) -> str:
    """Return the figures that matter most, in a line each."""
    layers = load("moe_mlp_cpu")
    wanted = {"E_K_D_F": [64, 8, 512, 256], "T": 2048, "dtype": "float32", "pass": "forward+backward"}
    (layer,) = (case for case in layers["results"] if wanted.items() <= case.items())
    models = {
        (case["subject"], case["pass"], case["dtype"], case["routing"]): case
        for case in load("transformers_cpu")["results"]
    }
    spread_model = load("expert_parallel_netns")["results"]
    overlap = sure_overlap("overlap_netns_both_balanced")
    chosen = load("auto_netns")["results"]
    nodes = load("overlap_nodes_100mbit")["results"]["summary"]["two_levels_speed_up"]
    doctor = [one["results"] for one in load_all("doctor_netns")]
    kinds = {scenario["kind"] for one in doctor for scenario in one["scenarios"] if scenario["faults"]}
    codegen = load("codegen")
    found, tried = (sum(one["summary"]["first cause right"][name] for one in doctor) for name in ("right", "of"))
    training = [models["model", "training", dtype, "untrained"]["ratio"] for dtype in ("float32", "bfloat16")]
    rows = [
        (
            "one layer, E=64 K=8, T=2048, forward+backward, CPU",
            f"{layer['ratio']:.2f} times as fast as transformers' best",
        ),
        (
            "a Qwen3-MoE-like model, training, untrained router, CPU, fp32 and bf16",
            f"{training[0]:.2f} and {training[1]:.2f} times as fast as with transformers' best",
        ),
        (
            "the same model over 2 processes and a link of 1 Gbit/s",
            f"{spread_model['ratio']:.2f} times as fast as transformers' own exchange",
        ),
        (
            "one layer, exchanges as long as compute: overlapped instead of in turn",
            f"{overlap['speed_up']:.2f} times as fast, {overlap['hidden_share']:.0%} hidden",
        ),
        ("nodes with a slow uplink: an exchange on two levels instead of one", f"{nodes:.2f} times as fast"),
        (
            '`num_chunks="auto"` compared with the best fixed setting',
            f"{chosen['auto_excess_median']:.1%} slower (median), {chosen['auto_excess_largest']:.1%} at worst",
        ),
        (
            f"`tritonmoe doctor`, four ranks over TCP, {len(kinds)} kinds of faults: causes of 15 % of a step or more",
            f"named first in {found} of {tried} jobs",
        ),
        (
            f"{codegen['num_kernels']} kernels compiled for {NUMBERS[len(compiled_for(codegen))]} kinds of GPU",
            f"{len(codegen['unfit'])} of them spill in a loop or lack the matrix instruction",
        ),
        ("anything on a GPU", "not measured yet"),
    ]
    machine = where(layers["environment"]).rpartition(", ")[0]
    lines = [f"On {machine}; ranks are processes in network namespaces (gloo).", "", *table_head("what", "")]
    return "\n".join([*lines, *(table_row(*row) for row in rows)])


def adapters_table(name: str) -> str:
    results = load(name)
    lines = [
        *table_head(
            "experts", "trained parameters of experts", "ms a step", "of frozen experts", "most memory in a step, MB"
        ),
    ]
    lines += [
        f"| {result['variant']} | {result['trained_of_experts'] / 1e6:.1f} M | {spread(result)} | "
        f"{result['of_frozen']:.2f} | {result['peak_mb']:.0f} |"
        for result in results["results"]
    ]
    num_tokens = results["results"][0]["num_tokens"]
    caption = (
        "Forward and backward of a four-layer Qwen3-MoE-like model, D=512, F=256, E=64, K=8, "
        f"T={num_tokens}, fp32; whatever is no expert is trained. Medians (quartiles) of interleaved rounds, and "
        f"their ratios. `python -m bench.adapters`; {where(results['environment'])}."
    )
    return "\n".join([*lines, "", caption])


def torchtitan_table(name: str) -> str:
    data = load(name)
    found = data["results"]
    samples = next(iter(found["models"].values()))["own"]["samples"]
    lines = [
        f"`python -m bench.torchtitan --tokens {found['tokens']}` on {where(data['environment'])}, torchtitan "
        f"{found['torchtitan']}: two processes of a core each, joined by links of {found['rate']} (network namespaces, "
        f"`tc tbf`), with 2 sequences of {found['tokens']} tokens each, expert parallel with FSDP2, selective "
        "activation checkpointing, bf16 experts; milliseconds of a whole step with its optimizer, and of the forwards "
        f"of routed experts in a step, recomputes included: median (quartiles) of {samples} steps, of runs in turn.",
        "",
        *table_head("debug model", "a step", "by tritonmoe", "times as fast", "experts' forwards", "by tritonmoe"),
    ]
    for model, row in found["models"].items():
        steps, forwards = ([spread(of[name]) for name in ("own", "tritonmoe")] for of in (row, row["experts"]))
        lines.append(table_row(model, *steps, f"{row['speed_up']:.2f}", *forwards))
    return "\n".join(lines)


def quantized_model_table(name: str) -> str:
    """Return what a whole step of a model holds with packed experts, a row for each format."""
    found = load(name)
    plain = found["results"][0]
    lines = [*table_head("format", "model", "AdamW's states", "step", "tensors at their most", "process")]
    for result in found["results"]:
        tensors, whole = (of["model_mb"] + of["states_mb"] + of["step_mb"] for of in (result, plain))
        lines.append(
            table_row(
                f"`{result['variant']}`",
                *(f"{result[part]:.0f} MB" for part in ("model_mb", "states_mb", "step_mb")),
                f"{tensors:.0f} MB, {tensors / whole:.2f}",
                f"{result['process_mb']:.0f} MB, {result['process_mb'] / plain['process_mb']:.2f}",
            )
        )
    caption = (
        "A whole step (forward, backward, AdamW) of a Qwen3-MoE model with PEFT's adapters of rank 16 on the experts: "
        "four layers of the sizes above, 2 x 512 tokens. Of tensors: the model with its adapters "
        f"({plain['adapters_mb']:.0f} MB, fp32), the optimizer's states, and the most that a step holds beside both. "
        "Of the process: the most memory that Linux counts during two steps, without what the imports took; "
        "ratios are to bf16. One thread. "
        f"`python -m bench.quantized --model`; {where(found['environment'])}."
    )
    return "\n".join([*lines, "", caption])


def quantized_table(name: str) -> str:
    """Return what packed experts cost beside the same ones in bf16, a row for each format."""
    found = load(name)
    lines = [
        *table_head(
            "format", "T=1024", "T=64", "step with adapters", "weights", "peak of two steps", "experts4bit-qlora"
        )
    ]
    for result in found["results"]:
        cases = [result[case] for case in ("layer_1024", "layer_64", "adapters")]
        cells = [
            f"{case['ratio']:.2f} ({case['ratio_quartiles'][0]:.2f} to {case['ratio_quartiles'][1]:.2f})"
            for case in cases
        ]
        peer = result["adapters"].get("experts4bit_over_packed")
        peak = f"{result['peak_mb'] / result['bf16_peak_mb']:.2f} ({result['peak_mb']} MB)"
        cells += [f"{result['weights']:.2f}", peak, f"{peer:.2f}" if peer else ""]
        lines.append(table_row(f"`{result['variant']}`" if "," not in result["variant"] else result["variant"], *cells))
    caption = (
        "Times and memory as multiples of the same experts in bf16: forward and gradient of x of a layer (D=512, "
        "F=256, E=64, K=8) with T tokens, a step of four such layers with adapters of rank 16 (T=1024), the weights "
        "alone, and the peak memory of two steps of four frozen layers. The last column is the CPU time of the same "
        "step in experts4bit-qlora, which decodes by bitsandbytes, over ours. Medians (quartiles of the ratio) of "
        "interleaved rounds on one thread. "
        f"`python -m bench.quantized`; {where(found['environment'])}."
    )
    return "\n".join([*lines, "", caption])


def expert_precision_cost_table(name: str) -> str:
    """Return what emulation takes beside bf16, a row for each shape."""
    data = load(name)
    cost = data["results"]["cost"]
    lines = [*table_head("shape", *next(iter(cost.values())))]
    for shape, times in cost.items():
        cells = (
            f"{spread(one)} ms" + ("" if which == "bf16" else f", {ratio(one, times['bf16'], 2)} times bf16's")
            for which, one in times.items()
        )
        lines.append(table_row(shape, *cells))
    samples = [one["samples"] for times in cost.values() for one in times.values()]
    caption = (
        "Forward and backward of `moe_mlp` on a CPU, emulated: medians and quartiles of rounds in which all take "
        f"turns, {max(samples)} of them, or {min(samples)} of what takes more than twice as long as the fastest. "
        f"`python -m bench.expert_precision`; {where(data['environment'])}."
    )
    return "\n".join([*lines, "", caption])


def expert_precision_table(name: str) -> str:
    """Return the noise of experts in each precision, and what a model loses, a row for each."""
    data = load(name)
    found = data["results"]
    plain = found["losses"]["bf16"]

    def lowest(noise: dict | None) -> str:
        return "" if noise is None else " / ".join(f"{min(of.values()):.1f} dB" for of in noise.values())

    lines = [*table_head("precision", "products", "a layer", "training loss less bf16's", "held out, less bf16's")]
    for precision, losses in found["losses"].items():
        gaps = [
            ", ".join(f"{one[key] - other[key]:+.4f}" for one, other in zip(losses, plain, strict=True))
            if precision != "bf16"
            else ""
            for key in ("training", "held_out")
        ]
        lines.append(
            table_row(precision, lowest(found["products"].get(precision)), lowest(found["layer"].get(precision)), *gaps)
        )
    caption = (
        "Signal to noise against fp64, the lowest of output and gradients, for normal inputs / with outliers (columns "
        "30 times as large); of single products, and of a whole gated layer. Losses in nats a byte, for each of "
        f"{len(plain)} seeds: a model of bytes with two layers of experts, {found['steps']} steps on Shakespeare; the "
        f"mean of the last {LAST} steps, and of held-out text. The losses show mistakes (the control has "
        f"one), not which format is fine enough. `python -m bench.expert_precision`; {where(data['environment'])}."
    )
    return "\n".join([*lines, "", caption])


def offload_table(name: str) -> str:
    """Return what steps with experts in files take and hold, and a model that doesn't fit beside accelerate's way."""
    data = load(name)
    found = data["results"]
    lines = [*table_head("the file is read at", "computing", "loading", "step", "step over the longer of both")]
    for rate in found["rates"]["rates"]:
        low, high = rate["multiples"]
        speed = "any rate" if rate["gb_per_s"] is None else f"{rate['gb_per_s']:.2f} GB/s"
        seconds = (f"{rate[key]:.2f} s" for key in ("compute_s", "load_s", "step_s"))
        lines.append(table_row(speed, *seconds, f"{rate['multiple']:.2f} ({low:.2f} to {high:.2f})"))
    in_memory, offloaded = found["peak"]["in memory"], found["peak"]["offloaded"]
    rest = in_memory["peak_mb"] - in_memory["experts_mb"]
    held = rest + found["resident_mb"] + offloaded["groups_mb"]
    lines += [
        "",
        f"One layer, D={found['hidden']}, F={found['intermediate']}, E={found['experts']}, K={found['top_k']}, "
        f"T={found['tokens']}, bf16, forward and gradient of x; medians of {found['rounds']} interleaved rounds, and "
        f"the range of the last column. {found['rates']['in_memory_mb']} of {found['rates']['experts_mb']} MB are in "
        'memory, and the files are in the page cache, so "any rate" is that of memory.',
        "",
        f"Memory of the process: a step with {in_memory['experts_mb']:.0f} MB of experts in memory holds "
        f"{in_memory['peak_mb']:.0f} MB at its peak; with the experts in a file {offloaded['peak_mb']:.0f} MB. All but "
        f"the experts ({rest:.0f}), `resident_bytes` ({found['resident_mb']:.0f}) and two groups "
        f"({offloaded['groups_mb']:.0f}) are {held:.0f} MB.",
        "",
        *table_head("model", "loads", "generates", "attention's adapters", "experts' adapters"),
    ]
    for run in found["model"]["runs"]:
        limit = f"{found['limit_mb']:,.0f} MB" if run["is_limited"] else "no limit"
        cells = []
        for part in ("load", "generate", "attention", "train"):
            failed = run.get(f"{part}_failed")
            took = f"{run[f'{part}_s']:.1f} s, {run[f'{part}_mb']:,.0f} MB"
            cells.append(took if failed is None else f"fails: `{failed.split(': ', 1)[1].split(' from ')[0]}`")
        lines.append(table_row(f"{run['variant']}, {limit}", *cells))
    lines += [
        "",
        f"A Mixtral with {found['model']['experts_mb']:,.0f} MB of experts ({found['layers']} layers, E="
        f"{found['model_experts']}, K=2); the limit is RLIMIT_DATA, and what is shown is what the process has resident "
        "at its peak, libraries included. It generates 16 tokens, trains adapters on its attention for 5 steps of "
        f"{found['sequence']} tokens, and on its experts for {found['steps']}, with activation checkpointing; "
        "one run each. "
        "The limit also counts the files that accelerate maps while a backward needs them. "
        f"`python -m bench.offload`; {where(data['environment'])}.",
    ]
    return "\n".join(lines)
