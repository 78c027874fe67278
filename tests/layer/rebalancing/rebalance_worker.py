"""Ranks of test_rebalance_processes.py: `rebalance_worker.py DIRECTORY CASE...` under torchrun says "passed CASE"."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from worker_cases import run_cases

import tritonmoe as tm
from tritonmoe.integrations.transformers import register
from tritonmoe.placement.expert_shards import shards_of

CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=8, top_k=2)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.05, eps=1e-3)
HOT = ((0, 1), (4, 5), (2, 7))
"""Experts that most tokens go to, at first, from the third step on, and from the sixth."""


class Net(nn.Module):
    """Two layers with a dense one before each; every third step other experts are hot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.layers = nn.ModuleList(tm.MoELayer(CONFIG) for _ in range(2))
        for layer in self.layers:
            layer.router.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for dense, layer in zip(self.dense, self.layers, strict=True):
            x = x + layer(torch.tanh(dense(x)))
        return x

    def heat(self, step: int) -> None:
        for layer in self.layers:
            with torch.no_grad():
                layer.router.weight.zero_()
                layer.router.weight[list(HOT[step // 3])] = torch.eye(8)[:2] * 3


def spread(ranks: Any = None, **settings: Any) -> Net:
    net = Net()
    tm.parallelize(net, dist.group.WORLD if ranks is None else ranks, **settings)
    return net


def here(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(20 + dist.get_rank(), 8, generator=generator)


def rebalancing(net: nn.Module, *optimizers: torch.optim.Optimizer, **settings: Any) -> tm.Rebalancer:
    """Return a Rebalancer for which a move takes no time, so that what is measured decides nothing."""
    found = tm.rebalance(net, *optimizers, **{"every": 1, "history": 1, **settings})
    found._largest = lambda _: 1
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: whole(value).clone() for name, value in state.items()}


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()["state"]
    return {f"{number} {name}": whole(value) for number, own in state.items() for name, value in own.items()}


def train(
    net: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rebalancer: tm.Rebalancer | None
) -> list[float]:
    """Train, clipping; return the losses. The order of sums over ranks alone may differ behind a move."""
    losses = []
    for step in steps:
        inner = net.module if isinstance(net, DistributedDataParallel) else net
        inner.heat(step)
        loss = called(here(step)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if rebalancer is not None:
            rebalancer.step()
        losses.append(loss.item())
    return losses


def moved(net: Net) -> bool:
    return any(layer.experts.placement is not None for layer in net.layers)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=tolerance, rtol=tolerance), name


def case_steps(directory: Path) -> None:
    """Steps behind moves are those without, of every optimizer, under DistributedDataParallel and with clipping."""
    kinds: list[Callable] = [
        functools.partial(ADAMW, foreach=True, amsgrad=True),
        functools.partial(ADAMW, fused=True),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False),
        functools.partial(torch.optim.Adagrad, lr=0.05),
    ]
    for kind in kinds:
        found = []
        for moves in (False, True):
            net = spread()
            optimizer = kind(net.parameters())
            rebalancer = rebalancing(net, optimizer) if moves else None
            losses = train(net, DistributedDataParallel(net), optimizer, range(8), rebalancer)
            assert moved(net) == moves
            found.append((losses, wholes(net.state_dict()), state_of(optimizer)))
        expected, got = found
        assert got[0] == pytest.approx(expected[0], rel=1e-5)
        assert_same(got[1], expected[1], 1e-5)
        assert_same(got[2], expected[2], 1e-5)


def case_one_step_has_the_same_bits(directory: Path) -> None:
    """What moves is moved bit by bit: an update from the same gradients gives each expert the same bits."""
    nets = [spread() for _ in range(2)]
    optimizers = [ADAMW(net.parameters()) for net in nets]
    rebalancer = rebalancing(nets[1], optimizers[1])
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            for name, parameter in net.named_parameters():
                generator = torch.Generator().manual_seed(step + len(name))
                grad = torch.randn(parameter.shape, generator=generator)
                if isinstance(parameter, DTensor):
                    held = net.get_submodule(name.rpartition(".")[0]).expert_ids
                    grad = DTensor.from_local(grad[list(held)], parameter.device_mesh, parameter.placements)
                parameter.grad = grad
            optimizer.step()
            optimizer.zero_grad()
            net.heat(0)
            net(here(step)).sum().backward()
            optimizer.zero_grad()
        rebalancer.step()
    assert moved(nets[1])
    for name, value in wholes(nets[0].state_dict()).items():
        assert torch.equal(value, whole(nets[1].state_dict()[name])), name
    for name, value in state_of(optimizers[0]).items():
        assert torch.equal(value, state_of(optimizers[1])[name]), name


def case_accumulated(directory: Path) -> None:
    """Gradients in accumulation move; so do they in main_grad, and a checkpointed forward routes by the new places."""
    for has_main_grad in (False, True):
        found = []
        for moves in (False, True):
            net = spread(expert_gradients="sum")
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            rebalancer = rebalancing(net, optimizer)
            if has_main_grad:
                for parameter in tm.expert_parameters(net):
                    parameter.main_grad = torch.zeros_like(parameter.to_local())
            for step in range(4):
                net.heat(step)
                checkpoint(net, here(step), use_reentrant=False).square().mean().backward()
                if moves:
                    rebalancer.step()
            assert moved(net) == moves
            for layer in net.layers:
                weight = layer.experts.gate_up_proj
                grads = weight.grad
                if has_main_grad:
                    grads = DTensor.from_local(weight.main_grad, weight.device_mesh, weight.placements)
                placement = layer.experts.placement or tm.ExpertPlacement.contiguous(8, dist.get_world_size())
                order = torch.tensor(placement.experts_of_rank).flatten()
                found.append(grads.full_tensor()[order.argsort()])
        for one, other in zip(found[:2], found[2:], strict=True):
            assert float(one.norm()) > 0
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


def case_saved(directory: Path) -> None:
    """Save after two moves; all ways to read that again; other ranks read the same files (read_again)."""
    net = spread()
    optimizer = ADAMW(net.parameters())
    rebalancer = rebalancing(net, optimizer)
    wrapped = DistributedDataParallel(net)
    train(net, wrapped, optimizer, range(2), rebalancer)
    early = get_model_state_dict(net)
    early = {name: value.clone() for name, value in early.items()}
    expected_early = wholes(early)
    train(net, wrapped, optimizer, range(2, 5), rebalancer)
    assert moved(net)
    plain, other = spread(), spread()
    weights, states = wholes(net.state_dict()), state_of(optimizer)
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "states": states}, directory / "expected.pt")
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=directory / "saved")
    dcp.async_save({"model": model}, checkpoint_id=directory / "async").result()
    read_again(directory)
    # Into what has moved: in place, and from whole tensors on every rank.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.to_local().zero_() if isinstance(parameter, DTensor) else parameter.zero_()
    dcp.load({"model": net.state_dict()}, checkpoint_id=directory / "async")
    assert_same(wholes(net.state_dict()), weights, 0)
    net.load_state_dict(expected_early)
    assert_same(wholes(net.state_dict()), expected_early, 0)
    net.load_state_dict(model)  # the memory that net has now
    net.load_state_dict(weights)
    net.load_state_dict(early)  # of another placement
    assert_same(wholes(net.state_dict()), expected_early, 0)
    other.load_state_dict(early)
    assert_same(wholes(other.state_dict()), expected_early, 0)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(net, options=options)
    if dist.get_rank() == 0:
        assert_same(full, expected_early, 0)
    with pytest.raises(ValueError, match="don't say to which experts they belong"):
        net.load_state_dict({name: parameter.detach() for name, parameter in net.named_parameters()}, strict=False)
    with pytest.raises(ValueError, match="would keep one rank's experts alone"):
        torch.save(net.state_dict(), directory / "one.pt")
    # An optimizer of what has moved takes its own state, and that of another placement.
    own = optimizer.state_dict()
    fresh = ADAMW(net.parameters())
    fresh.load_state_dict(own)
    assert_same(state_of(fresh), states, 0)
    before = ADAMW(plain.parameters())
    before.load_state_dict(own)
    assert_same(state_of(before), states, 0)
    del fresh, before
    # Whole tensors in the model's order.
    tm.gather_state_dicts(net, optimizer)
    gathered = net.state_dict()
    assert all(not isinstance(value, DTensor) for value in gathered.values())
    assert_same(gathered, expected_early, 0)
    assert_same(state_of(optimizer), states, 0)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(state_of(optimizer), states, 0)
    rebalancer._check()


def read_again(directory: Path) -> None:
    """Read the files of case_saved over this many ranks, and go on."""
    expected = torch.load(directory / "expected.pt", weights_only=True)
    net = spread()
    optimizer = ADAMW(net.parameters())
    model, state = get_state_dict(net, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=directory / "saved")
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)
    assert_same(wholes(net.state_dict()), expected["weights"], 0)
    assert_same(state_of(optimizer), expected["states"], 0)


case_read_again = read_again


def case_sharded(directory: Path) -> None:
    """Beside FSDP2 of the dense parameters; experts that FSDP2 shards over replicas are refused, copies are moved."""
    found = []
    for moves in (False, True):
        net = spread()
        routers = [layer.router.weight for layer in net.layers]
        fully_shard(net, ignored_params={*tm.expert_parameters(net), *routers})
        optimizer = ADAMW(net.parameters())
        losses = train(net, net, optimizer, range(5), rebalancing(net, optimizer) if moves else None)
        assert moved(net) == moves
        found.append((losses, wholes(net.state_dict()), state_of(optimizer)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same(found[1][1], found[0][1], 1e-5)
    assert_same(found[1][2], found[0][2], 1e-5)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))
    found = []
    for moves in (False, True):
        net = spread(mesh)
        optimizer = ADAMW(net.parameters())
        losses = train(
            net, DistributedDataParallel(net), optimizer, range(5), rebalancing(net, optimizer) if moves else None
        )
        assert moved(net) == moves
        found.append((losses, wholes(net.state_dict()), state_of(optimizer)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same(found[1][1], found[0][1], 1e-5)
    assert_same(found[1][2], found[0][2], 1e-5)
    net = spread(mesh)
    for layer in net.layers:
        fully_shard(layer.experts, mesh=mesh["replica"])
    with pytest.raises(ValueError, match="sharded over replicas too"):
        tm.rebalance(net, ADAMW(net.parameters()))


def case_refused(directory: Path) -> None:
    """What can't be moved is refused on every rank, before anything moves."""
    net, rank = spread(), dist.get_rank()
    net.heat(0)
    optimizer = ADAMW(net.parameters())
    with pytest.raises(ValueError, match=r"was made with .* and not given to tm.rebalance"):
        tm.rebalance(net)
    rebalancer = rebalancing(net, optimizer)
    net(here(0)).sum().backward()
    if rank == 1:
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="is not the same on ranks"):
        rebalancer.step()
    optimizer.zero_grad()
    # One rank alone can't.
    weight = net.layers[0].experts.down_proj
    if rank == 1:
        weight.noted = torch.ones(3)
    with pytest.raises(
        ValueError, match="is a tensor .* on the parameter" if rank == 1 else "ranks \\[1\\] can't move"
    ):
        rebalancer.step()
    if rank == 1:
        del weight.noted
    # States that are no experts'.
    optimizer.step()
    net(here(0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[weight]["whole"] = torch.ones(5)
    with pytest.raises(ValueError, match="can't tell which part belongs to an expert"):
        rebalancer.step()
    optimizer.state[weight]["whole"] = [torch.ones(5)]
    with pytest.raises(ValueError, match="is a list"):
        rebalancer.step()
    del optimizer.state[weight]["whole"]
    # States that torch gathers on every rank.
    adafactor = torch.optim.Adafactor(net.parameters())
    net(here(0)).sum().backward()
    adafactor.step()
    adafactor.zero_grad()
    with pytest.raises(ValueError, match=r"lies as .*Replicate"):
        tm.rebalance(net, optimizer, adafactor)
    del adafactor
    # A copy, whose rows would be other experts'.
    average = torch.optim.swa_utils.AveragedModel(net)
    with pytest.raises(ValueError, match="a deepcopy of the experts of"):
        rebalancer.step()
    del average
    # A module that holds the same memory, whose rows would be other experts'.
    for shared in (weight, weight.detach(), weight.to_local().detach()):
        holder = nn.ParameterList([shared]) if rank == 1 else None
        words = r"0.experts.down_proj shares memory with 0 of a ParameterList" if rank == 1 else "ranks \\[1\\] can't"
        for call in (rebalancer.step, rebalancer.restore, lambda: tm.rebalance(net, optimizer)):
            with torch.no_grad():
                net(here(0))
            with pytest.raises(ValueError, match=words):
                call()
        del holder
    # A forward whose backward comes behind the move.
    loss = net(here(0)).sum()
    rebalancer.step()
    assert moved(net)
    with pytest.raises(RuntimeError, match=r"modified in.?place"):
        loss.backward()


def case_compiled(directory: Path) -> None:
    """A compiled model, whose graph knows the placement, is compiled anew for another one."""
    found = []
    for moves in (False, True):
        torch._dynamo.reset()
        net = spread(overlap=tm.OverlapConfig(num_chunks=2))
        optimizer = ADAMW(net.parameters())
        rebalancer = rebalancing(net, optimizer, every=3) if moves else None
        compiled = torch.compile(net, backend="aot_eager", dynamic=False)
        losses = train(net, compiled, optimizer, range(7), rebalancer)
        assert moved(net) == moves
        found.append((losses, wholes(net.state_dict())))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same(found[1][1], found[0][1], 1e-5)


def case_adapters(directory: Path) -> None:
    """PEFT's factors move with their experts, and with them their optimizer's states; its files are as ever."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    register()
    found = []
    for moves in (False, True):
        net = Net()
        targets = [f"layers.{n}.experts.{name}" for n in range(2) for name in ("gate_up_proj", "down_proj")]
        adapted = get_peft_model(net, LoraConfig(r=3, target_modules=[], target_parameters=targets))
        torch.manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
        tm.parallelize(adapted, dist.group.WORLD)
        optimizer = ADAMW([p for p in adapted.parameters() if p.requires_grad])
        rebalancer = rebalancing(adapted, optimizer) if moves else None
        losses = []
        for step in range(5):
            net.heat(step)
            loss = DistributedDataParallel(adapted)(here(step)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            if rebalancer is not None:
                rebalancer.step()
            losses.append(loss.item())
        assert any(layer.grouped_experts.placement is not None for layer in net.layers) == moves
        tm.gather_state_dicts(adapted, optimizer)
        found.append((losses, get_peft_model_state_dict(adapted), state_of(optimizer)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same(found[1][1], found[0][1], 1e-5)
    assert_same(found[1][2], found[0][2], 1e-5)


def case_adapters_added_later(directory: Path) -> None:
    """Adapters that come after tm.rebalance() move with their experts; their optimizer has to be given."""
    from peft import LoraConfig, get_peft_model

    register()
    net = spread()
    rebalancer = rebalancing(net)
    targets = [f"layers.{n}.experts.{name}" for n in range(2) for name in ("gate_up_proj", "down_proj")]
    torch.manual_seed(1)
    adapted = get_peft_model(
        net, LoraConfig(r=3, target_modules=[], target_parameters=targets, init_lora_weights=False)
    )
    for step in range(2):
        net.heat(step)
        adapted(here(step))
        rebalancer.step()
    net.heat(0)
    with torch.no_grad():
        behind = adapted(here(0))
        assert any(layer.grouped_experts.placement is not None for layer in net.layers)
        rebalancer.restore()
        torch.testing.assert_close(adapted(here(0)), behind)
    optimizer = ADAMW([p for p in adapted.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"was made with .* not given to tm\.rebalance"):
        rebalancer.restore()
    del optimizer


def case_transformers(directory: Path) -> None:
    """Models of transformers: their steps, save_pretrained and generate behind moves, biases and all."""
    import transformers
    from transformers import AutoModelForCausalLM

    from tritonmoe.integrations import transformers as tmt

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "num_experts_per_tok": 3}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    configs = (
        transformers.Qwen3MoeConfig(**sizes, num_experts=8, moe_intermediate_size=12),
        transformers.GptOssConfig(**sizes, num_local_experts=8),
    )
    for config in configs:
        found = []
        for moves in (False, True):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            ids = torch.randint(2, 8, (4, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
            names = list(model.state_dict())
            tmt.parallelize(model, dist.group.WORLD)
            optimizer = ADAMW(model.parameters())
            rebalancer = rebalancing(model, optimizer) if moves else None
            wrapped, losses = DistributedDataParallel(model), []
            for _ in range(4):
                loss = wrapped(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if rebalancer is not None:
                    rebalancer.step()
                losses.append(loss.item())
            experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
            assert any(tmt_placement(module) is not None for module in experts) == moves
            text = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
            where = directory / f"{config.model_type}_{moves}"
            model.save_pretrained(where)
            again = AutoModelForCausalLM.from_pretrained(where)
            assert list(model.state_dict()) == names
            assert_same(wholes(model.state_dict()), dict(again.state_dict()), 0)
            found.append((losses, dict(again.state_dict()), {"text": text}))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        assert_same(found[1][1], found[0][1], 1e-4)
        assert_same(found[1][2], found[0][2], 0)


def case_trainer(directory: Path) -> None:
    """A callback of Trainer's moves experts; its checkpoints are read as ever, and training goes on from them."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainerCallback, TrainingArguments

    from tritonmoe.integrations import transformers as tmt

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "num_experts_per_tok": 3}
    sizes |= {"pad_token_id": 0, "eos_token_id": None, "num_experts": 8, "moe_intermediate_size": 12}

    class Rebalance(TrainerCallback):
        def on_train_begin(self, args: object, state: object, control: object, **given: Any) -> None:
            self.rebalancer = rebalancing(given["model"], given["optimizer"])

        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            self.rebalancer.step()

    ids = torch.randint(2, 8, (16, 12), generator=torch.Generator().manual_seed(0))

    def trained(name: str, *callbacks: TrainerCallback, resumed: Path | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes))
        tmt.parallelize(model, dist.group.WORLD)
        settings = TrainingArguments(
            str(directory / name),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-2,
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(model, settings, train_dataset=data, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        return model

    stayed, moves = trained("stayed"), trained("moved", Rebalance())
    experts = [module for name, module in moves.named_modules() if name.endswith("mlp.experts")]
    assert any(tmt_placement(module) is not None for module in experts)
    assert_same(wholes(moves.state_dict()), wholes(stayed.state_dict()), 1e-4)
    again = AutoModelForCausalLM.from_pretrained(directory / "moved" / "checkpoint-4")
    assert_same(wholes(moves.state_dict()), dict(again.state_dict()), 0)
    resumed = trained("resumed", resumed=directory / "moved" / "checkpoint-2")
    assert_same(wholes(resumed.state_dict()), wholes(stayed.state_dict()), 1e-4)


def case_halves(directory: Path) -> None:
    """Two halves of a batch at once, of whose tokens both are counted."""
    found = []
    for moves in (False, True):
        net = spread(overlap=tm.OverlapConfig(num_chunks=2))
        optimizer = ADAMW(net.parameters())
        rebalancer = rebalancing(net, optimizer) if moves else None
        losses = []
        for step in range(4):
            net.heat(step)
            halves = tm.two_batches(lambda x, net=net: net(x).square().mean(), here(step), here(step + 50))
            loss = halves[0] + halves[1]
            loss.backward()
            for parameter in net.dense.parameters():
                dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
            optimizer.step()
            optimizer.zero_grad()
            if rebalancer is not None:
                counted = sum(int(layer.experts.expert_shards.calls.load.sum()) for layer in net.layers)
                assert counted == 2 * 2 * 2 * (20 + dist.get_rank())
                rebalancer.step()
            losses.append(loss.item())
        assert moved(net) == moves
        found.append((losses, wholes(net.state_dict())))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same(found[1][1], found[0][1], 1e-5)


def tmt_placement(experts: nn.Module) -> tm.ExpertPlacement | None:
    shards = shards_of(experts)
    assert shards is not None
    return shards.placement


if __name__ == "__main__":
    run_cases(lambda case: globals()[f"case_{case}"](Path(sys.argv[1])), sys.argv[2:])
