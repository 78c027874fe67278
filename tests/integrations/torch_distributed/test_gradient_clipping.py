"""clip_grad_norm_ over ranks, and a data-parallel training loop around it: both are those of one device."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import tritonmoe as tm
from tritonmoe.transports import LocalTransport, Transport, TwoLevelTransport

CONFIG = tm.MoEConfig(8, 6, 12, 3, bias=True, load_balance_loss_weight=0.2, load_balance_over="global")
NORM_TYPES = (1, 2.0, 3, math.inf)
REPLICAS = tm.ExpertPlacement(((0, 1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 0, 6)))


class Model(nn.Module):
    def __init__(self, transport: Transport | None, placement: tm.ExpertPlacement | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(
            tm.MoELayer(
                CONFIG, transport, tm.OverlapConfig(2), placement=placement, generator=generator, dtype=torch.float64
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)

    def aux_loss(self) -> Tensor:
        return sum((layer.aux_loss for layer in self.layers), torch.zeros(()))


def batch(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    """Return a rank's tokens, of another number on each, and their classes."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    num_tokens = (5, 9, 0, 6)[rank]
    x = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (num_tokens,), generator=generator)


def draw_grads(whole: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in whole.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def take_grads(model: nn.Module, whole: nn.Module) -> None:
    """Return a rank's model the gradients of its parameters."""
    whole_parameters = dict(whole.named_parameters())
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(name, recurse=False):
            grad = whole_parameters[parameter_name].grad
            parameter.grad = (grad[list(module.expert_ids)] if isinstance(module, tm.GroupedExperts) else grad).clone()


def assert_same_grads(model: nn.Module, whole: nn.Module) -> None:
    expected = copy.deepcopy(model)
    take_grads(expected, whole)
    for actual, right in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, right.grad)


def clipped_by_torch(norm_type: float, max_norm: float) -> tuple[Model, Tensor]:
    whole = Model(None)
    draw_grads(whole)
    return whole, nn.utils.clip_grad_norm_(whole.parameters(), max_norm, norm_type)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("kind", ["W1", "W2", "W4", "replicas", "two levels", "copied", "assigned", "foreach off"])
def test_the_norm_is_that_of_one_device(kind: str, norm_type: float) -> None:
    num_ranks = {"W1": 1, "W4": 4, "two levels": 4}.get(kind, 2)
    unclipped = Model(None)
    draw_grads(unclipped)

    def on_rank(world: Transport) -> list[Tensor]:
        transport = TwoLevelTransport(world, 2) if kind == "two levels" else world
        model = Model(transport, REPLICAS if kind == "replicas" else None)
        if kind == "copied":
            model = copy.deepcopy(model)
        if kind == "assigned":
            model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        norms = []
        for max_norm, (whole, _) in expected.items():
            take_grads(model, unclipped)
            foreach = False if kind == "foreach off" else None
            norms.append(tm.clip_grad_norm_(model.parameters(), max_norm, norm_type, foreach=foreach))
            assert_same_grads(model, whole)
        return norms

    expected = {max_norm: clipped_by_torch(norm_type, max_norm) for max_norm in (1.0, 1e6)}
    for norms in (results := tm.run_on_emulated_ranks(on_rank, num_ranks)):
        torch.testing.assert_close(norms, [norm for _, norm in expected.values()])
        assert [norm.item() for norm in norms] == [norm.item() for norm in results[0]]  # the same bits


def test_torchs_own_gives_every_rank_another_norm() -> None:
    """What this function is for: where this fails, it is not needed any more."""

    def on_rank(transport: Transport) -> float:
        model, whole = Model(transport), Model(None)
        draw_grads(whole)
        take_grads(model, whole)
        return nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()

    first, second = tm.run_on_emulated_ranks(on_rank, 2)
    assert first != pytest.approx(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_without_ranks_it_is_torchs(dtype: torch.dtype) -> None:
    for transport in (None, LocalTransport()):
        grads = []
        for clip in (nn.utils.clip_grad_norm_, tm.clip_grad_norm_):
            layer = tm.MoELayer(CONFIG, transport, generator=torch.Generator().manual_seed(0), dtype=dtype)
            draw_grads(layer)
            norm = clip(layer.parameters(), 0.5)
            grads.append([norm.float(), *(p.grad.float() for p in layer.parameters())])
        tolerance = {"rtol": 0.02, "atol": 0.0} if dtype == torch.bfloat16 else {}  # torch's norm is a bf16 number
        torch.testing.assert_close(grads[1], grads[0], **tolerance)
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 3.0)
    assert tm.clip_grad_norm_(parameter, 3.0).item() == 6.0
    assert parameter.grad.tolist() == pytest.approx([1.5] * 4)
    assert tm.clip_grad_norm_([], 1.0).item() == 0


def test_a_rank_without_gradients_takes_part() -> None:
    def on_rank(transport: Transport) -> float:
        experts = tm.GroupedExperts(CONFIG, transport)
        if transport.rank == 0:
            experts.down_proj.grad = torch.full_like(experts.down_proj, 0.5)
        return tm.clip_grad_norm_(experts.parameters(), 1.0).item()

    norm = 0.5 * math.sqrt(4 * 8 * 6)
    assert tm.run_on_emulated_ranks(on_rank, 3) == [pytest.approx(norm)] * 3


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_norm_that_is_not_finite(norm_type: float) -> None:
    """On one rank alone: every rank hears of it, and nothing is scaled."""

    def on_rank(transport: Transport) -> None:
        experts = tm.GroupedExperts(CONFIG, transport)
        for parameter in experts.parameters():
            parameter.grad = torch.ones_like(parameter)
        if transport.rank == 1:
            experts.down_proj.grad[0, 0, 0] = math.nan
        with pytest.raises(RuntimeError, match=r"total norm of order .* is nan"):
            tm.clip_grad_norm_(experts.parameters(), 1.0, norm_type, error_if_nonfinite=True)
        assert experts.gate_up_proj.grad.eq(1).all()
        assert tm.clip_grad_norm_(experts.parameters(), 1.0, norm_type).isnan()
        assert experts.gate_up_proj.grad.isnan().all()  # as torch's does

    tm.run_on_emulated_ranks(on_rank, 2)


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.inf, 1.0), (math.inf, math.nan), (math.nan, math.nan)])
def test_a_dense_norm_that_is_not_finite(values: tuple[float, float]) -> None:
    """Ranks that differ in it are refused; the same on all of them passes, as with torch's."""

    def on_rank(transport: Transport) -> None:
        model = nn.ModuleList([tm.GroupedExperts(CONFIG, transport), nn.Linear(2, 2)])
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        model[1].weight.grad[0, 0] = values[transport.rank]
        if math.isnan(values[0]):
            assert tm.clip_grad_norm_(model.parameters(), 1.0).isnan()
            return
        with pytest.raises(ValueError, match=r"that are finite, infinite or NaN on some ranks.* average them first"):
            tm.clip_grad_norm_(model.parameters(), 1.0)
        assert model[0].down_proj.grad.eq(0.5).all()

    tm.run_on_emulated_ranks(on_rank, 2)


@pytest.mark.parametrize("norm_type", [0, -1.0, -math.inf, math.nan])
def test_norm_types_that_are_refused(norm_type: float) -> None:
    with pytest.raises(ValueError, match="norm_type must be positive or inf"):
        tm.clip_grad_norm_([nn.Parameter(torch.ones(1))], 1.0, norm_type)


@pytest.fixture
def _group_of_one(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("foreach", [None, False])
def test_dtensors_beside_plain_tensors(norm_type: float, foreach: bool | None) -> None:
    """Where a model is partly FSDP2's, torch's own raises for the mixture; meshes count one by one."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(4, 3, generator=generator) for _ in range(5)]
    meshes = [dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=(name,)) for name in ("expert", "shard")]
    plain = [nn.Parameter(torch.zeros(4, 3)) for _ in grads]
    mixed = [nn.Parameter(torch.zeros(4, 3)) for _ in grads[:2]]
    for mesh, placement in ((meshes[0], Shard(0)), (meshes[1], Shard(1)), (meshes[1], Replicate())):
        mixed.append(nn.Parameter(DTensor.from_local(torch.zeros(4, 3), mesh, [placement])))
    for parameters in (plain, mixed):
        for parameter, grad in zip(parameters, grads, strict=True):
            is_sharded = isinstance(parameter, DTensor)
            parameter.grad = (
                DTensor.from_local(grad.clone(), parameter.device_mesh, parameter.placements)
                if is_sharded
                else grad.clone()
            )
    expected = nn.utils.clip_grad_norm_(plain, 1.0, norm_type)
    norm = tm.clip_grad_norm_(mixed, 1.0, norm_type, foreach=foreach)
    assert not isinstance(norm, DTensor)
    torch.testing.assert_close(norm, expected)
    for actual, right in zip(mixed, plain, strict=True):
        grad = actual.grad.to_local() if isinstance(actual, DTensor) else actual.grad
        torch.testing.assert_close(grad, right.grad)


def train(model: Model, transport: Transport | None, batches: list[list[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """Train as users do, on the mean over all ranks' tokens; give each step's mean loss and norm."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    size = 1 if transport is None else transport.size
    experts = {id(p) for layer in model.layers for p in layer.experts.parameters()}
    seen = []
    for step in batches:
        x, classes = (torch.cat(parts) for parts in zip(*step, strict=True))
        if transport is not None:
            x, classes = step[transport.rank]
        num_tokens = sum(len(own) for own, _ in step)
        # Summed and divided by the mean number of tokens, so that the mean over the ranks is that over all tokens.
        loss = F.cross_entropy(model(x), classes, reduction="sum") * size / num_tokens + model.aux_loss()
        optimizer.zero_grad()
        loss.backward()
        mean_loss = loss.detach()
        if transport is not None:
            transport.all_reduce(mean_loss, "mean")
            for parameter in model.parameters():
                if id(parameter) not in experts:
                    transport.all_reduce(parameter.grad, "mean")
        norm = tm.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        seen += [mean_loss, norm]
    return seen


@pytest.mark.parametrize("num_ranks", [2, 4], ids="W{}".format)
def test_data_parallel_training_is_that_of_one_device(num_ranks: int) -> None:
    """Ranks have different numbers of tokens, one of them none; losses, norms and all weights after five steps."""
    batches = [[batch(rank, step) for rank in range(num_ranks)] for step in range(5)]
    whole = Model(None)
    expected = train(whole, None, batches)
    assert min(norm.item() for norm in expected[1::2]) > 0.3  # every step is clipped

    def on_rank(transport: Transport) -> tuple[Model, list[Tensor]]:
        model = Model(transport)
        with torch.no_grad():
            if transport.rank:
                model.head.weight.zero_()
            transport.broadcast(model.head.weight)
        return model, train(model, transport, batches)

    for model, seen in tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=20):
        torch.testing.assert_close(seen, expected)
        for name, module in model.named_modules():
            for parameter_name, parameter in module.named_parameters(name, recurse=False):
                right = whole.get_parameter(parameter_name)
                right = right[list(module.expert_ids)] if isinstance(module, tm.GroupedExperts) else right
                torch.testing.assert_close(parameter, right)


@pytest.mark.parametrize("given", ["themselves", "cast", "scaled"])
def test_factors_of_a_call_count_as_experts(given: str) -> None:
    """They are other ones on every rank, as the experts are that they adapt."""
    generator = torch.Generator().manual_seed(3)
    wholes = [torch.randn(12, 2, 8, generator=generator), torch.randn(12, 12, 2, generator=generator)]
    x, ids = torch.randn(7, 8, generator=generator), torch.randint(12, (7, 3), generator=generator)

    def on_rank(transport: Transport | None) -> tuple[float, list[Tensor]]:
        layer = tm.GroupedExperts(
            CONFIG, transport, expert_gradients="sum", generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        kind = torch.float32 if given == "cast" else torch.float64
        factors = [nn.Parameter(whole[list(layer.expert_ids)].to(kind)) for whole in wholes]
        used = [2 * factor if given == "scaled" else factor.double() for factor in factors]
        rows = slice(None) if transport is None else slice(3 * transport.rank, (3, 7)[transport.rank])
        weights = torch.full((7, 3), 0.5, dtype=torch.float64)
        out = layer(x[rows].double(), ids[rows], weights[rows], adapters=tm.ExpertAdapters(*used))
        out.square().sum().backward()
        norm = tm.clip_grad_norm_([*layer.parameters(), *factors], 1.0).item()
        return norm, [factor.grad for factor in factors]

    (norm, grads), parts = on_rank(None), tm.run_on_emulated_ranks(on_rank, 2)
    assert [part for part, _ in parts] == [pytest.approx(norm)] * 2
    for number, grad in enumerate(grads):
        torch.testing.assert_close(torch.cat([part[number] for _, part in parts]), grad)


def test_dense_gradients_that_are_not_averaged_are_refused() -> None:
    def on_rank(transport: Transport) -> None:
        model, whole = Model(transport), Model(None)
        draw_grads(whole)
        take_grads(model, whole)
        model.head.weight.grad *= 1 + transport.rank
        with pytest.raises(ValueError, match=r"of dense parameters have norms from .* on the ranks, .*: average them"):
            tm.clip_grad_norm_(model.parameters(), 1.0)

    tm.run_on_emulated_ranks(on_rank, 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflows_on", [0, 1, None])
def test_grad_scaler_skips_on_all_ranks_or_on_none(fused: bool, overflows_on: int | None) -> None:
    """The optimizer of a rank without gradients of its experts hears of an overflow too."""

    def on_rank(transport: Transport) -> tuple[float, bool]:
        model = Model(transport).float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        for parameter in model.head.parameters():
            parameter.grad = torch.ones_like(parameter)
        if transport.rank == overflows_on:
            model.layers[0].experts.down_proj.grad = torch.full_like(model.layers[0].experts.down_proj, math.inf)
        before = model.head.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale(), torch.equal(model.head.weight, before)

    expected = (8.0, False) if overflows_on is None else (4.0, True)
    assert tm.run_on_emulated_ranks(on_rank, 2) == [expected] * 2
