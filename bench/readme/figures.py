"""The five figures that matter most: a sentence, a picture and the way to all of them."""

from bench.readme.overlap_tables import sure_overlap
from bench.readme.pictures import picture
from bench.readme.results import load, load_all, where

__all__ = ["figures_that_matter"]


def figures_that_matter(_: str) -> str:
    """Return the beginning of the page of results."""
    sections = [_layer(), _overlap(), _exchange(), _nodes(), _doctor()]
    lines: list[str] = []
    for name, title, said, link in sections:
        lines += ["", f"### {title}", "", picture(f"result-{name}", title), "", f"{said} [All figures]({link})."]
    return "\n".join(lines).strip()


def _layer() -> tuple[str, str, str, str]:
    data = load("moe_mlp_cpu")
    wanted = {"E_K_D_F": [64, 8, 512, 256], "T": 2048, "pass": "forward+backward"}
    ratios = {case["dtype"]: case["ratio"] for case in data["results"] if wanted.items() <= case.items()}
    return (
        "layer",
        f"One layer on a CPU: {ratios['float32']:.2f} times as fast as the best of transformers",
        f"Forward and backward of 2048 tokens through 64 experts, K=8, D=512, F=256; {ratios['bfloat16']:.2f} times in "
        f"bf16. Shorter is better. `python -m bench.moe_mlp`, {where(data['environment'])}.",
        "#one-layer-on-one-device",
    )


def _overlap() -> tuple[str, str, str, str]:
    data = load("overlap_netns_both_balanced")
    results = data["results"]
    over = sure_overlap("overlap_netns_both_balanced")
    return (
        "overlap",
        f"Overlap on a real link: {over['speed_up']:.2f} times as fast as compute and exchanges in turn",
        f"One layer, {results['pass']}, on two ranks whose exchanges take as long as their compute, where overlap "
        f"gains most; {over['hidden_share']:.0%} of the shorter side is hidden. `tritonmoe bench overlap --netns 2`, "
        f"{where(data['environment'])}.",
        "#overlap-on-real-links",
    )


def _exchange() -> tuple[str, str, str, str]:
    data = load("expert_parallel_netns")
    results = data["results"]
    ours, other = (results["variants"][name] for name in ("tritonmoe, tritonmoe", results["best_other"]))
    return (
        "exchange",
        f"A model over two ranks: a training step {results['ratio']:.2f} times as fast as with transformers' exchange",
        f"A Qwen3-MoE-like model on a link of 1 Gbit/s. A rank sends {ours['sent_mb']:.0f} MB a step instead of "
        f"{other['sent_mb']:.0f}, since a token travels once to each rank that needs it. "
        f"`tritonmoe bench expert_parallel --netns 2`, {where(data['environment'])}.",
        "#a-whole-model-over-two-ranks",
    )


def _nodes() -> tuple[str, str, str, str]:
    data = load_all("overlap_nodes")
    ratios = [one["results"]["summary"]["two_levels_speed_up"] for one in data]
    return (
        "nodes",
        f"Nodes with slow uplinks: {max(ratios):.2f} times as fast with an exchange on two levels",
        "Each token goes once to every node that needs it, and from there to the ranks of the node. Two nodes of two "
        "ranks, whose own links have 1 Gbit/s. `tritonmoe bench overlap --netns 4 --node-size 2`, "
        f"{where(data[0]['environment'])}.",
        "#overlap-on-real-links",
    )


def _doctor() -> tuple[str, str, str, str]:
    data = load_all("doctor_netns")
    right, of = (sum(one["results"]["summary"]["first cause right"][name] for one in data) for name in ("right", "of"))
    return (
        "doctor",
        f"The doctor: the largest cause of a slow step named in {right} of {of} jobs on real links",
        "Jobs with injected faults that cost 15 % of a step or more, and healthy jobs, in which it must find nothing. "
        f"`python -m bench.doctor run DIR --netns 4`, {where(data[0]['environment'])}.",
        "diagnosis.md#how-good-is-the-doctor",
    )
