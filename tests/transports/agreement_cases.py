"""Ranks that disagree, and ranks that do what is legal, as functions that each of two ranks runs.

Run as agreement_cases.py FOLDER RANK SIZE it is one gloo process, which runs all cases, each on a group of its own, and
writes FOLDER/RANK.json: by case, what this rank raised, and when.
"""

import copy
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.transports import ProcessGroupTransport, Transport

TIMEOUT_S = 20.0
SHORT_TIMEOUT_S = 1.0
"""Of the case in which a rank waits for nothing; the others are over much earlier."""
CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
WIDE = replace(CONFIG, hidden_size=12, intermediate_size=6)
ORDER = "every rank must make the same layers and the same calls, forward and backward, in the same order"
NUM_TOKENS = 6


@dataclass
class Disagreement:
    """A case in which every rank raises."""

    run: "Case"
    words: tuple[str, str]
    """Patterns of what rank 0 hears, and rank 1."""
    where: tuple[str, ...] = ("gloo", "emulated")


Case = Callable[[Transport], object]
DISAGREEMENTS: dict[str, Disagreement] = {}
LEGAL: dict[str, Case] = {}


def disagree(*words: str, only: str | None = None) -> Callable[[Case], Case]:
    """Add a case in which all ranks raise CountMismatch with these words, or each what its own pattern says."""

    def add(run: Case) -> Case:
        both = [word if word.startswith("^") else f"^CountMismatch: {word}" for word in words]
        DISAGREEMENTS[run.__name__] = Disagreement(run, (both[0], both[-1]))
        if only is not None:
            DISAGREEMENTS[run.__name__].where = (only,)
        return run

    return add


def are_at(first: str, second: str, why: str = ORDER) -> str:
    """Return a pattern for where rank 0 and rank 1 are."""
    return rf"the ranks disagree on which call this is \(rank 0: {first}; rank 1: {second}\): {why}"


def disagree_on(setting: str, first: str, second: str) -> str:
    return rf"the ranks disagree on {setting} of this layer call \(rank 0: {first}, rank 1: {second}\): give every rank"


def legal(run: Case) -> Case:
    LEGAL[run.__name__] = run
    return run


def layer_on(transport: Any, config: tm.MoEConfig = CONFIG, seed: int = 0, **options: Any) -> tm.MoELayer:
    overlap = options.pop("overlap", tm.OverlapConfig(2))
    return tm.MoELayer(config, transport, overlap, generator=torch.Generator().manual_seed(seed), **options)


def tokens(transport: Transport, width: int = 8, num_tokens: int = NUM_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(transport.rank)
    return torch.randn(num_tokens, width, generator=generator, requires_grad=True)


def losses_of_two_layers(transport: Transport, *configs: tm.MoEConfig) -> list[Tensor]:
    """Return the losses of two layers, each with tokens of its own."""
    configs = configs or (CONFIG, CONFIG)
    made = [layer_on(transport, config, seed) for seed, config in enumerate(configs)]
    return [layer(tokens(transport, layer.config.hidden_size)).square().sum() for layer in made]


def one_call(transport: Transport, config: tm.MoEConfig = CONFIG, **options: Any) -> Tensor:
    return layer_on(transport, config, **options)(tokens(transport, config.hidden_size))


def by_rank(transport: Transport, *values: Any) -> Any:
    return values[transport.rank]


def on_this_rank(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(layer: tm.MoELayer, *others: Tensor) -> list[Tensor]:
    """Return all gradients so far, and forget them."""
    grads = []
    for leaf in (*layer.parameters(), *others):
        assert leaf.grad is not None
        grads.append(on_this_rank(leaf.grad))
        leaf.grad = None
    return grads


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other), (one, other)


def step_of_one(layer: tm.MoELayer, transport: Transport) -> list[Tensor]:
    """Return the gradients of one step of this layer with tokens()."""
    x = tokens(transport)
    layer(x).square().sum().backward()
    return gradients(layer, x)


def expected_step(transport: Transport) -> list[Tensor]:
    """Return the gradients of one step of layer_on() with tokens()."""
    return step_of_one(layer_on(transport), transport)


# Backward


@disagree(are_at("backward of layer 0, call 0", "backward of layer 1, call 1"))
def backward_in_another_order(transport: Transport) -> None:
    losses = losses_of_two_layers(transport)
    for loss in by_rank(transport, losses, losses[::-1]):
        loss.backward()


@disagree(are_at("backward of layer 0, call 0", "backward of layer 1, call 1"))
def backward_in_another_order_where_sizes_differ(transport: Transport) -> None:
    """Without a check gloo aborts the process: a message is longer than what is received."""
    losses = losses_of_two_layers(transport, WIDE, CONFIG)
    for loss in by_rank(transport, losses, losses[::-1]):
        loss.backward()


@disagree(are_at("backward of layer 0, call 0", "backward of layer 1, call 1"))
def backward_twice_of_one_layer(transport: Transport) -> None:
    losses = losses_of_two_layers(transport)
    losses[0].backward(retain_graph=True)
    losses[by_rank(transport, 0, 1)].backward()


@disagree(are_at("backward of layer 0, call 0", "backward of layer 1, call 1"))
def backward_of_another_layers_loss(transport: Transport) -> None:
    losses_of_two_layers(transport)[transport.rank].backward()


@disagree(are_at("backward of layer 0, call 0", "backward of layer 0, call 1"))
def backward_of_another_call_of_one_layer(transport: Transport) -> None:
    layer = layer_on(transport)
    losses = [layer(tokens(transport)).sum() for _ in range(2)]
    losses[transport.rank].backward()


@disagree(are_at("backward of expert_parallel_mlp, call 1", "backward of expert_parallel_mlp, call 0"))
def backward_of_functions_in_another_order(transport: Transport) -> None:
    outs = [call_function(transport) for _ in range(2)]
    for out in by_rank(transport, outs[::-1], outs):
        out.sum().backward()


def call_function(transport: Transport, **options: Any) -> Tensor:
    ids = torch.arange(2 * NUM_TOKENS).view(NUM_TOKENS, 2) % 4
    arguments = {
        "gate_up_proj": torch.ones(2, 8, 8, requires_grad=True),
        "down_proj": torch.ones(2, 8, 4, requires_grad=True),
        "topk_weights": torch.ones(NUM_TOKENS, 2),
        "overlap": tm.OverlapConfig(2),
        **options,
    }
    return tm.expert_parallel_mlp(tokens(transport), ids, num_experts=4, transport=transport, **arguments)


@disagree(are_at("backward of layer 0, call 0", "forward of layer 0, call 1"))
def one_rank_goes_on_to_the_next_forward(transport: Transport) -> None:
    layer = layer_on(transport)
    for _ in range(2):
        loss = layer(tokens(transport)).sum()
        if transport.rank == 0:
            loss.backward()


@disagree(are_at("backward of layer 1, call 1", "forward of layer 0, call 2"))
def one_rank_raises_before_its_backward_and_goes_on(transport: Transport) -> None:
    """Rank 1 skips a batch."""
    layers = [layer_on(transport, seed=seed) for seed in range(2)]
    for step in range(2):
        try:
            out = layers[1](layers[0](tokens(transport)))
            if (step, transport.rank) == (0, 1):
                raise FloatingPointError("own code")
            out.sum().backward()
        except FloatingPointError:
            pass


@disagree(are_at("forward of layer 0, call 1", "backward of layer 0, call 0"))
def one_rank_evaluates_before_its_backward(transport: Transport) -> None:
    layer = layer_on(transport)
    out = layer(tokens(transport))
    if transport.rank == 0:
        with torch.no_grad():
            layer(tokens(transport))
    out.sum().backward()


@disagree(are_at("backward of layer 0, call 0", "forward of layer 0, call 2"))
def one_rank_leaves_a_layer_out_of_its_loss(transport: Transport) -> None:
    layers = [layer_on(transport, seed=seed) for seed in range(2)]
    for _ in range(2):
        losses = [layer(tokens(transport)).sum() for layer in layers]
        sum(losses[by_rank(transport, 0, 1) :]).backward()


@disagree(are_at("backward of layer 0, call 0", "forward of layer 0, call 1"))
def one_rank_runs_backward_twice(transport: Transport) -> None:
    layer = layer_on(transport)
    loss = layer(tokens(transport)).sum()
    loss.backward(retain_graph=True)
    if transport.rank == 0:
        loss.backward()
    layer(tokens(transport))


@disagree(are_at("forward of layer 0, call 1", "backward of layer 0, call 0"))
def one_rank_checkpoints(transport: Transport) -> None:
    """Rank 0 computes the layer again where rank 1 runs its backward."""
    layer, x = layer_on(transport), tokens(transport)
    out = checkpoint(layer, x, use_reentrant=False) if transport.rank == 0 else layer(x)
    out.sum().backward()


@disagree(
    r"^PeerFailure: ranks \[1\] refused the arguments of this layer call",
    r"^ValueError: x must be \(\.\.\., D\) with D = 8",
)
def one_rank_has_bad_arguments_where_the_other_runs_backward(transport: Transport) -> None:
    layer = layer_on(transport)
    out = layer(tokens(transport))
    if transport.rank == 1:
        layer(torch.ones(2, 9))
    out.sum().backward()


@disagree(
    r"^TransportError: before the backward of layer 0, call 0: .*timeout_s = 1\.0",
    "^RuntimeError: busy with something else",
)
def one_rank_never_comes_to_its_backward(transport: Transport) -> None:
    out = one_call(transport)
    if transport.rank == 1:
        time.sleep(1.5 * SHORT_TIMEOUT_S)
        raise RuntimeError("busy with something else")
    out.sum().backward()


# Settings


@disagree(disagree_on("expert_gradients", "mean", "sum"))
def expert_gradients(transport: Transport) -> None:
    one_call(transport, expert_gradients=by_rank(transport, "mean", "sum"))


@disagree(disagree_on("activation", "silu", "gelu"))
def activation(transport: Transport) -> None:
    one_call(transport, replace(CONFIG, activation=by_rank(transport, "silu", "gelu")))


@disagree(
    disagree_on(
        "activation",
        r"ClampedSwiGLU\(7\.0, alpha=1\.702, up_offset=1\.0\)",
        r"ClampedSwiGLU\(7\.0, alpha=1\.702, up_offset=0\.0\)",
    )
)
def numbers_of_an_activation(transport: Transport) -> None:
    offset = by_rank(transport, 1.0, 0.0)
    one_call(transport, replace(CONFIG, activation=tm.ClampedSwiGLU(7.0, 1.702, offset)))


@disagree(disagree_on("activation", "silu", "the callable glu"))
def callable_on_one_rank(transport: Transport) -> None:
    call_function(transport, activation=by_rank(transport, "silu", F.glu))


@disagree(disagree_on("activation", "the callable glu", "the callable first_half"))
def other_callables(transport: Transport) -> None:
    call_function(transport, activation=by_rank(transport, F.glu, first_half))


def first_half(h: Tensor) -> Tensor:
    return h[:, :4]


@disagree(disagree_on("interleaved", "False", "True"))
def interleaved(transport: Transport) -> None:
    one_call(transport, replace(CONFIG, interleaved=by_rank(transport, False, True)))


@disagree(disagree_on("gated", "True", "False"))
def gated(transport: Transport) -> None:
    one_call(transport, replace(CONFIG, gated=by_rank(transport, True, False)))


@disagree(disagree_on("intermediate_size", "4", "5"))
def intermediate_size(transport: Transport) -> None:
    one_call(transport, replace(CONFIG, intermediate_size=by_rank(transport, 4, 5)))


@disagree(disagree_on("gate_up_bias", "none", "a tensor"))
def bias(transport: Transport) -> None:
    one_call(transport, replace(CONFIG, bias=by_rank(transport, False, True)))


@disagree(disagree_on("wire_dtype", "None", r"torch\.bfloat16"))
def wire_dtype(transport: Transport) -> None:
    one_call(transport, overlap=tm.OverlapConfig(2, wire_dtype=by_rank(transport, None, torch.bfloat16)))


@disagree(disagree_on("dtype", r"torch\.float32", r"torch\.bfloat16"))
def dtype(transport: Transport) -> None:
    given = by_rank(transport, torch.float32, torch.bfloat16)
    layer_on(transport, dtype=given)(tokens(transport).to(given))


@disagree(disagree_on("transposed", "False", "True"))
def layout_of_replicas(transport: Transport) -> None:
    """Their gradients are summed as they lie."""
    placement = tm.ExpertPlacement(((0, 1, 2), (3, 2, 0)))
    config = replace(CONFIG, transposed=by_rank(transport, False, True))
    layer = layer_on(transport, config, placement=placement)
    layer.experts.requires_grad_(False)  # processes don't train experts in several slots
    layer(tokens(transport))


@disagree(r"ranks \[1\] run under torch\.no_grad\(\) while other ranks need gradients")
def grad_mode(transport: Transport) -> None:
    with torch.set_grad_enabled(transport.rank == 0):
        one_call(transport)


# Order and number of forwards and layers


@disagree(are_at("forward of layer 0, call 0", "forward of layer 1, call 0"))
def layers_called_in_another_order(transport: Transport) -> None:
    layers = [layer_on(transport, seed=seed) for seed in range(2)]
    for layer in by_rank(transport, layers, layers[::-1]):
        layer(tokens(transport))


@disagree(are_at("forward of layer 0, call 0", "forward of expert_parallel_mlp, call 0"))
def a_layer_meets_a_function(transport: Transport) -> None:
    layer = layer_on(transport)
    if transport.rank == 0:
        layer(tokens(transport))
    else:
        call_function(transport)


@disagree(are_at("forward of layer 0, call 1", "backward of layer 0, call 0"))
def one_rank_calls_a_layer_once_more(transport: Transport) -> None:
    layer = layer_on(transport)
    outs = [layer(tokens(transport)) for _ in range(by_rank(transport, 2, 1))]
    sum(out.sum() for out in outs).backward()


MADE = (
    r"layers were made or freed on some ranks alone \(on this transport, rank 0 has made {}, of which {} live; "
    r"rank 1 has made {}, of which {} live\)"
)


@disagree(are_at("forward of layer 2, call 0", "forward of layer 1, call 0", MADE.format(3, 3, 2, 2)))
def a_layer_made_on_one_rank_alone(transport: Transport) -> None:
    layers = [layer_on(transport) for _ in range(by_rank(transport, 3, 2))]
    layers[-1](tokens(transport))


@disagree(are_at("forward of layer 1, call 1", "forward of layer 0, call 1", MADE.format(2, 1, 1, 1)))
def a_layer_freed_and_made_again_on_one_rank_alone(transport: Transport) -> None:
    layer = layer_on(transport)
    with torch.no_grad():
        layer(tokens(transport))
        if transport.rank == 0:
            del layer
            gc.collect()
            layer = layer_on(transport)
        layer(tokens(transport))


COPY = r"a copy of a layer \(copy\.deepcopy, AveragedModel, a reference model\) is a layer of its own"


def layer_and_copies(transport: Transport, number: int = 1) -> list[tm.MoELayer]:
    """Return a layer and copies of it, each with other weights."""
    layers = [layer_on(transport)]
    layers += [copy.deepcopy(layers[0]) for _ in range(number)]
    with torch.no_grad():
        for factor, layer in enumerate(layers, 1):
            for parameter in layer.parameters():
                parameter.mul_(factor)
    return layers


@disagree(are_at("forward of layer 0, call 0", "forward of copy 1 of layer 0, call 0", COPY))
def a_copy_called_in_another_order(transport: Transport) -> None:
    layers = layer_and_copies(transport)
    for layer in by_rank(transport, layers, layers[::-1]):
        layer(tokens(transport))


@disagree(are_at("forward of copy 2 of layer 0, call 0", "forward of copy 3 of layer 0, call 0", COPY))
def clones_of_a_clone_called_in_another_order(transport: Transport) -> None:
    averaged = AveragedModel(layer_on(transport))
    clones = [copy.deepcopy(averaged) for _ in range(2)]
    for layer in by_rank(transport, clones, clones[::-1]):
        layer(tokens(transport))


@disagree(are_at("backward of layer 0, call 0", "backward of copy 1 of layer 0, call 1", COPY))
def backward_of_a_copy_in_another_order(transport: Transport) -> None:
    losses = [layer(tokens(transport)).sum() for layer in layer_and_copies(transport)]
    for loss in by_rank(transport, losses, losses[::-1]):
        loss.backward()


@disagree(are_at("forward of copy 2 of layer 0, call 0", "forward of copy 1 of layer 0, call 0", COPY))
def another_copy_made_on_one_rank_alone(transport: Transport) -> None:
    layer_and_copies(transport, by_rank(transport, 2, 1))[-1](tokens(transport))


# What is legal


@legal
def copies_called_alike(transport: Transport) -> None:
    """Also where rank 0 alone keeps a copy, of another layer, and layers are made after it."""
    other = layer_on(transport)
    averaged = copy.deepcopy(other) if transport.rank == 0 else None
    expected = expected_step(transport)
    layers = layer_and_copies(transport, 2)
    for one in (layers[1], layers[0], layers[2], layers[1]):
        step_of_one(one, transport)
    for factor, layer in enumerate(layers, 1):
        again = layer_on(transport)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.mul_(factor)
        assert_equal(step_of_one(layer, transport), step_of_one(again, transport))
    assert_equal(step_of_one(layers[0], transport), expected)
    assert (averaged is None) == (transport.rank != 0)


@legal
def backward_twice_on_all_ranks(transport: Transport) -> None:
    once = expected_step(transport)
    layer, x = layer_on(transport), tokens(transport)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_equal(gradients(layer, x), [2 * grad for grad in once])


@legal
def backwards_in_any_order_that_is_the_same(transport: Transport) -> None:
    expected = expected_step(transport)
    layers, xs = [layer_on(transport) for _ in range(3)], [tokens(transport) for _ in range(3)]
    losses = [layer(x).square().sum() for layer, x in zip(layers, xs, strict=True)]
    for i in (1, 2, 0):
        losses[i].backward()
        assert_equal(gradients(layers[i], xs[i]), expected)


@legal
def a_rank_that_needs_no_gradient_itself(transport: Transport) -> None:
    expected = expected_step(transport)
    layer = layer_on(transport)
    x = tokens(transport)
    if transport.rank == 1:
        layer.requires_grad_(False)
        x = x.detach()
    layer(x).square().sum().backward()
    if transport.rank == 0:
        assert_equal(gradients(layer, x), expected)


@legal
def a_rank_without_tokens(transport: Transport) -> None:
    layer = layer_on(transport)
    x = tokens(transport, num_tokens=by_rank(transport, NUM_TOKENS, 0))
    layer(x).square().sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(layer, x))
    with torch.no_grad():
        assert layer(x).shape == x.shape


@legal
def other_settings_that_change_no_number(transport: Transport) -> None:
    """How weights lie, what is saved, the dtype of the gates, another plan for what nobody differentiates."""
    transposed = transport.rank == 1
    up, down = torch.arange(128.0).view(2, 8, 8).div(99), torch.arange(64.0).view(2, 8, 4).div(99)
    expected = call_function(transport, gate_up_proj=up, down_proj=down)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    out = call_function(
        transport,
        gate_up_proj=up.requires_grad_(),
        down_proj=down.requires_grad_(),
        transposed=transposed,
        save=by_rank(transport, "hidden", "input"),
        topk_weights=torch.ones(NUM_TOKENS, 2, dtype=by_rank(transport, torch.float32, torch.bfloat16)),
    )
    torch.testing.assert_close(out, expected)
    out.sum().backward()


@legal
def a_callable_made_on_every_rank(transport: Transport) -> None:
    """Lambdas, partials and modules have one name each, whatever object they are."""
    activations: list[Callable[[Tensor], Tensor]] = [lambda h: h[:, :4], functools.partial(F.glu, dim=-1)]
    for each in (*activations, torch.nn.GLU()):
        call_function(transport, activation=each).sum().backward()


@legal
def either_kind_of_checkpointing(transport: Transport) -> None:
    expected = expected_step(transport)
    for use_reentrant in (False, True):
        layer, x = layer_on(transport), tokens(transport)
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        assert_equal(gradients(layer, x), expected)


@legal
def gradients_of_some_tensors_on_one_rank(transport: Transport) -> None:
    """All ranks take part in all exchanges, also in those of replicas, whatever is asked of autograd."""
    placement = tm.ExpertPlacement(((0, 1, 2), (3, 2, 0)))
    if isinstance(transport, ProcessGroupTransport):  # processes don't train experts in several slots
        placement = tm.ExpertPlacement(((0, 3), (1, 2)))
    layer, x = layer_on(transport, placement=placement), tokens(transport)
    loss = layer(x).square().sum()
    wanted = by_rank(transport, [x], [layer.experts.down_proj])
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    loss.backward()
    assert wanted[0].grad is not None
    assert torch.equal(on_this_rank(once[0]), on_this_rank(wanted[0].grad))


@legal
def a_layer_made_on_one_rank_and_called_by_none(transport: Transport) -> None:
    expected = expected_step(transport)
    layer, x = layer_on(transport), tokens(transport)
    unused = [layer_on(transport) for _ in range(transport.rank)]
    layer(x).square().sum().backward()
    assert_equal(gradients(layer, x), expected)
    assert len(unused) == transport.rank


@legal
def all_ranks_go_on_after_a_disagreement(transport: Transport) -> None:
    """Nothing had been sent: with the next step all is right."""
    expected = expected_step(transport)
    for wrong in (backward_in_another_order, activation):
        try:
            wrong(transport)
        except tm.CountMismatch:
            layer, x = layer_on(transport), tokens(transport)
            layer(x).square().sum().backward()
            assert_equal(gradients(layer, x), expected)
        else:
            raise AssertionError(f"{wrong.__name__} was accepted")


@legal
def all_ranks_skip_a_backward(transport: Transport) -> None:
    expected = expected_step(transport)
    layer, x = layer_on(transport), tokens(transport)
    layer(x)
    layer(x).square().sum().backward()
    assert_equal(gradients(layer, x), expected)


CASES: dict[str, Case] = {**{name: case.run for name, case in DISAGREEMENTS.items()}, **LEGAL}


def timeout_s(name: str) -> float:
    return SHORT_TIMEOUT_S if name == one_rank_never_comes_to_its_backward.__name__ else TIMEOUT_S


def outcome(run: Callable[[Transport], object], transport: Transport) -> dict[str, Any]:
    """Run a case and give what it raised, and how long it took."""
    started, raised = time.perf_counter(), None
    try:
        run(transport)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    return {"raised": raised, "seconds": time.perf_counter() - started}


def run_one_process(folder: Path, rank: int, size: int) -> None:
    results = {}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    for name, run in CASES.items():
        group = torch.distributed.new_group()
        results[name] = outcome(run, ProcessGroupTransport(group, timeout_s=timeout_s(name)))
        torch.distributed.barrier()
        (folder / f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # with exchanges under way, gloo's own threads abort an ordinary exit


if __name__ == "__main__":
    run_one_process(Path(sys.argv[1]), *map(int, sys.argv[2:]))
