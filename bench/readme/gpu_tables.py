"""What a day with a GPU has measured."""

from collections.abc import Collection

from bench.readme.results import RESULTS, table_head, table_row
from tritonmoe.tools.benchmarks.kept_results import read_results
from tritonmoe.tools.benchmarks.shapes import GPU_SHAPES

__all__ = ["gpu_memory_table", "gpu_table", "gpu_training_table"]

GPU_COLUMNS = ((32768, "forward"), (32768, "forward+backward"), (4096, "forward+backward"), (8, "forward"))
COMPILING = "D peers that compile"
"""So begin the cases of peers that are timed in rounds of their own."""
NO_PEERS = ("tritonmoe", "tritonmoe, tuned", "torch backend", "dense products")


def gpu_table(name: str) -> str:
    """Return forward and forward + backward of every shape beside its peers; a cell that no line has says so."""
    lines = _last_run(name)
    layers = {
        (of["shape"], of["num_tokens"], "forward+backward" if of["backward"] else "forward"): line
        for line in lines.values()
        if (of := line.get("arguments", {})).get("others") and of["routing"] == "uniform"
    }
    compiling = [line for case, line in lines.items() if case.startswith(COMPILING)]
    for line in compiling:
        of = line["arguments"]
        key = of["shape"], of["num_tokens"], "forward+backward" if of["backward"] else "forward"
        if key in layers:
            layers[key] = _with_others(layers[key], line)
    table = [
        f"{_command(lines, bool(layers))}. TFLOP/s of moe_mlp in bf16, its fraction of dense products of the same "
        "FLOPs in the same rounds, and how many times as fast as the fastest peer that was timed in the same way, and "
        f"its name; uniform routing.{_peers([*layers.values(), *compiling])}",
        "",
        *table_head("shape", *(f"T = {num_tokens}, {way}" for num_tokens, way in GPU_COLUMNS)),
    ]
    for shape in GPU_SHAPES:
        cells = [gpu_cell(layers.get((shape, num_tokens, way), {})) for num_tokens, way in GPU_COLUMNS]
        table.append(table_row(shape, *cells))
    return "\n".join(table)


def _last_run(name: str) -> dict[str, dict]:
    """Return the lines of the last run in a file of results, by case; none where there is no such file."""
    lines = read_results(RESULTS / f"{name}.jsonl")
    return {line["case"]: line for line in lines if line["run"] == lines[-1]["run"]}


def _command(lines: dict[str, dict], is_measured: bool) -> str:
    device = lines["identity"]["device"] if is_measured else "a GPU: not measured yet"
    return f"`python -m bench.gpu` on {device}"


def gpu_memory_table(name: str) -> str:
    """Return what a layer keeps for its backward and holds at most in a step, and each of its peers."""
    lines = _last_run(name)
    line = lines.get("D memory", {})
    memory = dict(line.get("memory", {}))
    of = line.get("arguments", {})
    for case, other in lines.items():
        if case.startswith(COMPILING) and other["arguments"]["num_tokens"] == of.get("num_tokens"):
            memory |= {name: held for name, held in other.get("memory", {}).items() if name not in memory}
    layer = f", {of['shape']}, T = {of['num_tokens']}, {of['routing']} routing" if memory else ""
    text = (
        f"{_command(lines, bool(memory))}. Megabytes that a layer's forward keeps for the backward, beside x and the "
        f"weights, and the most that a forward and backward hold beside both, in bf16{layer}."
    )
    rows = [table_row(peer, f"{of['kept_mb']:.0f}", f"{of['peak_mb']:.0f}") for peer, of in memory.items()]
    return "\n".join([text, "", *table_head("experts", "kept", "peak"), *rows]) if rows else text


def gpu_training_table(name: str) -> str:
    """Return tokens per second and memory of a model's training steps under every implementation of its experts."""
    lines = _last_run(name)
    (case,) = lines.get("D training", {}).get("results") or [None]
    text = (
        f"{_command(lines, case is not None)}. Forward and backward of four layers of Qwen3-MoE with Qwen3-30B-A3B's "
        "experts in bf16, the same model under each implementation of transformers' experts in turn, as `tritonmoe "
        "bench transformers` measures it: tokens per second, and the most megabytes of a step beside the weights."
    )
    if case is None:
        return text
    first = case["times"]["tritonmoe"]["median_ms"]
    rows = [
        table_row(
            implementation,
            f"{1e3 * case['T'] / timed['median_ms']:.0f}",
            f"{first / timed['median_ms']:.2f}",
            f"{case['peak_mb'][implementation]:.0f}",
        )
        for implementation, timed in case["times"].items()
    ]
    return "\n".join([text, "", *table_head("experts", "tokens/s", "of tritonmoe's", "peak MB"), *rows])


def _with_others(line: dict, other: dict) -> dict:
    """Return a layer's line with the peers of another line, as fast beside ours as they are there."""
    times, others = line.get("times"), other.get("times", {})
    if times is None or "tritonmoe" not in others:
        return line
    ratio = times["tritonmoe"]["us"] / others["tritonmoe"]["us"]
    added = {name: {**timed, "us": ratio * timed["us"]} for name, timed in others.items() if name not in times}
    return {**line, "times": {**times, **added}}


def _peers(lines: Collection[dict]) -> str:
    """Return the sentence that names the measured peers, and why others are left out."""
    measured = sorted({name for line in lines for name in line.get("times", {})} - set(NO_PEERS))
    reasons = {name: why for line in lines for name, why in line.get("left_out", {}).items() if name not in measured}
    left_out = "; ".join(f"{name}, since {why}" for name, why in reasons.items())
    text = f" Peers: {', '.join(measured) or 'none'}." if lines else ""
    return text + (f" Left out: {left_out}." if left_out else "")


def gpu_cell(line: dict) -> str:
    if "out_of_memory" in line:
        return "out of memory"
    if "failed" in line:
        return "failed"
    if "times" not in line:
        return "not measured yet"
    times = line["times"]
    ours = times.get("tritonmoe, tuned", times["tritonmoe"])
    others = [
        (timed["us"], name)
        for name, timed in times.items()
        if name not in NO_PEERS and timed["timed_by"] == ours["timed_by"]  # events have Python between them
    ]
    fraction = f"{ours['fraction_of_dense']:.2f}" if "fraction_of_dense" in ours else "-"
    fastest, name = min(others, default=(None, ""))
    ratio = f", {fastest / ours['us']:.2f}x {name}" if fastest is not None else ""
    return f"{ours['tflops']:.0f}, {fraction}{ratio}"
