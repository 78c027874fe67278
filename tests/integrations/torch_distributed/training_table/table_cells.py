"""The rows of the training table: what users put around experts that are spread over ranks.

Every cell takes a form (a column) and the ranks, and returns when it equals one device.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from table_forms import Form, Ranks
from table_oracle import (
    Plan,
    Step,
    assert_same_bits,
    assert_same_on_every_rank,
    compare,
    compare_step,
    gradients,
    one_device,
    weights,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm


def fsdp2(form: Form, model: nn.Module, ignored: set[nn.Parameter], **settings: Any) -> nn.Module:
    for block in form.blocks(model):
        fully_shard(block, ignored_params=ignored, **settings)
    return fully_shard(model, ignored_params=ignored, **settings)


def experts_modules(model: nn.Module) -> list[nn.Module]:
    experts = set(tm.expert_parameters(model))
    return [module for module in model.modules() if experts & set(module.parameters(recurse=False))]


def wrap(how: str, form: Form, model: nn.Module, ranks: Ranks) -> Any:
    """Return what a training loop calls."""
    if how == "one device":
        return model
    if how == "DDP":
        return DistributedDataParallel(model)
    if how == "experts over the replicas":
        for experts in experts_modules(model):
            fully_shard(experts, mesh=ranks.mesh["replica"])
        return fsdp2(form, model, set())
    experts = set(tm.expert_parameters(model))
    if how == "HSDP":
        return fsdp2(form, model, experts, mesh=ranks.mesh)
    return fsdp2(form, model, experts, reshard_after_forward=how == "FSDP2")


def train_step(
    form: Form,
    ranks: Ranks,
    plan: Plan,
    model: nn.Module,
    call: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    step: int,
    damage: Callable[[nn.Module], None] | None = None,
    scaler: Any = None,
) -> Step:
    """Run a step as a user's loop does. damage: what befalls the gradients before the optimizer takes them."""
    optimizer.zero_grad()
    for micro in range(plan.num_micro):
        is_last = micro == plan.num_micro - 1
        if isinstance(call, DistributedDataParallel):
            call.require_backward_grad_sync = is_last
        elif hasattr(call, "set_requires_gradient_sync"):
            call.set_requires_gradient_sync(is_last)
        with plan.autocasting():
            output, loss = form.loss(call, model, form.batch(step, ranks.rank, micro))
        (loss if scaler is None else scaler.scale(loss)).backward()
    if damage is not None:
        damage(model)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = plan.clip(model)
    grads = gradients(model)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return Step([output.detach()], None if norm is None else whole(norm), grads, weights(model))


def check_training(
    form: Form,
    ranks: Ranks,
    model: nn.Module,
    call: Callable[..., Any],
    what: str,
    plan: Plan | None = None,
    **optimizer_settings: Any,
) -> None:
    """Train two steps; outputs, gradients and weights of both must be one device's, and the same on every rank."""
    plan = plan or Plan((ranks.size,) * 2)
    optimizer = plan.make_optimizer(model, **optimizer_settings)
    for step in range(len(plan.num_ranks)):
        done = train_step(form, ranks, plan, model, call, optimizer, step)
        compare_step(done, form, ranks, plan, step, what)
    assert_same_on_every_rank(done.weights, what)


def train_wrapped(how: str, form: Form, ranks: Ranks) -> None:
    model = form.make(ranks)
    check_training(form, ranks, model, wrap(how, form, model, ranks), how)


def train_with_ddp_options(form: Form, ranks: Ranks) -> None:
    for options in ({"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        model = form.make(ranks)
        check_training(form, ranks, model, DistributedDataParallel(model, **options), str(options))


def accumulate(form: Form, ranks: Ranks) -> None:
    plan = Plan((ranks.size,) * 2, num_micro=2)
    for how in ("DDP", "FSDP2"):
        model = form.make(ranks)
        check_training(form, ranks, model, wrap(how, form, model, ranks), how, plan)


def fully_shard_everything(form: Form, ranks: Ranks) -> None:
    model = form.make(ranks)
    check_training(form, ranks, model, fsdp2(form, model, set()), "FSDP2 of everything")


def replicate_everything(form: Form, ranks: Ranks) -> None:
    from torch.distributed._composable.replicate import replicate

    model = form.make(ranks)
    check_training(form, ranks, model, replicate(model), "replicate")


def damage_an_expert(model: nn.Module) -> None:
    """Make one expert's gradient infinite, which one rank (of each replica) holds."""
    gradient = next(iter(tm.expert_parameters(model))).grad
    assert isinstance(gradient, DTensor)
    if gradient.device_mesh.get_local_rank() == 1:
        gradient.to_local()[0, 0] = math.inf


def clip(form: Form, ranks: Ranks) -> None:
    for how, norm_type in itertools.product(("DDP", "FSDP2"), (2.0, math.inf)):
        plan = Plan((ranks.size,), max_norm=0.3, norm_type=norm_type)
        plain, exact = (steps[0] for steps in one_device(form, plan))
        model = form.make(ranks)
        call = wrap(how, form, model, ranks)
        form.loss(call, model, form.batch(0, ranks.rank))[1].backward()
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        for foreach in (None, True, False):
            for parameter, gradient in zip(model.parameters(), before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            norm = plan.clip(model, foreach=foreach)
            assert norm is not None
            actual = {"norm": whole(norm), **gradients(model)}
            expected = ({"norm": step.norm, **step.gradients} for step in (plain, exact))
            what = f"{how}, norm_type={norm_type}, foreach={foreach}"
            compare(actual, *expected, what)  # type: ignore[arg-type]
            assert_same_on_every_rank(actual, what)
        if form.trains_experts:
            damage_an_expert(model)
            raises_everywhere(functools.partial(plan.clip, model, error_if_nonfinite=True), "non-finite")


def raises_everywhere(call: Callable[[], Any], words: str) -> None:
    """Raise AssertionError unless every rank raises RuntimeError with these words."""
    heard = "nothing"
    try:
        call()
    except RuntimeError as error:
        heard = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, heard)
    assert all(words in other for other in everyone), everyone


def clip_and_train(form: Form, ranks: Ranks) -> None:
    for how in ("DDP", "FSDP2"):
        model = form.make(ranks)
        check_training(form, ranks, model, wrap(how, form, model, ranks), how, Plan((ranks.size,) * 2, max_norm=0.3))


def clip_value(form: Form, ranks: Ranks) -> None:
    plain, exact = (steps[0] for steps in one_device(form, Plan((ranks.size,))))
    for how, foreach in itertools.product(("DDP", "FSDP2"), (None, True, False)):
        model = form.make(ranks)
        call = wrap(how, form, model, ranks)
        form.loss(call, model, form.batch(0, ranks.rank))[1].backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)
        expected = ({name: g.clamp(-1e-3, 1e-3) for name, g in step.gradients.items()} for step in (plain, exact))
        compare(gradients(model), *expected, f"{how}, foreach={foreach}")


def optimize(optimizer: str, settings: dict[str, Any], form: Form, ranks: Ranks) -> None:
    for how in ("DDP", "FSDP2"):
        model = form.make(ranks)
        plan = Plan((ranks.size,) * 2, optimizer=optimizer)
        check_training(form, ranks, model, wrap(how, form, model, ranks), how, plan, **settings)


def scale_gradients(form: Form, ranks: Ranks) -> None:
    """Three steps, the one between with an infinite gradient of one expert: every rank leaves it out."""
    plan = Plan((ranks.size,) * 2, max_norm=0.3)
    for how, settings in (("DDP", {"foreach": True}), ("FSDP2", {"fused": True})):
        what = f"{how}, {settings}"
        model = form.make(ranks)
        call = wrap(how, form, model, ranks)
        optimizer = plan.make_optimizer(model, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        run = functools.partial(train_step, form, ranks, plan, model, call, optimizer, scaler=scaler)
        compare_step(run(0), form, ranks, plan, 0, what)
        if form.trains_experts:
            before = weights(model)
            run(2, damage_an_expert)
            assert_same_bits(weights(model), before, f"{what}, step left out")
            scales: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(scales, scaler.get_scale())
            assert set(scales) == {512.0}, f"{what}: scales {scales}"
        compare_step(run(1), form, ranks, plan, 1, what)
        assert_same_on_every_rank(weights(model), what)


def autocast(form: Form, ranks: Ranks) -> None:
    """One step: a second might choose other experts, by bf16's rounding. Errors are compared over all gradients."""
    model = form.make(ranks)
    plan = Plan((ranks.size,), autocast=True)
    optimizer = plan.make_optimizer(model)
    done = train_step(form, ranks, plan, model, wrap("DDP", form, model, ranks), optimizer, 0)
    plain, exact = (steps[0] for steps in one_device(form, plan))
    output = done.outputs[0]
    compare({"output": output}, *({"output": step.outputs[ranks.rank]} for step in (plain, exact)), "autocast")
    assert done.gradients.keys() == exact.gradients.keys()
    error, plain_error = (
        math.hypot(*((grads[name] - true).norm().item() for name, true in exact.gradients.items()))
        for grads in (done.gradients, plain.gradients)
    )
    assert error <= 2 * plain_error, f"autocast: gradients are off by {error:.2e}, plain PyTorch's by {plain_error:.2e}"
    assert_same_on_every_rank(done.weights, "autocast")


def compiled(form: Form, ranks: Ranks) -> None:
    model = form.make(ranks)
    try:
        call = torch.compile(wrap("DDP", form, model, ranks), backend="aot_eager")
        check_training(form, ranks, model, call, "compile", Plan((ranks.size,)))
    finally:
        torch._dynamo.reset()


def copied(form: Form, ranks: Ranks) -> None:
    original = form.make(ranks)
    before = weights(original)
    model = copy.deepcopy(original)
    check_training(form, ranks, model, wrap("DDP", form, model, ranks), "copy")
    assert_same_bits(weights(original), before, "the original")
    check_training(form, ranks, original, wrap("FSDP2", form, original, ranks), "original")


def checkpoint_activations(form: Form, ranks: Ranks) -> None:
    for how in ("DDP", "FSDP2"):
        model = form.make(ranks)
        for block in form.blocks(model) or [model]:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        check_training(form, ranks, model, wrap(how, form, model, ranks), how)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor):
            flat[prefix + key] = whole(value)
    return flat


def state_of(call: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, optim = get_state_dict(call, optimizer)
    return {"model": model, "optimizer": optim}


def forget(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)


def load_and_train(
    how: str, form: Form, ranks: Ranks, folder: Path, written_by: int, expected: dict[str, Tensor], what: str
) -> None:
    """Read a checkpoint into fresh ranks, compare its bits, and go on to the second step."""
    plan = Plan((written_by, ranks.size))
    model = form.make(ranks)
    forget(model)
    call = wrap(how, form, model, ranks)
    optimizer = plan.make_optimizer(model)
    state = state_of(call, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(call, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_same_bits(flatten(state_of(call, optimizer)), expected, what)
    compare_step(train_step(form, ranks, plan, model, call, optimizer, 1), form, ranks, plan, 1, what)
    assert_same_on_every_rank(weights(model), what)


def ways(ranks: Ranks) -> tuple[str, ...]:
    return ("one device",) if ranks.size == 1 else ("DDP", "FSDP2")


def save_and_load(folder: Path, form: Form, ranks: Ranks) -> None:
    """Write after the first step, read into the same ranks; the last file stays for other ranks."""
    for how in ways(ranks):
        plan = Plan((ranks.size,))
        model = form.make(ranks)
        call = wrap(how, form, model, ranks)
        optimizer = plan.make_optimizer(model)
        compare_step(train_step(form, ranks, plan, model, call, optimizer, 0), form, ranks, plan, 0, how)
        state = state_of(call, optimizer)
        own_folder = folder / f"{ranks.name}, {form.name}"
        dcp.save(state, checkpoint_id=own_folder)
        expected = flatten(state)
        if ranks.rank == 0:
            torch.save(expected, own_folder / "whole.pt")
        load_and_train(how, form, ranks, own_folder, ranks.size, expected, how)


def load_from(writers: str, folder: Path, form: Form, ranks: Ranks) -> None:
    """Read what other ranks wrote."""
    own_folder = folder / f"{writers}, {form.name}"
    expected = torch.load(own_folder / "whole.pt")
    written_by = {"2x2": 4}.get(writers) or int(writers)
    for how in ways(ranks):
        load_and_train(how, form, ranks, own_folder, written_by, expected, f"from {writers} to {ranks.name}, {how}")


def other_weights(form: Form) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return one device's model with weights that make() does not give, and its state."""
    model = form.one_device()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model, copy.deepcopy(model.state_dict())


def check_loaded(form: Form, ranks: Ranks, model: nn.Module, call: Any, what: str) -> None:
    """Compare the state and an output with one device's; then give the weights back to one device."""
    expected_model, expected = other_weights(form)
    actual = {name: whole(value) for name, value in get_model_state_dict(model).items()}
    assert_same_bits(actual, expected, what)
    with torch.no_grad():
        batch = form.batch(0, ranks.rank)
        output = form.loss(call, model, batch)[0]
        plain = form.loss(expected_model, expected_model, batch)[0]
    torch.testing.assert_close(output, plain, atol=1e-6, rtol=1e-5, msg=lambda text: f"{what}: {text}")
    back = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ranks.rank == 0:
        assert_same_bits(back, expected, f"{what}, back on one device")


def load_one_device(form: Form, ranks: Ranks) -> None:
    """torch's own load_state_dict, of the whole and of the sharded state."""
    _, state = other_weights(form)
    for is_sharded in (False, True):
        model = form.make(ranks)
        if is_sharded:
            loaded = form.make(ranks)
            loaded.load_state_dict(state)
            state = loaded.state_dict()
        missing, unexpected = model.load_state_dict(state)
        assert not missing
        assert not unexpected
        check_loaded(form, ranks, model, wrap("DDP", form, model, ranks), f"load_state_dict, {is_sharded=}")


def assign_one_device(form: Form, ranks: Ranks) -> None:
    _, state = other_weights(form)
    model = form.make(ranks)
    model.load_state_dict(state, assign=True)
    check_loaded(form, ranks, model, wrap("DDP", form, model, ranks), "load_state_dict, assign=True")


def set_one_device(form: Form, ranks: Ranks) -> None:
    """set_model_state_dict of a whole state, which every rank has, or the first alone."""
    _, state = other_weights(form)
    for how, broadcast in (("alone", False), ("alone", True), ("DDP", True), ("FSDP2", False), ("FSDP2", True)):
        model = form.make(ranks)
        call = model if how == "alone" else wrap(how, form, model, ranks)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        own = copy.deepcopy(state) if ranks.rank == 0 or not broadcast else {}
        set_model_state_dict(call, own, options=options)
        check_loaded(form, ranks, model, call, f"set_model_state_dict, {how}, {broadcast=}")


def fewer_ranks(form: Form, ranks: Ranks) -> None:
    """Spread the experts over half of the ranks, without saying that the halves are replicas."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    form.spread(halves[ranks.rank // 2])


ALL, REPLICAS = ("2", "4", "2x2"), ("2x2",)
WRITERS = ("1", "2", "4", "2x2")


def cells_of(folder: Path) -> dict[str, tuple[tuple[str, ...], Callable[[Form, Ranks], None]]]:
    """Return by the name of a row for which ranks it is, and its cell; folder: for checkpoints."""
    rows: dict[str, tuple[tuple[str, ...], Callable[[Form, Ranks], None]]] = {
        "DDP": (ALL, functools.partial(train_wrapped, "DDP")),
        "DDP with its options": (ALL, train_with_ddp_options),
        "FSDP2": (ALL, functools.partial(train_wrapped, "FSDP2")),
        "FSDP2, reshard off": (ALL, functools.partial(train_wrapped, "FSDP2, reshard off")),
        "replicate()": (ALL, replicate_everything),
        "FSDP2 without ignored_params": (ALL, fully_shard_everything),
        "HSDP": (REPLICAS, functools.partial(train_wrapped, "HSDP")),
        "FSDP2 of experts over replicas": (REPLICAS, functools.partial(train_wrapped, "experts over the replicas")),
        "accumulated gradients": (ALL, accumulate),
        "clip_grad_norm_": (ALL, clip),
        "clip_grad_norm_ and step": (ALL, clip_and_train),
        "clip_grad_value_": (ALL, clip_value),
        "AdamW foreach": (ALL, functools.partial(optimize, "adamw", {"foreach": True})),
        "AdamW fused": (ALL, functools.partial(optimize, "adamw", {"fused": True})),
        "SGD foreach": (ALL, functools.partial(optimize, "sgd", {"foreach": True})),
        "GradScaler": (ALL, scale_gradients),
        "autocast": (ALL, autocast),
        "DCP, same ranks": (("1", *ALL), functools.partial(save_and_load, folder)),
        **{
            f"DCP from {w}": (tuple(r for r in WRITERS if r != w), functools.partial(load_from, w, folder))
            for w in WRITERS
        },
        "one-device weights, load_state_dict": (ALL, load_one_device),
        "one-device weights, assign=True": (ALL, assign_one_device),
        "one-device weights, set_model_state_dict": (ALL, set_one_device),
        "torch.compile": (ALL, compiled),
        "deepcopy": (ALL, copied),
        "activation checkpointing": (ALL, checkpoint_activations),
        "experts over fewer ranks": (("4",), fewer_ranks),
    }
    return rows
