"""`python -m bench.torchtitan`: a step of torchtitan's debug models, by its own experts and by the override.

Two processes in network namespaces, joined by links of a given rate, each with one core, train from the same first
weights, expert parallel with FSDP2: torchtitan's program with its own experts and with tritonmoe's, in turn. A step's
time is that between the ends of two steps on rank 0; the first ones, in which the override chooses its chunks, are left
out. Beside it stands the time of the routed experts' forwards in a step. It runs in a venv that has torchtitan
(`bash .ci/framework torchtitan --install`), with what the tests make up for a CPU (tests/integrations/torchtitan).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.namespaces import Namespaces, parse_rate
from tritonmoe.tools.benchmarks.timing import Samples, add_arguments, package_versions, ratio, summarize, write_json

__all__ = ["MODELS", "OVERRIDE", "RUN", "arguments", "main"]

TESTS = Path(__file__).parents[1] / "tests" / "integrations" / "torchtitan"
RUN = TESTS / "run_torchtitan.py"
MODELS = {"qwen3": "qwen3_moe_debug", "deepseek_v3": "deepseek_v3_debugmodel"}
OVERRIDE = ("--override.imports", "tritonmoe.integrations.torchtitan.routed_experts")
VARIANTS = {"own": (), "tritonmoe": OVERRIDE}
SIZE, BATCH = 2, 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.torchtitan", description=__doc__)
    parser.add_argument("--rate", default="1gbit", help="of each process's link (default 1gbit)")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of a run (default 5)")
    parser.add_argument("--warm-up", type=positive, default=4, help="steps before them (default 4)")
    parser.add_argument(
        "--tokens", type=positive, default=512, help="of a sequence, of which a rank has 2 (default 512)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    add_arguments(parser, rounds=2)
    return parser


def arguments(directory: Path, model: str, name: str, **settings: object) -> list[str]:
    """Return the arguments of torchtitan's program on write_small_data's folders; checkpoints are kept by name.

    Args:
        settings: by the names of torchtitan's options, "__" for a dot.
    """
    of_all = {
        "--module": model,
        "--config": MODELS[model],
        "--hf_assets_path": directory / "tokenizer",
        "--dataloader.dataset_path": directory / "texts",
        "--dump_folder": directory / model,
        "--checkpoint.folder": name,
        "--parallelism.spmd_backend": "partial_dtensor",
        **{f"--{option.replace('__', '.')}": value for option, value in settings.items()},
    }
    return [*(str(part) for setting in of_all.items() for part in setting), "--checkpoint.enable"]


def command(directory: Path, model: str, name: str, **settings: object) -> list[str]:
    """Return the command of one rank of torchtitan's program."""
    losses = directory / f"{model}-{name}.json"
    of_all = {"checkpoint__interval": 1000, "training__local_batch_size": BATCH, **settings}
    return [sys.executable, str(RUN), str(losses), *arguments(directory, model, name, **of_all)]


def run_alone(command: list[str]) -> None:
    """Run torchtitan's program in one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    subprocess.run([*torchrun, *command[1:]], check=True, capture_output=True, timeout=300)


def step_times(
    directory: Path, model: str, variant: str, run: int, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Return the seconds of the timed steps of one run over two ranks, and of the routed experts' forwards in each."""
    name = f"{variant}-{run}"  # in a folder of its own, from whose checkpoint a later run would go on
    settings = {
        "checkpoint__initial_load_path": directory / model / "seed" / "step-0",
        "training__steps": options.warm_up + options.steps,
        "training__seq_len": options.tokens,
        "parallelism__expert_parallel_degree": SIZE,
    }
    log = directory / "log"
    quietly = ["sh", "-c", f'exec "$@" > {log}$RANK 2>&1', "sh"]
    ranks = [*command(directory, model, name, **settings), "--training.disable_cuda_graphs", *VARIANTS[variant]]
    with Namespaces([*quietly, *ranks], SIZE, parse_rate(options.rate)) as processes:
        if status := processes.run(timeout_s=30):
            sys.exit(f"torchtitan's program ended with {status}:\n{Path(f'{log}0').read_text()[-4000:]}")
    ends, experts_s = (
        json.loads((directory / f"{model}-{name}.{what}").read_text())[-options.steps - 1 :]
        for what in ("times", "experts")
    )
    return [later - earlier for earlier, later in itertools.pairwise(ends)], experts_s[1:]


def measure(directory: Path, model: str, options: argparse.Namespace) -> tuple[Samples, Samples]:
    """Return the seconds of steps with each variant's experts, and of these experts' forwards."""
    run_alone([*command(directory, model, "seed"), "--checkpoint.create_seed_checkpoint"])
    samples: Samples = {name: [] for name in VARIANTS}
    of_experts: Samples = {name: [] for name in VARIANTS}
    for number in range(options.rounds):
        order = [*VARIANTS] if number % 2 == 0 else [*VARIANTS][::-1]
        for name in order:
            steps_s, experts_s = step_times(directory, model, name, number, options)
            samples[name] += steps_s
            of_experts[name] += experts_s
    return samples, of_experts


def main(argv: list[str] | None = None) -> None:
    """Print what a step takes with either experts."""
    options = make_parser().parse_args(argv)
    sys.path.insert(0, str(TESTS))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    from small_data import write_small_data

    results = {}
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            write_small_data(Path(name))
            os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": f"{name}/cache"}
            measured = measure(Path(name), model, options)
        rows, experts = ({variant: summarize(of) for variant, of in samples.items()} for samples in measured)
        results[model] = {**rows, "experts": experts, "speed_up": ratio(rows["own"], rows["tritonmoe"])}
        for variant, row in rows.items():
            of_experts = experts[variant]["median_ms"]
            print(f"{model:>12} {variant:>9}: a step {row['median_ms']:.0f} ms, experts' forwards {of_experts:.0f} ms")
        print(f"{model:>12}: {results[model]['speed_up']:.2f} times as fast")
    settings = {"rate": options.rate, "tokens": options.tokens, "rounds": options.rounds}
    write_json(options.json, "torchtitan", {**settings, **package_versions("torchtitan"), "models": results})


if __name__ == "__main__":
    main()
