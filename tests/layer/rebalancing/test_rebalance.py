"""Experts of emulated ranks move between steps: what they compute, what the optimizer keeps, what is refused."""

import copy
import functools
import io
import pickle
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import tritonmoe as tm
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.layer.rebalancing import better_placement
from tritonmoe.runtime.other_ranks import dummy_forwards
from tritonmoe.transports import Transport

pytestmark = pytest.mark.usefixtures("few_objects")
CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=6, num_experts=8, top_k=2, bias=True)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
"""Gate weights travel in fp32."""
REPLICATED = tm.ExpertPlacement(((0, 1, 2), (2, 3, 4), (4, 5, 6), (6, 7, 0)))


def made(transport: Transport | None, placement: tm.ExpertPlacement | None = None, **settings) -> tm.MoELayer:
    generator = torch.Generator().manual_seed(0)  # ranks are threads, which share torch's own
    return tm.MoELayer(CONFIG, transport, placement=placement, dtype=torch.float64, generator=generator, **settings)


def heated(layer: tm.MoELayer, hot: tuple[int, ...]) -> None:
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[list(hot)] = torch.eye(8, dtype=torch.float64)[: len(hot)] * 3
        layer.router.weight.requires_grad_(False)


def tokens(step: int, rank: int) -> Tensor:
    number = 0 if rank == 1 and step == 2 else 9 + rank  # one rank has no token once
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(number, 8, generator=generator, dtype=torch.float64)


def rebalancing(layer: nn.Module, *optimizers: torch.optim.Optimizer, **settings) -> tm.Rebalancer:
    """Return a Rebalancer for which a move takes no time, so that what is measured decides nothing."""
    found = tm.rebalance(layer, *optimizers, **{"every": 1, "history": 1, **settings})
    found._largest = lambda _: 1
    return found


def on_one_device(kind: Callable, size: int) -> list[dict[str, Tensor]]:
    """Return outputs, gradients and weights of every step of the whole batch."""
    layer = made(None)
    optimizer, steps = kind(layer.experts.parameters()), []
    for step in range(6):
        heated(layer, ((0, 1), (5, 4, 2))[step // 3])
        outs = [layer(tokens(step, rank)) for rank in range(size)]
        torch.stack([out.square().sum() for out in outs]).mean().backward()
        found = {f"out {rank}": out.detach() for rank, out in enumerate(outs)}
        found |= {f"{name}.grad": parameter.grad.clone() for name, parameter in layer.experts.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        steps.append(found | {name: parameter.detach().clone() for name, parameter in layer.experts.named_parameters()})
    return steps


@pytest.mark.parametrize(
    ("size", "replicated", "kind"),
    [
        pytest.param(4, False, ADAMW, marks=pytest.mark.thorough),
        (2, True, SGD),
        pytest.param(2, False, SGD, marks=pytest.mark.thorough),
        pytest.param(4, True, ADAMW, marks=pytest.mark.thorough),
        pytest.param(4, True, SGD, marks=pytest.mark.thorough),
    ],
)
def test_steps_behind_moves_are_those_of_one_device(size, replicated, kind):
    placement = REPLICATED if replicated else None
    if replicated and size == 2:
        placement = tm.ExpertPlacement(((0, 1, 2, 3, 4), (4, 5, 6, 7, 0)))
    expected = on_one_device(kind, size)

    def on_rank(transport: Transport) -> int:
        layer = made(transport, placement, overlap=tm.OverlapConfig(num_chunks=2))
        optimizer = kind(layer.experts.parameters())
        rebalancer, num_moves = rebalancing(layer, optimizer), 0
        wrong = []
        for step in range(6):
            heated(layer, ((0, 1), (5, 4, 2))[step // 3])
            out = layer(tokens(step, transport.rank))
            out.square().sum().backward()
            ids = list(layer.experts.expert_ids)
            found = {f"out {transport.rank}": out.detach()}
            grads = {f"{name}.grad": p.grad.clone() for name, p in layer.experts.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            found |= grads | {name: p.detach().clone() for name, p in layer.experts.named_parameters()}
            for name, value in found.items():
                wanted = expected[step][name]
                wanted = wanted if name.startswith("out") else wanted[ids]
                if not torch.allclose(value, wanted, **CLOSE):
                    wrong.append(f"step {step}, {name}")
            decided = rebalancer.step()
            num_moves += bool(decided and decided.moved)
        assert not wrong
        rebalancer.restore()
        assert layer.experts.placement == placement
        for name, parameter in layer.experts.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[-1][name][list(layer.experts.expert_ids)], **CLOSE)
        return num_moves

    for num_moves in tm.run_on_emulated_ranks(on_rank, size, timeout_s=60):
        assert num_moves >= 2


def test_what_a_look_says():
    def on_rank(transport: Transport) -> tuple:
        layer = made(transport)
        heated(layer, (0, 1))
        optimizer = torch.optim.AdamW(layer.experts.parameters())
        rebalancer = rebalancing(layer, optimizer, every=3, history=2)
        decided = []
        for step in (0, 1, 3):
            layer(tokens(step, transport.rank).abs()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            decided.append(rebalancer.step())
        return decided, rebalancer.last, sum(len(tokens(step, transport.rank)) for step in (1, 3))

    found = tm.run_on_emulated_ranks(on_rank, 4, timeout_s=60)
    for (*none, decided), last, _ in found:
        assert none == [None, None]
        assert decided is last
        assert (decided.step, decided.moved) == (3, ("experts",))
        assert decided.imbalance_before == pytest.approx(4.0)  # all pairs are the two experts' of rank 0
        assert decided.imbalance_after == pytest.approx(2.0)
        # Experts 0 and 1 part: one of them changes places with another, 5 tensors of 4 weights, in fp64.
        each = (12 * 8 + 8 * 6 + 12 + 8) * 8 * 3
        assert decided.moved_bytes == 2 * each
        assert decided.paid_after_steps == 1
        assert "had 4.00 times the mean and has 2.00" in str(decided)
        assert decided.expected_gain_s == found[0][0][-1].expected_gain_s


def test_nothing_moves_where_that_never_pays():
    def on_rank(transport: Transport) -> tuple[tm.Rebalanced | None, object]:
        layer = made(transport)
        heated(layer, (0, 1))
        rebalancer = rebalancing(layer, every=1)
        rebalancer._ns_of_megabyte = 10**15
        with torch.no_grad():
            layer(tokens(0, transport.rank).abs())
        return rebalancer.step(), layer.experts.placement

    for decided, placement in tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60):
        assert decided.moved == ()
        assert decided.paid_after_steps is None
        assert placement is None
        assert "no move of experts would pay" in str(decided)


def test_a_move_is_priced_by_the_last_one():
    def on_rank(transport: Transport) -> tuple[float, float, int]:
        layer = made(transport)
        heated(layer, (0, 1))
        rebalancer = tm.rebalance(layer, every=1)
        rebalancer._ns_of_megabyte = 1
        with torch.no_grad():
            layer(tokens(0, transport.rank).abs())
        decided = rebalancer.step()
        return decided.expected_move_s, decided.took_s, rebalancer._ns_of_megabyte

    found = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)
    assert {found[0][2]} == {number for _, _, number in found}
    expected_s, took_s = found[0][0], max(took_s for _, took_s, _ in found)
    assert found[0][2] == pytest.approx(took_s / expected_s, rel=1e-6)


class Burst:
    """A clock, and a transport whose link lets so many bytes pass at once, and each further one in a nanosecond."""

    rank, size, seconds = 0, 2, 0.0

    def __init__(self, burst: int) -> None:
        self.burst, self.sent = burst, 0

    def barrier(self) -> None:
        self.sent = 0

    def exchange(self, rows: torch.Tensor, to: list[int], came: list[int]) -> "Burst":
        assert to == came == [0, len(rows)]
        before = max(0, self.sent - self.burst)
        self.sent += rows.nbytes
        self.seconds += (max(0, self.sent - self.burst) - before) * 1e-9
        self.rows = rows
        return self

    def wait(self) -> torch.Tensor:
        return self.rows


@pytest.mark.parametrize("burst", [0, 4 * 2**20])
def test_a_first_move_is_priced_without_the_bursts_of_links(burst: int, monkeypatch) -> None:
    """Experts of 2 MiB in two tensors, of which 8 have 16 MiB; 2 MiB pass in the burst. A megabyte takes 2**20 ns."""
    transport = Burst(burst)
    monkeypatch.setattr(better_placement.time, "perf_counter", lambda: transport.seconds)
    tensors = {name: torch.zeros(16 * 4, 2**16) for name in ("weight", "exp_avg")}
    assert better_placement.ns_of_a_megabyte(transport, tensors, 16) == pytest.approx(2**20, rel=1e-6)
    few = {name: tensor[:8] for name, tensor in tensors.items()}  # two experts: there is nothing to compare with
    assert better_placement.ns_of_a_megabyte(transport, few, 2) == pytest.approx(2**20 if burst == 0 else 1, rel=1e-6)


def test_the_link_is_measured():
    def on_rank(transport: Transport) -> int:
        layer = made(transport)
        heated(layer, (0, 1))
        rebalancer = tm.rebalance(layer, every=1)
        return rebalancer._agreed_ns_of_megabyte(rebalancer._check(is_moving=False))

    link = tm.LinkModel(bandwidth_gb_per_s=0.05, latency_us=0)  # a megabyte takes 21 ms
    first, *others = tm.run_on_emulated_ranks(on_rank, 4, link=link, timeout_s=60)
    assert first > 18e6
    assert others == [first] * 3


def test_the_first_move_is_priced_as_it_comes():
    """Where the link takes nearly all of the time, which a loaded machine only makes longer."""

    def on_rank(transport: Transport) -> tuple[float, float]:
        config = tm.MoEConfig(hidden_size=128, intermediate_size=128, num_experts=8, top_k=2)
        layer = tm.MoELayer(config, transport, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[:2] = 1.0
            rebalancer = tm.rebalance(layer, every=1)
            layer(torch.rand(64, 128))
            rebalancer._num_steps, rebalancer._every = 10**6 - 1, 10**6  # whatever it takes, it pays
            decided = rebalancer.step()
        return decided.expected_move_s, decided.took_s

    link = tm.LinkModel(bandwidth_gb_per_s=0.002, latency_us=0)  # an expert takes 98 ms
    for expected_s, took_s in tm.run_on_emulated_ranks(on_rank, 2, link=link, timeout_s=60):
        assert expected_s > 0.09
        assert took_s / 3 < expected_s < 3 * took_s


def test_recomputed_forwards_and_skipped_pairs_are_counted_once_and_not():
    from torch.utils.checkpoint import checkpoint

    def on_rank(transport: Transport) -> list[int]:
        layer = made(transport)
        rebalancing(layer, every=5)
        x = tokens(0, transport.rank).requires_grad_()
        mask = torch.arange(len(x)) > 2
        checkpoint(lambda rows: layer(rows, token_mask=mask), x, use_reentrant=False).sum().backward()
        return layer.experts.expert_shards.calls.load.tolist()

    for rank, load in enumerate(tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)):
        assert sum(load[:-1]) == 2 * (9 + rank - 3)
        assert load[-1] == 2 * 3


def test_a_state_dict_of_this_rank_alone_waits_for_restore():
    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        heated(layer, (0, 1))
        kept = {name: value.clone() for name, value in layer.state_dict().items()}
        rebalancer = rebalancing(layer)
        with torch.no_grad():
            layer(tokens(0, transport.rank).abs())
        assert rebalancer.step().moved
        for refused in (layer.state_dict, lambda: layer.load_state_dict(kept)):
            with pytest.raises(ValueError, match="call restore"):
                refused()
        rebalancer.restore()
        for name, value in layer.state_dict().items():
            assert torch.equal(value, kept[name]), name

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def refuses(prepare: Callable, message: str, *, kind: type[Exception] = ValueError) -> None:
    """Check that rebalance(), or the first look, raises on every rank."""

    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        heated(layer, (0, 1))
        with pytest.raises(kind, match=message):
            prepare(layer, transport)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_what_is_refused_at_once():
    refuses(lambda layer, _: tm.rebalance(nn.Linear(2, 2)), "has no experts that are spread")
    refuses(lambda layer, _: tm.rebalance(made(None)), "has no experts that are spread")
    refuses(lambda layer, _: tm.rebalance(layer, object()), "give optimizers of torch.optim themselves", kind=TypeError)
    refuses(lambda layer, _: tm.rebalance(layer.experts.gate_up_proj), "must be a torch.nn.Module", kind=TypeError)
    for name in ("every", "history"):
        for number in (0, 1.5, True):
            refuses(lambda layer, _, n=name, of=number: tm.rebalance(layer, **{n: of}), f"{name} must be a number of")


def test_an_optimizer_that_is_not_given_is_refused():
    def prepare(layer: tm.MoELayer, transport: Transport) -> None:
        optimizer = torch.optim.SGD(layer.experts.parameters(), lr=0.1)
        tm.rebalance(layer)
        del optimizer

    refuses(prepare, "was made with experts.* and not given to tm.rebalance")


def test_adapters_of_a_call_are_refused():
    def prepare(layer: tm.MoELayer, transport: Transport) -> None:
        ones = functools.partial(torch.ones, dtype=torch.float64)
        rebalancer = rebalancing(layer)
        layer(tokens(0, transport.rank), adapters=tm.ExpertAdapters(down_a=ones(4, 2, 6), down_b=ones(4, 8, 2)))
        rebalancer.step()

    refuses(prepare, "were called with adapters=")


def test_a_parameter_of_the_caller_beside_the_experts_is_refused():
    def prepare(layer: tm.MoELayer, transport: Transport) -> None:
        layer.experts.scale = nn.Parameter(torch.ones(4))
        tm.rebalance(layer)

    refuses(prepare, "scale of experts is no weight with")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": lambda experts: nn.utils.parametrizations.weight_norm(experts, "gate_up_proj"),
    "spectral_norm": lambda experts: nn.utils.parametrizations.spectral_norm(experts, "down_proj"),
    "a bias": lambda experts: nn.utils.parametrize.register_parametrization(experts, "down_proj_bias", Doubled()),
    "pruning": lambda experts: prune.l1_unstructured(experts, "down_proj", amount=0.3),
    "older spectral_norm": lambda experts: nn.utils.spectral_norm(experts, "gate_up_proj"),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_do_not_move(how: str) -> None:
    """What is written into one is lost at the next call: outputs would be those of other experts."""

    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        heated(layer, (0, 1))
        rebalancer = rebalancing(layer)
        assert not rebalancer.step().moved
        COMPUTED[how](layer.experts)
        with torch.no_grad():
            layer(tokens(0, transport.rank).abs())
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        for call in (lambda: tm.rebalance(layer), rebalancer.step, rebalancer.restore):
            with pytest.raises(ValueError, match="of experts is computed from other parameters"):
                call()
        assert layer.experts.placement is None
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


class Teacher(nn.Module):
    """Holds what it is given, outside of the layers that are given to rebalance()."""

    def __init__(self, weight: Tensor, *, is_buffer: bool = False) -> None:
        super().__init__()
        if is_buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight) if type(weight) is Tensor else weight


SHARING: dict[str, tuple[Callable[[tm.MoELayer, tm.MoELayer], object], str]] = {
    "two layers": (
        lambda first, second: setattr(second.experts, "gate_up_proj", first.experts.gate_up_proj),
        "0.experts.gate_up_proj shares memory with 1.experts.gate_up_proj",
    ),
    "two layers, by a view": (
        lambda first, second: setattr(second.experts, "down_proj", nn.Parameter(first.experts.down_proj.data)),
        "experts.down_proj shares memory with .*experts.down_proj",
    ),
    "one layer's weights": (
        lambda first, _: setattr(first.experts, "down_proj_bias", nn.Parameter(first.experts.down_proj[:, :, 0])),
        "experts.down_proj.* shares memory with 0.experts.down_proj",
    ),
    "a parameter outside": (
        lambda first, _: Teacher(first.experts.down_proj),
        "0.experts.down_proj shares memory with weight of a Teacher whose experts stay",
    ),
    "a view outside": (
        lambda first, _: Teacher(first.experts.down_proj.detach()[2:]),
        "0.experts.down_proj shares memory with weight of a Teacher whose experts stay",
    ),
    "a buffer outside": (
        lambda first, _: Teacher(first.experts.down_proj.detach().flatten(), is_buffer=True),
        "0.experts.down_proj shares memory with weight of a Teacher whose experts stay",
    ),
    "a shallow copy": (
        lambda first, _: copy.copy(first.experts),
        "shares memory with .* of a GroupedExperts whose experts stay",
    ),
}


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.thorough if n else ()) for n, how in enumerate(SHARING)]
)
def test_a_weight_that_another_module_shares_does_not_move(how: str) -> None:
    """A move would put other experts' rows under the other module, whose placement it doesn't know."""

    def on_rank(transport: Transport) -> None:
        net = nn.ModuleList([made(transport), made(transport)])
        for layer in net:
            heated(layer, (0, 1))
        rebalancer = rebalancing(net)
        shares, message = SHARING[how]
        kept = shares(*net) if transport.rank == 1 else None
        with torch.no_grad():
            for layer in net:
                layer(tokens(0, transport.rank).abs())
        before = [value.clone() for value in net.parameters()]
        for call in (lambda: tm.rebalance(net), rebalancer.step, rebalancer.restore):
            with pytest.raises(ValueError, match=message if transport.rank == 1 else "rank"):
                call()
        assert all(layer.experts.placement is None for layer in net)
        assert all(map(torch.equal, net.parameters(), before))
        del kept

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_weights_beside_each_other_in_one_memory_move() -> None:
    """As optimizers lay them; and what nobody holds any more shares nothing."""

    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        heated(layer, (0, 1))
        weights = list(layer.experts.parameters())
        flat = torch.cat([weight.detach().flatten() for weight in weights])
        for weight, own in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
            weight.data = own.view_as(weight)
        forgotten = Teacher(weights[0])
        forgotten.itself = [forgotten]
        del forgotten
        rebalancer = rebalancing(layer)
        with torch.no_grad():
            layer(tokens(0, transport.rank).abs())
        assert rebalancer.step().moved
        rebalancer.restore()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def moved_with_states(transport: Transport) -> tuple[tm.MoELayer, torch.optim.Optimizer, tm.Rebalancer, dict]:
    """Return a layer whose experts have moved, its optimizer and Rebalancer, and the optimizer's state dict before."""
    layer = made(transport)
    heated(layer, (0, 1))
    optimizer = ADAMW(layer.experts.parameters())
    rebalancer = rebalancing(layer, optimizer)
    layer(tokens(0, transport.rank).abs()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    assert rebalancer.step().moved
    return layer, optimizer, rebalancer, before


def test_an_optimizers_state_of_this_rank_alone_waits_for_restore() -> None:
    """Its moments would be read back as other experts'."""

    def on_rank(transport: Transport) -> None:
        layer, optimizer, rebalancer, before = moved_with_states(transport)
        later = ADAMW(layer.experts.parameters())  # made behind the move, and given to nobody
        later.load_state_dict(later.state_dict())  # nothing is kept so far
        layer(tokens(1, transport.rank).abs()).square().sum().backward()
        later.step()
        layer.zero_grad()
        refused = (
            optimizer.state_dict,
            lambda: optimizer.load_state_dict(before),
            lambda: pickle.dumps(optimizer),
            lambda: torch.save({"optimizer": optimizer}, io.BytesIO()),
            lambda: copy.deepcopy(optimizer),
            later.state_dict,
            lambda: copy.deepcopy(torch.optim.lr_scheduler.ConstantLR(optimizer)),
        )
        for call in refused:
            with pytest.raises(ValueError, match="call restore"):
                call()
        layer.router.load_state_dict(layer.router.state_dict())  # what every rank has is free
        dense = ADAMW([layer.router.weight])
        dense.load_state_dict(copy.deepcopy(dense).state_dict())
        later.param_groups.clear()  # rebalance() would refuse an optimizer that it doesn't know
        rebalancer.restore()
        after = optimizer.state_dict()
        for number, state in before["state"].items():
            assert all(torch.equal(value, after["state"][number][name]) for name, value in state.items())
        optimizer.load_state_dict(pickle.loads(pickle.dumps(after)))
        copy.deepcopy(optimizer)

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_a_layer_made_with_a_placement_saves_its_own_experts_until_they_move() -> None:
    def on_rank(transport: Transport) -> None:
        placement = tm.ExpertPlacement(((0, 2, 4, 6), (1, 3, 5, 7)))
        layer = made(transport, placement)
        heated(layer, (0, 2))
        optimizer = ADAMW(layer.experts.parameters())
        rebalancer = rebalancing(layer, optimizer)
        layer(tokens(0, transport.rank).abs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        layer.load_state_dict(layer.state_dict())
        assert rebalancer.step().moved
        again = tm.rebalance(layer, optimizer)
        again.restore()  # to where its own experts stood, which is not home
        for call in (layer.state_dict, optimizer.state_dict):
            with pytest.raises(ValueError, match="call restore"):
                call()
        rebalancer.restore()
        assert layer.experts.placement == placement
        optimizer.load_state_dict(optimizer.state_dict())
        layer.load_state_dict(layer.state_dict())

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_weights_computed_behind_a_move_have_no_states() -> None:
    """Their optimizer's parameters are no longer the module's own, and nothing would reorder them."""

    def on_rank(transport: Transport) -> None:
        layer, _, rebalancer, _ = moved_with_states(transport)
        nn.utils.parametrizations.weight_norm(layer.experts, "gate_up_proj")
        optimizer = ADAMW(layer.experts.parameters())
        for call in (optimizer.state_dict, layer.state_dict, rebalancer.restore):
            with pytest.raises(ValueError, match="is computed from other parameters"):
                call()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


class Flat(torch.optim.Optimizer):
    """Keeps the gradients of all parameters in one tensor, under the first of them or under a name."""

    def __init__(self, parameters: list[nn.Parameter], name: str | None = None) -> None:
        super().__init__(parameters, {})
        self.name = name

    def step(self, closure: None = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        key = parameters[0] if self.name is None else self.name
        self.state[key] = {"history": deque([torch.cat([parameter.flatten() for parameter in parameters]).detach()])}


LBFGS = torch.optim.LBFGS
SHARED: dict[str, Callable[[nn.Parameter, list[nn.Parameter]], torch.optim.Optimizer]] = {
    "LBFGS, the router first": lambda router, experts: LBFGS([router, *experts]),
    "LBFGS, the experts first": lambda router, experts: LBFGS([*experts, router]),
    "Flat, the router first": lambda router, experts: Flat([router, *experts]),
    "Flat, by a name": lambda router, experts: Flat([router, *experts], "history"),
}


@pytest.mark.parametrize("how", SHARED)
def test_a_state_of_all_parameters_together_is_refused(how: str) -> None:
    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        heated(layer, (0, 1))
        optimizer = SHARED[how](layer.router.weight, list(layer.experts.parameters()))
        message = (
            f"{type(optimizer).__name__} keeps one state for all of its parameters together, those of experts.gate"
        )
        if isinstance(optimizer, Flat):
            rebalancer = rebalancing(layer, optimizer)
            layer(tokens(0, transport.rank).abs())
            optimizer.step()
            with pytest.raises(ValueError, match=message):
                rebalancer.step()
        else:  # from the start, whatever it has kept so far
            with pytest.raises(ValueError, match=message):
                tm.rebalance(layer, optimizer)
        assert layer.experts.placement is None

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_a_state_of_dense_parameters_together_is_no_concern_of_the_experts() -> None:
    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        heated(layer, (0, 1))
        alone = LBFGS([layer.router.weight.requires_grad_()])
        own = ADAMW([{"params": [parameter]} for parameter in layer.experts.parameters()])
        rebalancer = rebalancing(layer, alone, own)

        def loss() -> Tensor:
            layer.zero_grad()
            loss = layer(tokens(0, 0).abs()).square().mean()  # as many steps on every rank
            loss.backward()
            transport.all_reduce(layer.router.weight.grad)
            return loss

        for _ in range(2):
            alone.step(loss)
            own.step()
        layer.zero_grad()
        assert alone.state[layer.router.weight]["d"].numel() == layer.router.weight.numel()
        assert rebalancer.step() is not None

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_a_state_of_pairs_of_experts_is_refused() -> None:
    """Its rows would move, and its columns stay: a preconditioner of the dimension of experts."""

    def prepare(layer: tm.MoELayer, transport: Transport) -> None:
        optimizer = SGD(layer.experts.parameters())
        optimizer.state[layer.experts.gate_up_proj]["preconditioner"] = torch.eye(4)
        tm.rebalance(layer, optimizer)

    refuses(prepare, "can't tell which part belongs to an expert")


def test_evaluation_is_not_counted() -> None:
    """The experts of training move where training needs them, as the selection bias follows its load alone."""

    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        rebalancer = rebalancing(layer)
        compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
        heated(layer, (0, 1))
        x = tokens(0, transport.rank).abs()
        layer.eval()
        with torch.no_grad():
            layer(x)
            compiled(x)
        assert not layer.experts.expert_shards.calls.load.any()
        with dummy_forwards():
            layer.train()(x)
        assert not layer.experts.expert_shards.calls.load.any()
        assert not rebalancer.step().moved
        layer(x)
        assert layer.experts.expert_shards.calls.load.sum() == 2 * len(x)

    tm.run_on_emulated_ranks(on_rank, 1, timeout_s=60)


def test_ranks_that_count_other_steps_are_told():
    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        rebalancer = rebalancing(layer, every=2)
        for _ in range(1 + transport.rank):
            rebalancer._num_steps += 1
        with pytest.raises(ValueError, match="is not the same on ranks"):
            rebalancer._check()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


def test_a_rank_in_another_call_is_told():
    def on_rank(transport: Transport) -> None:
        layer = made(transport)
        rebalancer = rebalancing(layer)
        with pytest.raises((tm.CountMismatch, tm.TransportError)):
            layer(tokens(0, 0)) if transport.rank else rebalancer.step()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_a_layer_that_another_thread_is_making_is_no_copy() -> None:
    """What has no attributes yet is looked at too."""

    def fn(transport: Transport) -> None:
        half_made = LayerCalls.__new__(LayerCalls)
        tm.rebalance(made(transport))
        del half_made

    tm.run_on_emulated_ranks(fn, num_ranks=2)
