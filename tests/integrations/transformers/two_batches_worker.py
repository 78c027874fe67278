"""What every rank of test_transformers_two_batches.py runs: `torchrun two_batches_worker.py DIRECTORY CASE...`."""

import copy
import time
from pathlib import Path
from typing import Any

import expert_parallel_worker
import pytest
import torch
import torch.distributed as dist
import transformers
from expert_parallel_training_worker import check_training
from expert_parallel_worker import (
    OVERLAP,
    SIZES,
    batch,
    enable_checkpoints,
    main,
    make_model,
    random_recording,
    rank,
    size,
    whole,
)
from test_families import REACHED
from test_families import make_model as model_of_family
from torch import Tensor, nn

from tritonmoe.integrations import transformers as tmt
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.placement.expert_shards import shards_of

NUM_SEQUENCES = 4 + rank
"""So that ranks have other numbers, one of them an odd one."""


def padded_batch() -> dict[str, Tensor]:
    """Sequences of other lengths, some padded at the front and some at the end; prompts have no target."""
    generator = torch.Generator().manual_seed(10 + rank)
    ids = torch.randint(2, 64, (NUM_SEQUENCES, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    mask[-1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    found = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: output[name].detach() for name in ("loss", "logits", "aux_loss") if output.get(name) is not None}
    if output.get("router_logits") is not None:
        found |= {f"router_logits {i}": logits.detach() for i, logits in enumerate(output.router_logits)}
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], allowed: float = 2e-5) -> None:
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    for name, value in actual.items():
        error = ((value - expected[name]).norm() / expected[name].norm().clamp(min=1e-4)).item()
        assert error < allowed, (name, error)


def spread(model: nn.Module) -> nn.Module:
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    return model.train()


def compare(model: nn.Module, inputs: dict[str, Any]) -> None:
    expected = step(model, inputs)
    halved = tmt.two_batches(model)
    actual = step(model, inputs)
    assert halved.choice.startswith("two halves"), halved.choice
    assert_close(actual, expected)
    again = step(model, inputs)
    assert all(torch.equal(actual[name], again[name]) for name in actual)
    halved.remove()
    assert_close(step(model, inputs), expected, 1e-12)


def run_family(name: str, directory: Path) -> None:
    if name not in REACHED:
        return
    model = spread(model_of_family(name))
    for module in model.modules():
        for name in ("p", "router_jitter_noise", "input_jitter_noise"):  # random numbers in training
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    compare(model, padded_batch())
    if hasattr(model, "router_aux_loss_coef"):
        compare(model, {**padded_batch(), "output_router_logits": True})


def run_calls(name: str, directory: Path) -> None:
    """Everything else that a caller may ask of a forward."""
    model = spread(make_model(name))
    inputs = padded_batch()
    positions = torch.arange(9)[None]
    for more in (
        {"num_items_in_batch": torch.tensor(17)},
        {"num_items_in_batch": 17, "position_ids": positions},
        {"position_ids": positions.expand(NUM_SEQUENCES, -1), "logits_to_keep": 0},
        {
            "use_cache": False,
            "shift_labels": torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous(),
        },
        {"input_ids": None, "inputs_embeds": torch.randn(NUM_SEQUENCES, 9, 32)},
    ):
        compare(model, {**inputs, **more})
    halved = tmt.two_batches(model)
    loss, logits = model(**inputs, return_dict=False)
    output = model(inputs["input_ids"], output_hidden_states=True, output_attentions=True)
    assert loss.shape == ()
    assert logits.shape == (NUM_SEQUENCES, 9, 64)
    halved.remove()
    expected = model(inputs["input_ids"], output_hidden_states=True, output_attentions=True)
    for of in ("hidden_states", "attentions"):
        for part, wanted in zip(output[of], expected[of], strict=True):
            torch.testing.assert_close(part, wanted, atol=1e-5, rtol=1e-4)
    tmt.two_batches(model)

    with pytest.raises(ValueError, match="can't split pixel_values"):
        model(**inputs, pixel_values=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"can't split attention_mask \(a \(2, 9\) tensor\)"):
        model(**{**inputs, "attention_mask": torch.ones(2, 9)})
    with pytest.raises(ValueError, match="in halves already"):
        tmt.two_batches(model)
    with pytest.raises(ValueError, match="parallelize"):
        tmt.two_batches(make_model(name))
    model.loss_function = lambda *_, **__: torch.zeros(())
    with pytest.raises(ValueError, match="computes its loss itself"):
        model(**inputs)


def model_of_three_positions() -> nn.Module:
    """Qwen3-VL-MoE: it turns by time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    sizes = {"num_experts": 8, "moe_intermediate_size": 12, "decoder_sparse_step": 1, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config={**SIZES, **sizes}, vision_config=vision, image_token_id=60)
    torch.manual_seed(0)
    return transformers.Qwen3VLMoeForConditionalGeneration._from_config(config, experts_implementation="eager")


def run_positions(name: str, directory: Path) -> None:
    """Positions whose second dimension is the batch, whose first one has the batch's size in two of these batches."""
    model = spread(model_of_three_positions())
    for num_sequences in (3, 4, 5):
        ids = torch.randint(2, 55, (num_sequences, 7), generator=torch.Generator().manual_seed(rank))
        text = torch.arange(7) + torch.arange(num_sequences)[:, None]
        turned = torch.stack([text * 2, text + 5, text])
        for positions in (turned, torch.cat([text[None], turned]), turned[:, :1]):
            compare(model, {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False})


def run_whole(name: str, directory: Path) -> None:
    """Where some rank has one sequence, or a cache is asked for, all ranks run their batches whole."""
    model = spread(make_model(name))
    halved = tmt.two_batches(model)
    inputs = padded_batch()
    few = {key: value[: 1 if rank else 3] for key, value in inputs.items()}
    actual = step(model, few)
    assert halved.choice == "one batch: the batch of some rank has 1 sequences, and one sequence is not split"
    halved.remove()
    assert_close(actual, step(model, few), 1e-12)
    model.eval()
    prompts = inputs["input_ids"][:2, :4]
    expected = model.generate(prompts, max_new_tokens=6, do_sample=False, synced_gpus=True)
    halved = tmt.two_batches(model)
    assert torch.equal(model.generate(prompts, max_new_tokens=6, do_sample=False, synced_gpus=True), expected)
    assert "cache" in halved.choice
    with torch.no_grad():
        logits = model(prompts, use_cache=False).logits
    assert halved.choice == "two halves, of 1 and 1 sequences"
    halved.remove()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(prompts).logits, atol=1e-5, rtol=1e-4)


def run_checkpointed(name: str, directory: Path) -> None:
    model = spread(make_model(name))
    inputs = padded_batch()
    expected = step(model, inputs)
    tmt.two_batches(model)
    halves = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = step(model, inputs)
    assert_close(halves, expected)
    assert all(torch.equal(halves[key], checkpointed[key]) for key in halves)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step(model, inputs)


def run_replayed(name: str, directory: Path) -> None:
    """A recording of whole batches, laid out as the halves' calls are, gives halves what the whole batch gets."""
    inputs = padded_batch()
    shape = inputs["input_ids"].shape
    recording = random_recording(shape.numel())
    index, first = torch.arange(shape.numel()).view(shape), (NUM_SEQUENCES + 1) // 2
    of_halves = recording.rearranged(index[:first], index[first:])
    model = spread(make_model(name))
    with tmt.replay_routing(model, recording):
        expected = step(model, inputs)
    halved = tmt.two_batches(model)
    for options in (None, {"use_reentrant": False}):
        if options is not None:
            enable_checkpoints(model, options)
        with tmt.replay_routing(model, of_halves), tmt.record_routing(model) as replayed:
            actual = step(model, inputs)
        assert halved.choice.startswith("two halves"), halved.choice
        assert_close(actual, expected)
        assert set(of_halves.agreement(replayed).values()) == {1.0}
    tokens = f"{shape.numel()} tokens and 3 ids each, and this forward has {first * shape[1]} tokens"
    with pytest.raises(ValueError, match=tokens), tmt.replay_routing(model, recording):
        step(model, inputs)


def run_copied(name: str, directory: Path) -> None:
    """A copy runs itself, not the model that it was copied from."""
    model = spread(make_model(name))
    tmt.two_batches(model)
    copied = copy.deepcopy(model)
    inputs = padded_batch()
    expected = step(model, inputs)
    model.zero_grad()
    assert_close(step(copied, inputs), expected, 1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def run_auto(name: str, directory: Path) -> None:
    """Both ways are tried and one is kept, the same on both ranks, of which one is slow in other steps."""
    model = spread(make_model(name))
    halved = tmt.two_batches(model, "auto")
    inputs = padded_batch()
    results = []
    choices = []
    for number in range(halved.trial.num_settling + 12):
        results.append(step(model, inputs))
        choices.append(halved.choice)
        time.sleep(0.01 * ((number + rank) % 2))
    assert_close(results[-1], results[0])
    for result in results[halved.trial.num_settling :]:
        assert_close(result, results[0])
    assert "before two halves are tried" in choices[0]
    assert sum("trying both ways" in choice for choice in choices) == 8
    reports = [shards_of(experts).calls.last_report for experts in experts_modules(model).values()]
    assert all(report.choice.endswith(f"({halved.choice})") for report in reports)
    assert "two halves were" in choices[-1]
    kept = torch.tensor([int(halved.trial.decision)])
    assert choices[-1].startswith("two halves, of " if halved.trial.decision else "one batch: ")
    both = [torch.empty_like(kept) for _ in range(size)]
    dist.all_gather(both, kept)
    assert len({int(one) for one in both}) == 1
    model.eval()
    with torch.no_grad():
        model(inputs["input_ids"], use_cache=False)
    assert halved.choice.startswith("two halves")
    with pytest.raises(ValueError, match="when must be"):
        tmt.two_batches(model, "never")


def run_trainer(name: str, directory: Path) -> None:
    halves = []

    def make_spread() -> nn.Module:
        model = make_model(name).train()
        tmt.parallelize(model, dist.group.WORLD, OVERLAP)
        halves.append(tmt.two_batches(model))
        return model

    check_training(name, make_spread, directory)
    assert any(halved.choice.startswith("two halves") for halved in halves), [halved.choice for halved in halves]


CASES = {
    "family": run_family,
    "calls": run_calls,
    "positions": run_positions,
    "whole": run_whole,
    "checkpointed": run_checkpointed,
    "copied": run_copied,
    "replayed": run_replayed,
    "auto": run_auto,
    "trainer": run_trainer,
}

if __name__ == "__main__":
    assert expert_parallel_worker.size == size
    transformers.logging.set_verbosity_error()
    batch()
    main(CASES)
