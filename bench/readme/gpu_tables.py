"""What a day with a GPU has measured, and what its rehearsals have shown."""

from collections.abc import Collection

from bench.readme.results import RESULTS, load, table_head, table_row, where
from tritonmoe.benchmarks.kept_results import read_results
from tritonmoe.benchmarks.shapes import GPU_SHAPES

__all__ = ["gpu_table", "killed_text"]

GPU_COLUMNS = ((32768, "forward"), (32768, "forward+backward"), (4096, "forward+backward"), (8, "forward"))
NO_PEERS = ("tritonmoe", "tritonmoe, tuned", "torch backend", "dense products")


def gpu_table(name: str) -> str:
    """Return forward and forward + backward of every shape beside its peers; a cell that no line has says so."""
    lines = read_results(RESULTS / f"{name}.jsonl")
    run = lines[-1]["run"] if lines else ""
    layers = {
        (of["shape"], of["num_tokens"], "forward+backward" if of["backward"] else "forward"): line
        for line in lines
        if line["run"] == run and (of := line.get("arguments", {})).get("others") and of["routing"] == "uniform"
    }
    devices = [line["device"] for line in lines if line["run"] == run and line["case"] == "identity"]
    device = devices[0] if layers else "a GPU: not measured yet"
    table = [
        f"`python -m bench.gpu` on {device}. TFLOP/s of moe_mlp in bf16, its fraction of dense products of the same "
        "FLOPs in the same rounds, and how many times as fast as the fastest peer that was timed in the same way, and "
        f"its name; uniform routing.{_peers(layers.values())}",
        "",
        *table_head("shape", *(f"T = {num_tokens}, {way}" for num_tokens, way in GPU_COLUMNS)),
    ]
    for shape in GPU_SHAPES:
        cells = [gpu_cell(layers.get((shape, num_tokens, way), {})) for num_tokens, way in GPU_COLUMNS]
        table.append(table_row(shape, *cells))
    return "\n".join(table)


def _peers(lines: Collection[dict]) -> str:
    """Say which peers were measured somewhere, and why others were not."""
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


def killed_text(name: str) -> str:
    """Return what became of the rehearsals that were killed."""
    data = load(name)
    found = data["results"]
    runs = found["runs"]
    kills = [kill for run in runs for kill in run["kills"]]
    right = sum(run["is_right"] for run in runs)
    return (
        f"`python -m bench.gpu.killed` on {where(data['environment'])}: {len(runs)} rehearsals of {found['cases']} "
        f"cases and kernels ({found['unharmed_s']:.0f} s unharmed) were killed {len(kills)} times, each at most "
        f"{max(len(run['kills']) for run in runs)} times, with {min(kill['lines'] for kill in kills)} to "
        f"{max(kill['lines'] for kill in kills)} results in the file; {right} of them lost and repeated nothing"
        f"{' (' + found['note'] + ')' if 'note' in found else ''}."
    )
