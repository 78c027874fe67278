"""`python -m bench.adapters`: a training step with low-rank adapters on the experts, beside frozen and trained experts.

The four-layer Qwen3-MoE-like model of `tritonmoe bench transformers`, forward and backward, in one process in
interleaved rounds, with the same weights. Whatever is no expert is trained in every variant; PEFT makes the adapters.
"multiplied out" is PEFT's own way to run them: it adds B A to the weights in every step.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from tritonmoe.experts.adapters import HANDS_OVER
from tritonmoe.integrations.transformers.bench_model import ModelSizes, qwen3_moe_model
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.step_memory import kept_for_backward_mb, peak_mb
from tritonmoe.tools.benchmarks.timing import add_arguments, interleave, ratio, summarize, write_json

__all__ = ["main"]

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
NUM_BATCHES = 16


class Variant(NamedTuple):
    """What of the experts is trained, and how it is run."""

    name: str
    rank: int = 0
    """Of adapters; 0 for none."""
    trains_experts: bool = False
    implementation: str = "tritonmoe"
    multiplies_out: bool = False


FLOOR = Variant("frozen experts")
VARIANTS = (
    FLOOR,
    Variant("trained experts", trains_experts=True),
    *(Variant(f"adapters of rank {rank}", rank) for rank in (4, 16, 64)),
    Variant("rank 16, multiplied out", 16, multiplies_out=True),
    Variant("rank 16, multiplied out, grouped_mm", 16, implementation="grouped_mm", multiplies_out=True),
)


def make_model(variant: Variant) -> Any:
    """Return the model with what the variant trains."""
    model: Any = qwen3_moe_model(ModelSizes())
    if variant.rank:
        config = LoraConfig(
            r=variant.rank,
            lora_alpha=variant.rank,
            target_modules=[],
            target_parameters=PARAMETERS,
            init_lora_weights=False,  # else B is zero, and so is A's gradient
        )
        torch.manual_seed(1)
        model = get_peft_model(model, config)
    model.set_experts_implementation(variant.implementation)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(variant.trains_experts or ".experts." not in name)
    return model.train()


@contextmanager
def peft_alone(is_wanted: bool) -> Iterator[None]:
    """Make PEFT run its adapters in its own way meanwhile."""
    wrapper: Any = ParamWrapper
    ours = wrapper._activate_lora
    if is_wanted:
        wrapper._activate_lora = getattr(wrapper, HANDS_OVER)
    try:
        yield
    finally:
        wrapper._activate_lora = ours


def step(variant: Variant, model: Any, batches: list[torch.Tensor]) -> Callable[[], None]:
    """Return what runs forward and backward on the next batch."""
    calls = itertools.count()

    def run() -> None:
        ids = batches[next(calls) % NUM_BATCHES]
        with peft_alone(variant.multiplies_out):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def memory(variant: Variant, model: Any, run: Callable[[], None], ids: torch.Tensor) -> Json:
    """Return what a step holds at most and what its forward keeps, in megabytes."""

    def forward() -> torch.Tensor:
        with peft_alone(variant.multiplies_out):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return {"peak_mb": peak_mb(run), "kept_mb": kept_for_backward_mb(forward, model.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    add_arguments(parser, rounds=15)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(2, 2048, (1, arguments.tokens), generator=generator) for _ in range(NUM_BATCHES)]
    models = {variant.name: make_model(variant) for variant in VARIANTS}
    runs = {variant.name: step(variant, models[variant.name], batches) for variant in VARIANTS}
    samples = interleave(runs, arguments.rounds)
    results = []
    for variant in VARIANTS:
        model, times = models[variant.name], summarize(samples[variant.name])
        result = {
            "variant": variant.name,
            "num_tokens": arguments.tokens,
            "trained_of_experts": sum(
                p.numel() for n, p in model.named_parameters() if p.requires_grad and ".experts." in n
            ),
            **times,
            "of_frozen": ratio(times, summarize(samples[FLOOR.name]), 3),
            **memory(variant, model, runs[variant.name], batches[0]),
        }
        results.append(result)
        print(result, flush=True)
    write_json(arguments.json, "adapters", results)


if __name__ == "__main__":
    main()
