"""break_even_table(): with how many tokens for each expert its loading, from host memory or a disk, hides."""

from tritonmoe.config.formats import find_format
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.job import FROZEN
from tritonmoe.tools.planner.model_config import Model

__all__ = ["break_even_table", "tokens_to_hide"]


def tokens_to_hide(bytes_per_number: float, bytes_per_s: float, flop_per_s: float) -> float:
    """Return for how many tokens multiplying by an expert takes as long as loading it, whatever its widths are.

    Each number of an expert is loaded once, and multiplied and added once for each token: two FLOP.
    """
    return bytes_per_number * flop_per_s / (2 * bytes_per_s)


def break_even_table(model: Model, cluster: Cluster, gb_per_s: float, tokens: int) -> str:
    """Return what experts that stay outside of a GPU's memory need, a row for each way in which they can be stored.

    Args:
        gb_per_s: at which they are loaded, 1e9 bytes.
        tokens: of one pass.
    """
    peak = cluster.gpu.tflops["bf16"] * 1e12
    reached = peak * cluster.gpu.grouped_efficiency.value
    have = tokens * model.top_k / model.num_experts
    lines = [
        f"Experts of {model.name} outside of the memory of a GPU of {cluster.name}, loaded at {gb_per_s:g} GB/s, which "
        f"multiplies in bf16 at {peak / 1e12:,.0f}e12 FLOP/s at most and is assumed to reach "
        f"{reached / 1e12:,.0f}e12. A pass of {tokens:,} tokens has {have:,.0f} of them for each expert. Tokens per "
        "expert at which loading hides:",
        "",
        f"{'experts in':<12}{'bits':>6}{'at the peak':>14}{'as reached':>13}  this pass",
    ]
    for name in FROZEN:
        bytes_per_number = 2.0 if name == "bf16" else find_format(name).bytes_per_value
        at_peak, needed = (tokens_to_hide(bytes_per_number, gb_per_s * 1e9, flops) for flops in (peak, reached))
        waits = f"waits {1 - have / needed:.0%} of its time" if have < needed else "hides it"
        lines.append(f"{name:<12}{8 * bytes_per_number:>6.2f}{at_peak:>14,.0f}{needed:>13,.0f}  {waits}")
    return "\n".join(
        [*lines, "", "More tokens a pass, fewer bits, or a faster link make a pass wait less. Computed, not measured."]
    )
