"""`python -m bench.offload`: what experts in files cost, in time and in memory, on a CPU.

Three measurements, each in processes of its own. Steps of one layer while a stand-in lets the reader read no faster
than at three rates: those at which loading takes half as long as computing, as long, and twice as long. The most that
a process holds with experts in a file, beside the same step with experts in memory. And a Mixtral whose experts are
three times the memory that its process may have (RLIMIT_DATA): it generates, then PEFT's adapters train, with
activation checkpointing, beside the same model with accelerate's offload to disk (`device_map`).
"""

import argparse
import copy
import functools
import gc
import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tritonmoe as tm
from bench.quantized import forget_peak, resident_mb
from tritonmoe.runtime.files import Json
from tritonmoe.runtime.weight_files import WeightFile
from tritonmoe.tools.benchmarks.argument_types import positive
from tritonmoe.tools.benchmarks.timing import add_arguments, write_json

__all__ = ["main"]

LOADS = (0.5, 1.0, 2.0)
"""How long loading takes, as a multiple of computing."""
VOCABULARY, PROMPT, NEW_TOKENS, ADAPTER_RANK, FEW_STEPS = 1024, 16, 16, 2, 5
PEAK_TOKENS = 1024
"""So few that the experts are most of what a step holds."""
THRIFTY = {"MALLOC_ARENA_MAX": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
"""The environment of a model's process: without these, what other libraries keep takes half of the limit."""


class _RateLimit:
    """Stands in for a slow disk: all reads of a file together get so many bytes a second, if a rate is set."""

    def __init__(self, file: WeightFile) -> None:
        self.bytes_per_s: float | None = None
        self._read = file.read
        self._lock, self._free_at = threading.Lock(), 0.0
        file.read = self._limited  # type: ignore[method-assign]

    def _limited(self, memory: memoryview, offset: int) -> None:
        if self.bytes_per_s is None:
            self._read(memory, offset)
            return
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + len(memory) / self.bytes_per_s
            until = self._free_at
        self._read(memory, offset)
        time.sleep(max(0.0, until - time.perf_counter()))


class _LayerStep:
    """One layer with frozen experts, and its step: forward, and the gradient of x."""

    def __init__(self, given: argparse.Namespace) -> None:
        config = tm.MoEConfig(given.hidden, given.intermediate, num_experts=given.experts, top_k=given.top_k)
        torch.manual_seed(0)
        self.experts = tm.GroupedExperts(config, dtype=torch.bfloat16).requires_grad_(False)
        self.x = torch.randn(given.tokens, given.hidden).bfloat16().requires_grad_()
        self.topk_ids = torch.rand(given.tokens, given.experts).topk(given.top_k).indices
        self.topk_weights = torch.rand(given.tokens, given.top_k)

    def seconds(self, experts: nn.Module) -> float:
        started = time.perf_counter()
        experts(self.x, self.topk_ids, self.topk_weights).sum().backward()
        return time.perf_counter() - started


def measure_rates(given: argparse.Namespace) -> Json:
    """Return how long a step takes at each rate of reading, as a multiple of max(loading, computing)."""
    step = _LayerStep(given)
    offloaded = copy.deepcopy(step.experts)
    with tempfile.TemporaryDirectory() as folder:
        offload = tm.offload_experts(offloaded, folder)
        file = offload.reader().weights[0].source
        assert isinstance(file, WeightFile)
        limit = _RateLimit(file)
        figures = offload.reader().figures

        def read(at: float | None) -> tuple[float, int]:
            limit.bytes_per_s, before = at, figures.num_bytes
            return step.seconds(offloaded), figures.num_bytes - before

        for _ in range(2):
            compute_s = step.seconds(step.experts)
            _, num_bytes = read(None)
        compute_s = statistics.median(step.seconds(step.experts) for _ in range(3))
        rates: dict[str, float | None] = {"none": None}
        rates |= {str(load): num_bytes / (load * compute_s) for load in LOADS}
        rounds: dict[str, list[Json]] = {name: [] for name in rates}
        for _ in range(given.rounds):
            compute_s = step.seconds(step.experts)
            for name, rate in rates.items():
                step_s, num_bytes = read(rate)
                load_s = 0.0 if rate is None else num_bytes / rate
                rounds[name].append({"compute_s": compute_s, "load_s": load_s, "step_s": step_s, "mb": num_bytes / 1e6})
        total = sum(weight.nbytes for weight in offload.reader().weights)
        return {
            "experts_mb": round(total / 1e6, 1),
            "in_memory_mb": round(offload.reader().limit_bytes / 1e6, 1),
            "rates": [_summarize_rate(name, rates[name], of_rate) for name, of_rate in rounds.items()],
        }


def _summarize_rate(name: str, rate: float | None, rounds: list[Json]) -> Json:
    multiples = [one["step_s"] / max(one["load_s"], one["compute_s"]) for one in rounds]
    medians = {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
    return {
        "load": name,
        "gb_per_s": None if rate is None else round(rate / 1e9, 3),
        **medians,
        "multiple": round(statistics.median(multiples), 3),
        "multiples": [round(min(multiples), 3), round(max(multiples), 3)],
    }


def measure_peak(given: argparse.Namespace, is_offloaded: bool) -> Json:
    """Return the most that this process holds in steps of a layer, above what it held before it had any experts."""
    warm = _LayerStep(argparse.Namespace(**{**vars(given), "experts": given.top_k, "tokens": 64}))
    for _ in range(2):
        warm.seconds(warm.experts)
    del warm
    gc.collect()
    before_mb = resident_mb("VmRSS")
    step = _LayerStep(argparse.Namespace(**{**vars(given), "experts": given.model_experts, "tokens": PEAK_TOKENS}))
    found: Json = {}
    with tempfile.TemporaryDirectory() as folder:
        if is_offloaded:
            resident_bytes = int(given.resident_mb * 1e6)
            reader = tm.offload_experts(step.experts, folder, resident_bytes=resident_bytes).reader()
            found["groups_mb"] = round(2 * reader.group_bytes / 1e6, 1)
        else:
            found["experts_mb"] = round(sum(one.nbytes for one in step.experts.parameters()) / 1e6, 1)
        gc.collect()
        forget_peak()
        for _ in range(4):
            step.seconds(step.experts)
        return {**found, "peak_mb": round(resident_mb("VmHWM") - before_mb, 1)}


def make_model(folder: Path, given: argparse.Namespace) -> Json:
    """Write a Mixtral of random weights as a checkpoint; return the megabytes of its experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=given.model_experts,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    of_experts = [one for name, one in model.named_parameters() if ".experts." in name]
    return {"experts_mb": round(sum(one.nbytes for one in of_experts) / 1e6, 1)}


def _read_unmapped(*args: Any, **kwargs: Any) -> Any:
    """Open a checkpoint as transformers does, but read from it instead of mapping it."""
    return importlib.import_module("safetensors").safe_open(*args, **{**kwargs, "backend": "pread"})


def run_model(folder: Path, given: argparse.Namespace, variant: str, is_limited: bool) -> Json:
    """Return the time and the memory of training adapters and of generating, or how it failed."""
    import peft
    from transformers import MixtralConfig, MixtralForCausalLM, modeling_utils

    from tritonmoe.integrations import transformers as tmt

    torch.set_num_threads(2)
    if is_limited:
        limit_bytes = int(given.limit_mb * 1e6)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    # As on Windows: the limit would count a file that is mapped.
    setattr(modeling_utils, "safe_open", _read_unmapped)  # noqa: B010
    found: Json = {"variant": variant, "is_limited": is_limited}
    with torch.device("meta"):
        config = MixtralConfig.from_pretrained(folder)
        skeleton = MixtralForCausalLM(config)
    device_map = {
        name: "disk" if name.endswith("experts") else "cpu"
        for name, module in skeleton.named_modules()
        if module._parameters or module._buffers
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as left, tempfile.TemporaryDirectory(dir=folder.parent) as own:

        def part(name: str, run: Callable[[], Any]) -> Any:
            """Run one part, and note what it took, or how it failed."""
            gc.collect()
            forget_peak()
            started = time.perf_counter()
            try:
                return run()
            except (RuntimeError, MemoryError, OSError, ValueError, NotImplementedError) as error:
                what = re.sub(r"</.*/", "<", str(error).splitlines()[0])  # without this machine's folders
                found[f"{name}_failed"] = f"{type(error).__name__}: {what[:160]}"
            finally:
                found[f"{name}_s"] = round(time.perf_counter() - started, 2)
                found[f"{name}_mb"] = round(resident_mb("VmHWM"), 1)

        def load() -> nn.Module:
            model = MixtralForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map=device_map, offload_folder=left
            )
            model.requires_grad_(False)
            if variant == "tritonmoe":
                found["report"] = tmt.offload_experts(model, own, resident_bytes=int(given.resident_mb * 1e6))
            return model

        def generate(model: nn.Module) -> None:
            prompt = torch.arange(PROMPT).unsqueeze(0)
            model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]

        def train(model: nn.Module, name: str, num_steps: int, **where: object) -> None:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=ADAPTER_RANK, **where))  # type: ignore[arg-type]
            optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=1e-3)
            generator = torch.Generator().manual_seed(0)
            losses = []
            for _ in range(num_steps):
                ids = torch.randint(VOCABULARY, (1, given.sequence), generator=generator)
                loss = adapted(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            found[f"{name}_losses"] = [round(losses[0], 4), round(losses[-1], 4)]
            adapted.unload()

        of_experts = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        of_attention = {"target_modules": ["q_proj", "v_proj"]}
        model = part("load", load)
        if model is not None:
            part("generate", lambda: generate(model))
            part("attention", lambda: train(model, "attention", FEW_STEPS, **of_attention))
            part("train", lambda: train(model, "train", given.steps, **of_experts))
        if "report" in found:
            found["report"] = str(found["report"]).partition("; they ")[2]
        return found


def _in_process(arguments: argparse.Namespace, *part: str) -> Json:
    """Return what a part gives in a process of its own."""
    given = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(arguments).items()
        if name not in ("json", "part", "folder", "seconds") and value is not None
    ]
    command = [sys.executable, "-m", "bench.offload", "--part", *part, *given]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **(THRIFTY if part[0] == "model" else {})},
    )
    result: Json = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"part": part[0], **result}), flush=True)
    return result


def _run_part(arguments: argparse.Namespace) -> None:
    name, *rest = arguments.part
    parts: dict[str, Callable[..., Json]] = {
        "rates": lambda: measure_rates(arguments),
        "peak": lambda where: measure_peak(arguments, where == "offloaded"),
        "make": lambda folder: make_model(Path(folder), arguments),
        "model": lambda folder, variant, limited: run_model(Path(folder), arguments, variant, limited == "limited"),
    }
    print(json.dumps(parts[name](*rest)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.offload", description=__doc__)
    parser.add_argument("--tokens", type=positive, default=4096, help="of the layer's step (default 4096)")
    parser.add_argument("--hidden", type=positive, default=512, help="D (default 512)")
    parser.add_argument("--intermediate", type=positive, default=1024, help="F (default 1024)")
    parser.add_argument("--experts", type=positive, default=32, help="E (default 32)")
    parser.add_argument("--top-k", type=positive, default=4, help="K of the layer; the model has 2 (default 4)")
    parser.add_argument("--layers", type=positive, default=20, help="of the model (default 20)")
    parser.add_argument("--model-experts", type=positive, default=96, help="of each of its layers (default 96)")
    parser.add_argument("--sequence", type=positive, default=512, help="tokens of the model's step (default 512)")
    parser.add_argument("--steps", type=positive, default=50, help="of the model's training (default 50)")
    parser.add_argument("--limit-mb", type=float, default=2000.0, help="of a process, in 1e6 bytes (default 2000)")
    parser.add_argument("--resident-mb", type=float, default=100.0, help="of experts, in 1e6 bytes (default 100)")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    add_arguments(parser, rounds=7)
    arguments = parser.parse_args()
    if arguments.part:
        _run_part(arguments)
        return
    run = functools.partial(_in_process, arguments)
    results: Json = {"rates": run("rates"), "peak": {where: run("peak", where) for where in ("in memory", "offloaded")}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/checkpoint"
        results["model"] = run("make", checkpoint)
        results["model"]["runs"] = [
            run("model", checkpoint, variant, limited)
            for variant, limited in (("tritonmoe", "limited"), ("accelerate", "limited"), ("accelerate", "free"))
        ]
    given = {name: value for name, value in vars(arguments).items() if name not in ("json", "part", "seconds")}
    write_json(arguments.json, "offload", {**given, **results})


if __name__ == "__main__":
    main()
