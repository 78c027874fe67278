"""`python -m bench.quantized`: experts in 4 and 8 bits beside the same ones in bf16, on one thread of a CPU.

Forward and gradient of x of one layer with frozen experts, a step of four layers with adapters of rank 16, and the
memory of such steps, each in a process of its own. With --model: the memory of whole steps of a Qwen3-MoE model with
PEFT's adapters and AdamW instead. Variants take turns in one process; times are those of the thread (CPU time), which
other work on the machine lengthens least. Where experts4bit-qlora and bitsandbytes are installed, the step with
adapters is compared with that package's own one, on the same weights and tokens.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.ops.backends import decoding
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.step_memory import peak_mb
from tritonmoe.tools.benchmarks.timing import add_arguments, write_json

__all__ = ["main"]

HIDDEN, INNER, EXPERTS, TOP_K, LAYERS, RANK, VOCABULARY = 512, 256, 64, 8, 4, 16, 1024
VARIANTS = ("mxfp4", "fp8", "nf4", "nf4, bitsandbytes")
"""NF4 is decoded by bitsandbytes' kernel where that is installed; "nf4" is this package's own decoding."""
ROUNDS_AT_FIRST = 2
"""So many rounds warm up."""


class Layer(NamedTuple):
    """The frozen experts of one layer, packed, and decoded to bf16."""

    packed: tuple[tm.QuantizedWeight, tm.QuantizedWeight]
    plain: tuple[Tensor, Tensor]


def make_packed(variant: str, seed: int) -> tuple[tm.QuantizedWeight, tm.QuantizedWeight]:
    """Return random experts in a format, each expert rounded by itself."""
    torch.manual_seed(seed)
    shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    up, down = (tm.QuantizedWeight.pack(torch.randn(shape) * 0.02, format_of(variant)) for shape in shapes)  # type: ignore[arg-type]
    return up, down


def format_of(variant: str) -> str:
    return variant.partition(",")[0]


def decode_by(variant: str) -> None:
    """Make NF4 weights decode as the variant says."""
    decoding._threads.__dict__.clear()
    found = KERNEL if variant == "nf4, bitsandbytes" else None
    decoding.DECODERS["nf4"] = decoding.DECODERS["nf4"]._replace(foreign=lambda: found)


KERNEL = decoding.bitsandbytes_decoder()


def layer_step(weights: tuple[tm.QuantizedWeight | Tensor, ...], num_tokens: int) -> Callable[[], None]:
    """Return what runs forward and the gradient of x on the next of four batches."""
    torch.manual_seed(1)
    x, dout = torch.randn(num_tokens, HIDDEN).bfloat16(), torch.randn(num_tokens, HIDDEN).bfloat16()
    batches = [torch.rand(num_tokens, EXPERTS).topk(TOP_K).indices for _ in range(4)]
    topk_weights, calls = torch.rand(num_tokens, TOP_K).softmax(-1), [0]

    def run() -> None:
        own = x.clone().requires_grad_()
        calls[0] += 1
        tm.moe_mlp(own, batches[calls[0] % 4], topk_weights, weights[0], weights[1]).backward(dout)

    return run


def step_of_layers(
    layers: list[tuple[tm.QuantizedWeight | Tensor, ...]], num_tokens: int, has_adapters: bool
) -> Callable[[], None]:
    """Return what runs forward and backward of layers, whose experts may have adapters."""
    torch.manual_seed(2)

    def factor(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.02).bfloat16().requires_grad_()

    adapters = [
        tm.ExpertAdapters(
            factor(EXPERTS, RANK, HIDDEN),
            factor(EXPERTS, 2 * INNER, RANK),
            factor(EXPERTS, RANK, INNER),
            factor(EXPERTS, HIDDEN, RANK),
        )
        if has_adapters
        else None
        for _ in layers
    ]
    x, ids, topk_weights = tokens_of_step(num_tokens)

    def run() -> None:
        y = x.clone().requires_grad_()
        for (up, down), own in zip(layers, adapters, strict=True):
            y = y + tm.moe_mlp(y, ids, topk_weights, up, down, adapters=own)
        y.sum().backward()

    return run


def tokens_of_step(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens (num_tokens, HIDDEN) of a step, their experts and weights, the same in every call."""
    torch.manual_seed(3)
    x, topk_weights = torch.randn(num_tokens, HIDDEN).bfloat16(), torch.rand(num_tokens, TOP_K).softmax(-1)
    return x, torch.rand(num_tokens, EXPERTS).topk(TOP_K).indices, topk_weights


def step_of_experts4bit(plain: list[tuple[Tensor, ...]], num_tokens: int) -> Callable[[], None]:
    """Return what runs forward and backward of layers of experts4bit-qlora with adapters, on the same weights."""
    from experts4bit_qlora import Experts4bit, ExpertsLoRA

    torch.manual_seed(2)
    layers = [
        ExpertsLoRA(Experts4bit.from_float(up, down, quant_type="nf4"), r=RANK, alpha=RANK, dtype=torch.bfloat16)
        for up, down in plain
    ]
    for layer in layers:  # factors of zeros would leave the base's own path
        for factor in (layer.gate_up_lora_B, layer.down_lora_B):
            torch.nn.init.normal_(factor, std=0.02)
    x, ids, topk_weights = tokens_of_step(num_tokens)

    def run() -> None:
        y = x.clone().requires_grad_()
        for layer in layers:
            y = y + layer(y, ids, topk_weights)
        y.sum().backward()

    return run


def compare(runs: dict[str, Callable[[], None]], variant: str, rounds: int) -> Json:
    """Return the CPU times of the runs, which take turns, and the ratio of their medians."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    decode_by(variant)
    for number in range(rounds + ROUNDS_AT_FIRST):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number >= ROUNDS_AT_FIRST:
                samples[name].append(1e3 * (time.process_time() - start))
    packed, plain = samples["packed"], samples["bf16"]
    ratios = [one / other for one, other in zip(packed, plain, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    said = {"packed_ms": median(packed), "bf16_ms": median(plain), "ratio": median(packed) / median(plain)}
    if "experts4bit" in samples:
        said["experts4bit_ms"] = median(samples["experts4bit"])
        said["experts4bit_over_packed"] = said["experts4bit_ms"] / said["packed_ms"]
    return {
        **{name: round(value, 3) for name, value in said.items()},
        "ratio_quartiles": [round(low, 3), round(high, 3)],
    }


def peak_of(variant: str) -> float:
    """Return how much memory two steps of four layers take over imports, in megabytes; in a process of its own."""
    command = [sys.executable, "-m", "bench.quantized", "--peak-of", variant]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def measure_peak(variant: str) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layers: list[tuple[tm.QuantizedWeight | Tensor, ...]] = []
    for seed in range(LAYERS):
        if variant == "bf16":
            shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
            layers.append(tuple(torch.empty(shape, dtype=torch.bfloat16).fill_(0.01) for shape in shapes))
        else:
            layers.append(empty_layer(variant, seed))
    run = step_of_layers(layers, 1024, has_adapters=False)
    run()
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def empty_layer(variant: str, seed: int) -> tuple[tm.QuantizedWeight, tm.QuantizedWeight]:
    """Return packed experts of some values, made without any that are not packed."""
    weights = []
    for shape in ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)):
        one = tm.QuantizedWeight.pack(torch.full((1, *shape[1:]), 0.01), format_of(variant))  # type: ignore[arg-type]
        values, scales = (part.expand(EXPERTS, *part.shape[1:]).contiguous() for part in (one.values, one.scales))
        weights.append(tm.QuantizedWeight(one.format, values, scales))
    return weights[0], weights[1]


class ModelStep:
    """A whole training step of a model with frozen experts in a format, or in bf16, and adapters of them."""

    def __init__(self, variant: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, Qwen3MoeConfig

        from tritonmoe.integrations import transformers as tmt
        from tritonmoe.integrations.transformers.discovery import experts_modules

        config = Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=HIDDEN, moe_intermediate_size=INNER,
            num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2, num_experts=EXPERTS,
            num_experts_per_tok=TOP_K, mlp_only_layers=[],
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if variant in ("mxfp4", "nf4"):
            tmt.quantize_experts(model, variant)  # type: ignore[arg-type]
        else:
            tmt.patch(model)
        for experts in experts_modules(model).values() if variant == "fp8" else ():  # as a checkpoint's are loaded
            for name in ("gate_up_proj", "down_proj"):
                packed = tm.QuantizedWeight.pack(experts.get_parameter(name), "fp8")
                for own, part in ((name, packed.values), (f"{name}_scale_inv", packed.scales)):
                    experts.register_parameter(own, torch.nn.Parameter(part, requires_grad=False))
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        self.model = get_peft_model(model, LoraConfig(r=RANK, target_modules=[], target_parameters=parameters))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained)
        self.ids = torch.randint(VOCABULARY, (2, 512))

    def run(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self) -> Json:
        """Return the megabytes of the model, of the optimizer's states, and of what a step holds beside both."""
        states = [value for of in self.optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        model = [*self.model.parameters(), *self.model.buffers()]
        held: dict[str, Sequence[Tensor]] = {"model_mb": model, "adapters_mb": trained, "states_mb": states}
        sizes = {name: round(sum(one.nbytes for one in of) / 1e6, 1) for name, of in held.items()}
        return {**sizes, "step_mb": round(peak_mb(self.run), 1)}


def resident_mb(name: str) -> float:
    """Return what Linux says of this process: VmRSS now, or VmHWM, the most since forget_peak()."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024 / 1e6


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure_model(variant: str) -> Json:
    """Return the memory of a model's step, as the allocator and as the system sees it; in a process of its own."""
    import peft  # noqa: F401
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    before_mb = resident_mb("VmRSS")
    step = ModelStep(variant)
    forget_peak()
    for _ in range(2):
        step.run()
    process_mb = resident_mb("VmHWM") - before_mb  # before the profiler of memory() takes its own
    return {"variant": variant, **step.memory(), "process_mb": round(process_mb, 1)}


def measure_models() -> list[Json]:
    """Return the memory of a model's step with experts in bf16 and in each format."""
    results = []
    for variant in ("bf16", *dict.fromkeys(map(format_of, VARIANTS))):
        command = [sys.executable, "-m", "bench.quantized", "--model-memory", variant]
        results.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
        print(results[-1], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantized", description=__doc__)
    add_arguments(parser, rounds=15)
    parser.add_argument("--model", action="store_true", help="the memory of whole steps of a model; needs PEFT")
    parser.add_argument("--model-memory", metavar="FORMAT", help="print the memory of one such step alone")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        print(json.dumps(measure_peak(arguments.peak_of)))
        return
    if arguments.model_memory:
        print(json.dumps(measure_model(arguments.model_memory)))
        return
    if arguments.model:
        write_json(arguments.json, "quantized_model", measure_models())
        return
    results: list[Json] = []
    variants = [variant for variant in VARIANTS if KERNEL is not None or "bitsandbytes" not in variant]
    # first of all: a process begins with the largest memory of the one that starts it
    peaks = {variant: round(peak_of(variant)) for variant in ("bf16", *variants)}
    for variant in variants:
        layers = [make_packed(variant, seed) for seed in range(LAYERS)]
        plain = [tuple(weight.decode() for weight in layer) for layer in layers]
        result: Json = {"variant": variant}
        for num_tokens in (1024, 64):
            runs = {"bf16": layer_step(plain[0], num_tokens), "packed": layer_step(layers[0], num_tokens)}
            result[f"layer_{num_tokens}"] = compare(runs, variant, arguments.rounds)
        runs = {"bf16": step_of_layers(list(plain), 1024, True), "packed": step_of_layers(list(layers), 1024, True)}
        if format_of(variant) == "nf4" and importlib.util.find_spec("experts4bit_qlora"):
            runs["experts4bit"] = step_of_experts4bit(list(plain), 1024)
        result["adapters"] = compare(runs, variant, max(3, arguments.rounds // 2))
        packed_bytes = sum(weight.nbytes for layer in layers for weight in layer)
        result["weights"] = round(packed_bytes / sum(weight.nbytes for layer in plain for weight in layer), 3)
        result["peak_mb"], result["bf16_peak_mb"] = peaks[variant], peaks["bf16"]
        results.append(result)
        print(result, flush=True)
    write_json(arguments.json, "quantized", results)


if __name__ == "__main__":
    main()
