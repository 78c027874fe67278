"""Ranks of test_spread.py: `spread_worker.py CASE...` under torchrun says "passed CASE" of each on rank 0."""

import copy
import functools
import io
import itertools
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import set_detect_anomaly
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from worker_cases import run_cases

import tritonmoe as tm
from tritonmoe.placement.dtensor_gaps import handlers
from tritonmoe.placement.placed_states import part_of
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.recording_reader import read_recording

CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=8, top_k=2)
BIASED = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=8, top_k=2, selection_bias=True)


class Net(nn.Module):
    def __init__(self, config: tm.MoEConfig = CONFIG, transport=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.moe = tm.MoELayer(config, transport)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(torch.tanh(self.first(x)))


def spread(ranks=None, **settings) -> Net:
    net = Net(**settings)
    tm.parallelize(net, dist.group.WORLD if ranks is None else ranks)
    return net


def batches(step: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3 + rank, 8, generator=generator) for rank in range(dist.get_world_size())]


def here(step: int = 0) -> torch.Tensor:
    return batches(step)[dist.get_rank()]


def replicas_and_experts() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_alike(one: nn.Module, many: nn.Module, optimizers: Sequence[torch.optim.Optimizer], num_steps: int) -> None:
    """Train on all ranks' batches on one device, and spread over ranks, and compare the parameters.

    optimizers: those of both.
    """
    for step in range(num_steps):
        torch.stack([one(x).square().mean() for x in batches(step)]).mean().backward()
        many(here(step)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for expected, got in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(whole(got), expected, atol=1e-5, rtol=0)


def case_optimizers() -> None:
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    kinds: list[Callable] = [
        functools.partial(sgd, momentum=0.9, fused=True),
        functools.partial(sgd, momentum=0.9, foreach=True),
        functools.partial(torch.optim.Adagrad, lr=0.01, eps=1e-3, fused=True),
    ]
    for kind in kinds:
        one, many = Net(), DistributedDataParallel(spread())
        optimizers = kind(one.parameters()), kind(many.parameters())
        train_alike(one, many, optimizers, 2)
    spread_weights, copies = list(spread().parameters()), list(spread().parameters())
    with torch.no_grad():
        for weight in copies:
            weight.zero_()
        torch._foreach_copy_(copies, spread_weights)
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(copies, spread_weights, strict=True))


def case_optimizers_of_single_tensors() -> None:
    """Masks (Rprop), norms over a whole tensor or over its experts (Adafactor) give what they give on one device."""
    biased = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=8, top_k=2, bias=True)
    kinds: list[Callable] = [
        functools.partial(kind, lr=0.01, foreach=foreach, maximize=maximize)
        for kind in (torch.optim.Rprop, torch.optim.Adafactor)
        for foreach, maximize in ((False, False), (True, True))
    ]
    for kind in kinds:
        parallel = DistributedDataParallel(spread(config=biased))
        for many in (parallel, sharded_over_replicas(replicas_and_experts(), config=biased)):
            one = Net(biased)
            # nothing but noise decides the signs of the router's gradient
            left_out = "router" if kind.func is torch.optim.Rprop else "nothing"
            optimizers = [
                kind([parameter for name, parameter in net.named_parameters() if left_out not in name])
                for net in (one, many)
            ]
            train_alike(one, many, optimizers, 3)


def case_what_takes_no_parts() -> None:
    """One vector of all parameters, plain state of a DTensor and `.data =`, which PyTorch ignores, are refused."""
    net = spread()
    before = [whole(parameter.detach()).clone() for parameter in net.parameters()]

    def closure() -> torch.Tensor:
        loss = net(here()).square().mean()
        loss.backward()
        return loss

    mixed = r"mixed torch\.Tensor and DTensor"  # as PyTorch says it; docs/reference/errors.md has the way out
    with pytest.raises(RuntimeError, match=mixed):
        torch.optim.LBFGS(net.parameters()).step(closure)
    with pytest.raises(RuntimeError, match=mixed):
        nn.utils.parameters_to_vector(net.parameters())
    experts = net.moe.experts
    with pytest.raises(RuntimeError, match=mixed):
        torch.zeros(8, 24).add_(experts.gate_up_proj.grad.mean(-1))
    whole_weight = torch.randn(8, 24, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match=mixed):
        experts.gate_up_proj.copy_(whole_weight)
    for operation in (torch.ops.aten.add_.Tensor, torch.ops.aten.copy_.default, torch.ops.aten.cat.default):
        assert operation not in handlers(), "an operation of every DTensor would pay for an error's words"
    vector = torch.randn(sum(parameter.numel() for parameter in experts.parameters()))
    with pytest.raises(ValueError, match="PyTorch ignores `parameter"):
        nn.utils.vector_to_parameters(vector, experts.parameters())
    for value in (whole_weight, experts.gate_up_proj.data * 2, experts.gate_up_proj.data.bfloat16()):
        with pytest.raises(ValueError, match="distribute_tensor"):
            experts.gate_up_proj.data = value
    experts.gate_up_proj.data = experts.gate_up_proj.data
    assert all(torch.equal(whole(a), b) for a, b in zip(net.parameters(), before, strict=True))
    mesh, placements = experts.gate_up_proj.device_mesh, experts.gate_up_proj.placements
    with torch.no_grad():
        experts.gate_up_proj.copy_(distribute_tensor(whole_weight, mesh, placements, src_data_rank=None))
    assert torch.equal(whole(experts.gate_up_proj), whole_weight)
    net.first.weight.data = torch.ones(8, 8)  # a dense one
    assert torch.equal(net.first.weight, torch.ones(8, 8))


def case_numbers() -> None:
    """A norm over experts is no number of one rank; that of a list, and operations without lists, go on as before."""
    net = spread()
    net(here()).square().mean().backward()
    grad = net.moe.experts.down_proj.grad
    with pytest.raises(ValueError, match="full_tensor"):
        grad.norm().item()
    with pytest.raises(ValueError, match="full_tensor"):
        float(grad.square().sum())
    asked = []

    def closure() -> torch.Tensor:
        """Log on one rank, as Lightning's closure does, which runs the whole training step."""
        with torch.no_grad() if len(asked) % 2 else torch.enable_grad():
            asked.append(None)
            loss = net(here()).square().mean()
            if dist.get_rank() == 0:
                with pytest.raises(ValueError, match="full_tensor"):
                    net.moe.experts.down_proj.grad.norm().item()
                assert net.moe.experts.down_proj.grad.norm(dim=0).placements[0].is_partial()
        return loss

    for kind in (torch.optim.SGD, torch.optim.Adafactor):
        optimizer = kind(net.parameters(), lr=0.0)
        optimizer.register_step_post_hook(lambda *_: dist.get_rank() or grad.norm(dim=0))
        for _ in range(2):
            optimizer.step(closure)
    expected = grad.norm().full_tensor().item()
    assert torch.nn.utils.clip_grad_norm_([net.moe.experts.down_proj], 1.0).item() == pytest.approx(expected)
    x = distribute_tensor(torch.randn(4, 8), init_device_mesh("cpu", (dist.get_world_size(),)), [Replicate()])
    assert nn.functional.rms_norm(x, (8,)).shape == (4, 8)
    assert x.sum().item() == x.to_local().sum().item()
    elsewhere = distribute_tensor(torch.randn(4, 8), x.device_mesh, [Shard(0)])
    with torch.no_grad():
        assert isinstance(elsewhere.sum().item(), float)  # a mesh that holds no experts: as torch has it


def case_selection_bias() -> None:
    """DistributedDataParallel, which copies rank 0's buffers, leaves each rank's own load alone."""
    for ranks in (None, replicas_and_experts()):
        one, many = Net(BIASED), DistributedDataParallel(spread(ranks, config=BIASED))
        for step in range(3):
            for x in batches(step):
                one(x)
            many(here(step))
        one.moe.router.update_selection_bias(0.1)
        many.module.moe.router.update_selection_bias(0.1)
        assert torch.equal(one.moe.router.e_score_correction_bias, many.module.moe.router.e_score_correction_bias)


def case_file_of_one_rank() -> None:
    """A state dict that torch.save wrote on rank 0 would hold its experts alone."""
    for net in (spread(), sharded_over_replicas(replicas_and_experts())):
        with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint"):
            torch.save(net.moe.experts.state_dict(), io.BytesIO())


def case_parts() -> None:
    """A whole tensor is divided as DTensor divides it, where the ranks don't divide its rows too."""
    for num_rows in (3, 5, 8):
        rows = torch.randn(num_rows, 2)
        expected = distribute_tensor(rows, init_device_mesh("cpu", (4,)), [Shard(0)], src_data_rank=None)
        part = part_of(rows, expected)
        assert part.shape == expected.shape
        assert torch.equal(part.to_local(), expected.to_local())


def case_assigned() -> None:
    """Whole weights that are assigned arrive, on a module without storage too, and none keeps them all."""
    one = Net()
    with torch.device("meta"):
        empty = Net(transport=dist.group.WORLD)
    for net in (empty, spread()):
        net.load_state_dict(copy.deepcopy(one.state_dict()), assign=True)
        torch.testing.assert_close(net(here()), one(here()), atol=1e-6, rtol=0)
        for parameter in tm.expert_parameters(net):
            assert parameter.to_local().untyped_storage().nbytes() == parameter.to_local().nbytes


def case_meshes() -> None:
    for ranks in ([1, 0, 3, 2], [[3, 1], [0, 2]], [[1, 0], [2, 3]]):
        mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replica", "expert")[-torch.tensor(ranks).dim() :])
        with pytest.raises(ValueError, match="don't ascend"):
            spread(mesh)
    spread(DeviceMesh("cpu", [[0, 3], [1, 2]], mesh_dim_names=("replica", "expert")))


def case_fully_shard() -> None:
    """Dense parameters are averaged over all ranks that train the experts beside them, or refused."""
    mesh = replicas_and_experts()
    for own in (mesh["replica"], mesh["expert"]):
        net = spread(mesh)
        with pytest.raises(ValueError, match="drift apart"):
            fully_shard(net, mesh=own, ignored_params=set(tm.expert_parameters(net)))
    net = spread(mesh)
    fully_shard(net.moe.experts, mesh=mesh["replica"])
    fully_shard(net)
    one = Net()
    torch.stack([one(x).square().mean() for x in batches()]).mean().backward()
    net(here()).square().mean().backward()
    for expected, got in zip(one.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(whole(got.grad), expected.grad, atol=1e-6, rtol=0)


def sharded_over_replicas(mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None, **made: Any) -> Net:
    net = spread(mesh, **made)
    settings = {} if policy is None else {"mp_policy": policy}
    fully_shard(net.moe.experts, mesh=mesh["replica"], **settings)
    fully_shard(net, **settings)
    return net


def case_replicas_averaged_by_fsdp() -> None:
    """FSDP2 alone averages experts that it shards over their replicas: in its dtype, and when it is told to."""
    mesh, one = replicas_and_experts(), Net()
    for step in range(2):
        torch.stack([one(x).square().mean() for x in batches(step)]).mean().backward()
    net = sharded_over_replicas(mesh)
    for step, is_synchronised in enumerate((False, True)):
        net.set_requires_gradient_sync(is_synchronised)
        loss = net(here(step)).square().mean()
        with CommDebugMode() as counted:
            loss.backward()
        reduced = [str(op) for op in counted.get_comm_counts() if "reduce" in str(op)]
        assert not reduced or (is_synchronised and all("reduce_scatter" in op for op in reduced)), reduced
    for expected, got in zip(one.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(whole(got.grad), expected.grad, atol=1e-6, rtol=0)

    net = sharded_over_replicas(mesh, MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    net(here().bfloat16()).float().square().mean().backward()
    for parameter in net.moe.experts.parameters():
        grad = parameter.grad.to_local()
        assert not torch.equal(grad, grad.bfloat16().float()), "the average was rounded to the parameter's dtype"


def case_drawn_over_replicas() -> None:
    """Memory after fully_shard: every rank draws the experts that it holds, those that one device draws."""
    for num_experts in (8, 6):
        config = tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=num_experts, top_k=2, bias=True)
        mesh = replicas_and_experts()
        experts = tm.GroupedExperts(config, mesh, device="meta")
        fully_shard(experts, mesh=mesh["replica"])
        experts.to_empty(device="cpu")
        experts.reset_parameters(torch.Generator().manual_seed(1))
        one = tm.GroupedExperts(config, generator=torch.Generator().manual_seed(1))
        for expected, got in zip(one.parameters(), experts.parameters(), strict=True):
            first, last = ((0, num_experts // 2), (num_experts // 2, num_experts))[mesh.get_local_rank("expert")]
            chunk = expected[first:last].chunk(2)[mesh.get_local_rank("replica")]
            torch.testing.assert_close(got.to_local(), chunk.detach(), atol=0, rtol=0)
    experts = tm.GroupedExperts(config, mesh, generator=torch.Generator().manual_seed(1))
    fully_shard(experts, mesh=mesh["replica"], shard_placement_fn=lambda _: Shard(1))
    before = experts.gate_up_proj.to_local().clone()
    with pytest.raises(ValueError, match="FSDP2 has sharded dimension 1"):
        experts.reset_parameters(torch.Generator().manual_seed(2))
    assert torch.equal(experts.gate_up_proj.to_local(), before)


def case_clipped_without_gradients() -> None:
    """Ranks that have no gradient of a mesh's experts, or of some of them, find the norm with the others."""
    mesh, rank = replicas_and_experts(), dist.get_rank()
    for net, norm_type in itertools.product((spread(), spread(mesh), sharded_over_replicas(mesh)), (2.0, math.inf)):
        experts = net.moe.experts
        for weight, ranks in ((experts.gate_up_proj, (0,)), (experts.down_proj, (0, 1))):
            weight.grad = torch.full_like(weight, rank + 2.0) if rank in ranks else None
        grads = [weight.grad.to_local() for weight in experts.parameters() if weight.grad is not None]
        norms = [torch.tensor(0.0) for _ in range(dist.get_world_size())]
        dist.all_gather(norms, nn.utils.get_total_norm(grads, norm_type))
        members = experts.down_proj.device_mesh.mesh.flatten().tolist()
        expected = torch.linalg.vector_norm(torch.stack([norms[member] for member in members]), norm_type)
        wanted = [grad / max(expected.item(), 1.0) for grad in grads]
        torch.testing.assert_close(tm.clip_grad_norm_(experts.parameters(), 1.0, norm_type), expected)
        torch.testing.assert_close(grads, wanted)


def case_changed_in_place() -> None:
    """What a layer under FSDP2 gives may be added to."""
    one, many = Net(), spread()
    ignored = set(tm.expert_parameters(many))
    fully_shard(many.first)
    fully_shard(many.moe, ignored_params=ignored)
    for net, tokens in ((one, batches()), (many, [here()])):
        losses = []
        for x in tokens:
            y = net.moe(net.first(x[None]))
            y += x
            losses.append(y.square().mean())
        torch.stack(losses).mean().backward()
    for expected, got in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(whole(got.grad), expected.grad, atol=1e-6, rtol=0)


def case_too_late() -> None:
    """What holds the whole experts already would wait for their gradients, or has made other DTensors of them."""
    wrapped = nn.ModuleDict({"inner": DistributedDataParallel(Net())})
    with pytest.raises(ValueError, match="DistributedDataParallel was made with the experts"):
        tm.parallelize(wrapped, dist.group.WORLD)
    sharded = Net()
    fully_shard(sharded)
    with pytest.raises(ValueError, match="before fully_shard"):
        tm.parallelize(sharded, dist.group.WORLD)


def case_replicated_slots() -> None:
    net = Net()
    placement = tm.ExpertPlacement.balanced(torch.arange(8.0) + 1, dist.get_world_size(), 3)
    tm.parallelize(net, dist.group.WORLD, placement=placement)
    net.moe.experts.gate_up_proj.requires_grad_(False)
    with pytest.raises(ValueError, match="several slots"):
        net(here())
    # Seven frozen experts in eight slots: a state dict has the seven, in the order of the model.
    torch.manual_seed(0)
    seven = tm.MoELayer(tm.MoEConfig(hidden_size=8, intermediate_size=12, num_experts=7, top_k=2)).requires_grad_(False)
    expected, weights = seven(here()), {name: tensor.clone() for name, tensor in seven.state_dict().items()}
    placement = tm.ExpertPlacement.balanced(torch.arange(7.0), dist.get_world_size(), 2)
    tm.parallelize(seven, dist.group.WORLD, placement=placement)
    torch.testing.assert_close(seven(here()), expected)
    for name, tensor in seven.state_dict().items():
        assert torch.equal(whole(tensor), weights[name]), name


def case_copies_over_replicas() -> None:
    """Ranks that hold copies of the same experts never average a layer's gradients with those of its deepcopy."""
    mesh = replicas_and_experts()
    net = spread(mesh)
    nets = [net, copy.deepcopy(net)]
    for one in nets:
        one(here()).sum().backward()  # alike on all ranks
    losses = [one(here()).sum() for one in nets]
    with pytest.raises(tm.CountMismatch, match="different layers, or of a layer and its deepcopy"):
        losses[mesh.get_local_rank("replica")].backward()


def case_anomaly_mode() -> None:
    """Each rank looks for NaN in its own experts' gradients, all ranks or one alone, and finds it."""
    expected, net = spread(), spread()
    expected(here()).square().mean().backward()
    for is_wanted in (True, dist.get_rank() == 1):
        net.zero_grad()
        with set_detect_anomaly(is_wanted):
            net(here()).square().mean().backward()
        for wanted, got in zip(expected.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(whole(got.grad), whole(wanted.grad))
    with set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
        (net.moe.experts.down_proj * torch.nan).to_local().sum().backward()


def case_recorded() -> None:
    """Both groups of expert ranks record into one folder, neighbours and others, and a layer on one rank alone."""
    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    folder, rank = Path(names[0]), dist.get_rank()
    strided = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replica", "expert"))
    with record(folder):
        for ranks in (replicas_and_experts(), strided, dist.group.WORLD, tm.transports.LocalTransport()):
            Net(transport=ranks)(here()).square().mean().backward()
    dist.barrier()
    own = f"ranks-{rank // 2 * 2:04d}-to-{rank // 2 * 2 + 1:04d}"
    alone, other = f"ranks-{rank:04d}-to-{rank:04d}", f"ranks-{rank % 2:04d}-to-{rank % 2 + 2:04d}-by-2"
    for name, size in ((own, 2), (other, 2), (".", 4), (alone, 1)):
        assert read_recording(folder / name).size == size


def on_rank(rank: int, change: Callable[[Net], object]) -> Callable[[Net], object]:
    return lambda net: change(net) if dist.get_rank() == rank else None


def keep_weight_elsewhere(net: Net) -> None:
    net.elsewhere = nn.ParameterList([net.moe.experts.down_proj])


def keep_view_elsewhere(net: Net) -> None:
    net.elsewhere = nn.ParameterList([net.moe.experts.down_proj.detach()[1:]])


def keep_view_inside(net: Net) -> None:
    net.moe.router.register_buffer("kept", net.moe.experts.down_proj.detach(), persistent=False)


def forget_module_that_keeps_it(net: Net) -> None:
    other = nn.ParameterList([net.moe.experts.down_proj])
    other.circle = [other]


def ignore_what_differs(net: Net) -> None:
    net._ddp_params_and_buffers_to_ignore = ["first.bias"]
    on_rank(1, lambda net: net.first.bias.detach().add_(1))(net)


def keep_kinds_of_tensors(net: Net) -> None:
    net.register_buffer("quantised", torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.quint8))
    net.register_buffer("conjugate", torch.ones(3, dtype=torch.complex64).conj())
    net.register_buffer("negative", torch.ones(3, dtype=torch.complex64).conj().imag)


def check_alone_is_heard() -> None:
    """What one rank alone gets wrong before anything is compared: the others hear of it at once."""
    for module, settings, words in (
        (nn.Linear(8, 8), {}, "neither MoELayer nor GroupedExperts"),
        (Net(), {"overlap": 3}, "overlap must be an OverlapConfig"),
        (Net(), {"expert_gradients": "none"}, "expert_gradients"),
    ):
        is_wrong = dist.get_rank() == 1
        with pytest.raises((ValueError, TypeError), match=words if is_wrong else "can't spread the experts of"):
            tm.parallelize(module if is_wrong else Net(), dist.group.WORLD, **(settings if is_wrong else {}))


def case_not_spread() -> None:
    """What would be lost or go on with whole weights, and weights that differ: refused on every rank, unchanged."""
    others, net, mesh = "can't spread the experts of", Net(), replicas_and_experts()
    for change, words, words_elsewhere in (
        (lambda net: net.moe.experts.down_proj.register_hook(torch.neg), r"^experts.down_proj has hooks", others),
        (
            lambda net: net.moe.experts.down_proj.register_post_accumulate_grad_hook(print),
            r"has hooks \(register_post_accumulate_grad_hook\).* after parallelize\(\)",
            others,
        ),
        (lambda net: net(here()).sum().backward(), "has a gradient", others),
        (
            lambda net: setattr(net.moe.experts.down_proj, "main_grad", torch.zeros(8, 8, 12)),
            r"down_proj.main_grad is a tensor \(8, 8, 12\)",
            others,
        ),
        (keep_weight_elsewhere, "is a weight of a ParameterList outside of the given MoELayer too", others),
        (keep_view_elsewhere, "is a weight of a ParameterList outside of the given MoELayer too", others),
        (keep_view_inside, r"experts.down_proj and router.kept are tied", others),
        (lambda net: net.moe.router.weight.detach().mul_(2), "router.weight .* another value .*manual_seed", None),
        (lambda net: net.moe.router.e_score_correction_bias.add_(1), "e_score_correction_bias .* another value", None),
        (lambda net: net.moe.bfloat16(), r"is torch.bfloat16 on ranks \[1\] and torch.float32 on rank 0", None),
        (lambda net: net.moe.to("meta"), r"is on the meta device on ranks \[1\]", None),
    ):
        for ranks in (dist.group.WORLD, mesh):
            net = Net(BIASED)
            on_rank(1, change)(net)
            before = list(map(id, net.parameters()))
            is_told = dist.get_rank() in (range(4) if ranks is dist.group.WORLD else range(2))
            expected = words if dist.get_rank() == 1 or (words_elsewhere is None and is_told) else others
            with pytest.raises(ValueError, match=expected):
                tm.parallelize(net.moe, ranks)
            assert list(map(id, net.parameters())) == before

    check_alone_is_heard()
    net = Net(BIASED)
    with pytest.raises(ValueError, match="router would count this rank's load alone: give parallelize"):
        tm.parallelize(net.moe.experts, dist.group.WORLD)
    net = Net()
    net.moe.experts.down_proj.scale_of_rate = 3.0
    for change in (forget_module_that_keeps_it, ignore_what_differs, keep_kinds_of_tensors):
        change(net)
    tm.parallelize(net, dist.group.WORLD)
    assert net.moe.experts.down_proj.scale_of_rate == 3.0
    with pytest.raises(ValueError, match=r"moe\.experts are spread over ranks already: call parallelize"):
        tm.parallelize(net, dist.group.WORLD)


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def case_bias_without_transport() -> None:
    """The load of all ranks moves the bias of a layer that knows of no ranks, under DistributedDataParallel."""
    one = Net(BIASED)
    for x in batches():
        one(x)
    load = one.moe.router.update_selection_bias(0.5)
    for broadcasts in (True, False):
        net = Net(BIASED)
        wrapped = DistributedDataParallel(net, broadcast_buffers=broadcasts)
        wrapped(here()).sum().backward()
        assert torch.equal(net.moe.router.update_selection_bias(0.5), load)
        wrapped(here()).sum().backward()
        assert torch.equal(net.moe.router.e_score_correction_bias, one.moe.router.e_score_correction_bias)
    assert through_file(net).moe.router.reduce_load is None
    # A DistributedDataParallel counts over its own ranks: from a file, and after one over others, which is gone.
    wrapped, net = through_file(wrapped), Net(BIASED)
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    DistributedDataParallel(net, process_group=pairs[dist.get_rank() // 2])
    spread_later = copy.deepcopy(net)
    tm.parallelize(spread_later, dist.group.WORLD)
    for later in (wrapped, DistributedDataParallel(net), spread_later):
        module = getattr(later, "module", later)
        module.moe.router.load.zero_()
        module.moe.router.e_score_correction_bias.zero_()
        later(here()).sum().backward()
        assert torch.equal(module.moe.router.update_selection_bias(0.5), load)
    net = Net(BIASED)
    DistributedDataParallel(net)
    assert copy.deepcopy(net).moe.router.reduce_load is net.moe.router.reduce_load
    net = Net(BIASED)
    fully_shard(net)
    net(here()).sum().backward()
    with pytest.raises(ValueError, match=r"set router\.reduce_load to a function"):
        net.moe.router.update_selection_bias()


def case_sums_beside_means() -> None:
    for gradients, number in (("mean", 0), ("sum", 1)):
        net, said = Net(), []
        tm.parallelize(net, dist.group.WORLD, expert_gradients=gradients)
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())
        logging.getLogger("tritonmoe").addHandler(handler)
        for _ in range(2):
            DistributedDataParallel(net)
        fully_shard(net, ignored_params=set(tm.expert_parameters(net)))
        logging.getLogger("tritonmoe").removeHandler(handler)
        assert len(said) == number, said
        assert all("4 times as large" in words and 'expert_gradients="mean"' in words for words in said)


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(transport=dist.group.WORLD)
        torch.manual_seed(1)
        rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        self.factors = nn.ParameterList([torch.randn(8, 2, 8)[rows], torch.randn(8, 24, 2)[rows]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.moe(self.net.first(x), adapters=tm.ExpertAdapters(*self.factors))


def case_factors_of_a_call() -> None:
    """DistributedDataParallel would average one rank's factors with others'; ignored, they count as experts."""
    with pytest.raises(ValueError, match="_ddp_params_and_buffers_to_ignore"):
        DistributedDataParallel(Adapted())(here())
    adapted = Adapted()
    adapted._ddp_params_and_buffers_to_ignore = ["factors.0", "factors.1"]
    wrapped = DistributedDataParallel(adapted)
    wrapped(here()).square().mean().backward()
    spread = [p.grad.to_local() for p in tm.expert_parameters(adapted)] + [p.grad for p in adapted.factors]
    squares = torch.stack([grad.square().sum() for grad in spread]).sum()
    dist.all_reduce(squares)
    dense = [p.grad for p in adapted.net.parameters() if not isinstance(p, DTensor)]
    expected = (squares + torch.stack([grad.square().sum() for grad in dense]).sum()).sqrt()
    torch.testing.assert_close(tm.clip_grad_norm_(adapted.parameters(), 1.0), expected)
    # One that is gone averages nothing, and leaves parameters that can be swapped, as those of calls can.
    adapted, linear = Adapted(), nn.Linear(2, 2)
    for module in (adapted, linear):
        DistributedDataParallel(module)
    adapted(here()).sum().backward()
    adapted.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    for module in (adapted.factors, linear):
        assert {parameter.dtype for parameter in module.double().parameters()} == {torch.float64}
    torch.__future__.set_swap_module_params_on_conversion(False)


if __name__ == "__main__":
    run_cases(lambda case: globals()[f"case_{case}"](), sys.argv[1:])
