"""`tritonmoe upcycle IN OUT`: a dense checkpoint of transformers becomes a Mixture-of-Experts checkpoint."""

import argparse
from collections.abc import Callable

from tritonmoe.runtime.progress import Progress
from tritonmoe.tools.benchmarks.argument_types import Subparsers, positive, seed
from tritonmoe.tools.report.terminal import refused

__all__ = ["add_parser"]


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand to the parser of `tritonmoe`."""
    parser = subparsers.add_parser(
        "upcycle",
        help="turn a dense checkpoint into a Mixture-of-Experts checkpoint that computes the same",
        description="Turn a dense checkpoint of transformers (config.json and safetensors shards) into a "
        "Mixture-of-Experts checkpoint, one block at a time, so that neither model has to fit in memory. With --init "
        "copy the result computes what the dense model does.",
    )
    parser.add_argument("source", metavar="IN", help="directory of the dense checkpoint, which is not changed")
    parser.add_argument("destination", metavar="OUT", help="directory to write, which must be new or empty")
    parser.add_argument("--num-experts", type=positive, required=True)
    parser.add_argument("--top-k", type=positive, required=True, help="experts per token, a multiple of --granularity")
    parser.add_argument(
        "--granularity", type=positive, default=1, help="an expert is 1/G of the dense block (default 1)"
    )
    parser.add_argument(
        "--init",
        choices=("copy", "noise", "drop"),
        default="copy",
        help="how experts differ from the dense block: only copy is exact",
    )
    parser.add_argument("--shared-expert", action="store_true", help="add an expert that every token reaches")
    parser.add_argument("--target", default="auto", help="auto, a model type such as mixtral, or inplace")
    parser.add_argument(
        "--layers", type=_layers, default="all", help="blocks to convert, such as 0,2,4-7 (default: all)"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of an output file (default 5GB)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from tritonmoe.integrations.transformers.upcycle.checkpoint import upcycle_checkpoint

    try:
        made = upcycle_checkpoint(
            arguments.source,
            arguments.destination,
            num_experts=arguments.num_experts,
            top_k=arguments.top_k,
            granularity=arguments.granularity,
            init=arguments.init,
            shared_expert=arguments.shared_expert,
            target=arguments.target,
            layers=arguments.layers,
            seed=arguments.seed,
            max_shard_size=arguments.max_shard_size,
            progress=_progress(),
        )
    except (ValueError, OSError, ImportError) as error:
        return refused("upcycle", error)
    loader = "tritonmoe.integrations.transformers.load_upcycled" if made == "inplace" else "from_pretrained"
    print(f"{arguments.destination}: {made}, load it with {loader}")
    return 0


def _progress() -> Callable[[int, int], None]:
    """Return a function of the bytes written and the bytes in all that says on stderr how far it is."""
    progress, reached = None, 0

    def show(done: int, total: int) -> None:
        nonlocal progress, reached
        if progress is None:
            progress = Progress("upcycling", total, ("GB", 1e9))
        if done > reached:
            progress.advance(done - reached)
            reached = done

    return show


def _layers(text: str) -> str | list[int]:
    if text == "all":
        return text
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"must be all, or positions such as 0,2,4-7, got {text!r}")
        chosen += range(int(first), int(last or first) + 1)
    return chosen
