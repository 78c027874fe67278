"""Whether a change of the code changes a bit: record the results of many calls, and compare two records.

`python tests/support/record_bits.py FILE` writes the hashes of every result and gradient of all cases;
`python tests/support/record_bits.py FILE --against OTHER` also compares, prints what differs, and exits with 1 where
anything does. To compare with another commit, run the first line in a worktree of that commit (with this file copied
there if the commit doesn't have it) with PYTHONPATH set to the worktree. `--kernels` runs the cases of the Triton
backend instead, which need TRITON_INTERPRET=1 where there is no GPU. Both records must come from one machine: another
CPU's products may differ in bits.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from batches import OPTIONS, Batch
from packed_weights import FORMATS, PackedCase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.transports import Transport, TwoLevelTransport

Results = dict[str, Tensor]
Case = Callable[[], Results]

OVERLAPS = {
    "C1": tm.OverlapConfig(1),
    "C3": tm.OverlapConfig(3),
    "ramp": tm.OverlapConfig(4, shape="ramp"),
    "remote": tm.OverlapConfig(2, local_first=False),
    "serial": tm.OverlapConfig(2, serial=True),
    "experts": tm.OverlapConfig(2, chunk_by="experts"),
    "bf16": tm.OverlapConfig(2, wire_dtype=torch.bfloat16),
    "fp8": tm.OverlapConfig(2, wire_dtype=torch.float8_e4m3fn),
    "capacity": tm.OverlapConfig(2, capacity=4.0),
    "overflow": tm.OverlapConfig(2, capacity=0.25),
    "copies": tm.OverlapConfig(2, balance="always", max_copies=2),
    "one-copy": tm.OverlapConfig(1, balance="always", max_copies=1, local_first=False),
}
CONFIG = tm.MoEConfig(16, 12, num_experts=8, top_k=3, bias=True, load_balance_loss_weight=0.01, z_loss_weight=0.01)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_ranks(per_rank: list[Results]) -> Results:
    return {f"{rank}.{name}": value for rank, found in enumerate(per_rank) for name, value in found.items()}


def of_module(module: nn.Module, **results: Tensor) -> Results:
    grads = {name: tensor.grad for name, tensor in module.named_parameters() if tensor.grad is not None}
    values = {f"value {name}": tensor for name, tensor in module.named_parameters()}
    return {**results, **grads, **values}


# One device


def on_one_device(options: dict, backend: str, dtype: torch.dtype, ranks: tuple[int, int] = (0, 0)) -> Results:
    batch = Batch(2, 5, 3, dtype=dtype, options=options, ranks=ranks)
    return batch.on_one_device(backend)


def layer_on_one_device(config: tm.MoEConfig, backend: str = "torch") -> Results:
    layer = tm.MoELayer(config, generator=generator(1), backend=backend)
    x = torch.randn(13, config.hidden_size, generator=generator(2)).requires_grad_()
    y = layer(x)
    (y.square().sum() + layer.aux_loss).backward()
    return of_module(layer, y=y, x=x.grad, aux=layer.aux_loss)


# Ranks


def in_parallel(num_ranks: int, overlap: tm.OverlapConfig, backend: str, dtype: torch.dtype, **of_batch) -> Results:
    """Two calls: the second one has what the first has left on the transport."""
    return Batch(num_ranks, 8, 3, dtype=dtype, **of_batch).in_parallel(overlap, backend=backend, num_calls=2)


def step_of_layer(layer: tm.MoELayer, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Results:
    x = x.clone().requires_grad_()
    y = (run or layer)(x)
    loss = y.square().sum() if layer.aux_loss is None else y.square().sum() + layer.aux_loss
    loss.backward()
    return of_module(layer, y=y, x=x.grad)


def layers(
    num_ranks: int,
    overlap: tm.OverlapConfig,
    config: tm.MoEConfig = CONFIG,
    wrap: Callable[[Transport], Transport] = lambda transport: transport,
    run: Callable[[tm.MoELayer, Tensor], Tensor] | None = None,
    placement: tm.ExpertPlacement | None = None,
    **options,
) -> Results:
    def on_rank(world: Transport) -> Results:
        layer = tm.MoELayer(
            config, wrap(world), overlap=overlap, placement=placement, generator=generator(1), **options
        )
        x = torch.randn(9 + 3 * world.rank, config.hidden_size, generator=generator(2 + world.rank))
        found = {}
        for step in range(2):
            layer.zero_grad()
            of_step = step_of_layer(layer, x * (1 + step), None if run is None else partial(run, layer))
            found |= {f"{step}.{name}": value.detach().clone() for name, value in of_step.items()}
        return found

    return of_ranks(tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=120))


def recomputed(layer: tm.MoELayer, x: Tensor) -> Tensor:
    return checkpoint(lambda rows: layer(layer(rows)), x, use_reentrant=False)


def in_halves(layer: tm.MoELayer, x: Tensor) -> Tensor:
    return torch.cat(tm.two_batches(layer, *x.tensor_split(2)))


def recomputed_halves(layer: tm.MoELayer, x: Tensor) -> Tensor:
    return torch.cat(tm.two_batches(partial(recomputed, layer), *x.tensor_split(2)))


def packed(weight_format: str, num_ranks: int, overlap: tm.OverlapConfig, save: str, levels: int = 1) -> Results:
    case = PackedCase(weight_format, rank=3, bias=True)  # type: ignore[arg-type]

    def part(weight: tm.QuantizedWeight, own: slice) -> tm.QuantizedWeight:
        return tm.QuantizedWeight(weight.format, weight.values[own], weight.scales[own])

    def on_rank(world: Transport) -> Results:
        transport = TwoLevelTransport(world, 2) if levels == 2 else world
        local = case.num_experts // num_ranks
        own = slice(world.rank * local, (world.rank + 1) * local)
        leaves = {
            name: leaf.detach()[own if name[-2:] in ("_a", "_b") or "bias" in name else slice(None)]
            .clone()
            .requires_grad_()
            for name, leaf in case.leaves().items()
        }
        y = tm.expert_parallel_mlp(
            leaves["x"] * (1 + world.rank),
            case.topk_ids(),
            leaves["topk_weights"],
            *(part(weight, own) for weight in case.weights()),
            overlap=overlap,
            num_experts=case.num_experts,
            transport=transport,
            save=save,
            **case.keywords(leaves),
        )
        y.backward(case.dout())
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}

    return of_ranks(tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=120))


def dropped() -> Results:
    """Dropout of adapters, drawn from the global generator: on one rank, since ranks share that."""
    torch.manual_seed(5)
    return Batch(1, 8, 3, ranks=(2, 3), dropout=0.25).in_parallel(OVERLAPS["C3"], backend="torch")


def main_grads(overlap: tm.OverlapConfig) -> Results:
    def on_rank(transport: Transport) -> Results:
        layer = tm.MoELayer(
            CONFIG, transport, overlap, expert_gradients="sum", generator=generator(1), dtype=torch.bfloat16
        )
        sums = {}
        for name, weight in layer.experts.named_parameters():
            weight.main_grad = sums[f"main {name}"] = torch.zeros_like(weight, dtype=torch.float32)
        x = torch.randn(9, CONFIG.hidden_size, generator=generator(2 + transport.rank)).bfloat16()
        return {**step_of_layer(layer, x), **sums}

    return of_ranks(tm.run_on_emulated_ranks(on_rank, 4, timeout_s=120))


def callable_activation(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, 1)
    return torch.sin(gate) * up


def rebalanced(num_ranks: int) -> Results:
    config = replace(CONFIG, bias=False)

    def on_rank(transport: Transport) -> Results:
        layer = tm.MoELayer(config, transport, overlap=OVERLAPS["C3"], generator=generator(1))
        with torch.no_grad():
            layer.router.weight[:2] += 2.0  # hot experts, both on rank 0
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        rebalancer = tm.rebalance(layer, optimizer, every=2)
        x = torch.randn(24, config.hidden_size, generator=generator(2 + transport.rank)).abs()
        found = {}
        for step in range(5):
            of_step = step_of_layer(layer, x)
            optimizer.step()
            optimizer.zero_grad()
            rebalancer.step()
            found |= {f"{step}.{name}": value.detach().clone() for name, value in of_step.items()}
        found["ids"] = torch.tensor([int(one) for one in layer.experts.expert_ids])
        return found

    return of_ranks(tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=120))


def two_levels(world: Transport) -> Transport:
    return TwoLevelTransport(world, 2)


REPLICAS = tm.ExpertPlacement(((0, 1, 2, 3, 4), (5, 6, 7, 0, 1)))
PERMUTED = tm.ExpertPlacement(((7, 1, 4, 3), (0, 6, 2, 5)))


def all_cases() -> Iterator[tuple[str, Case]]:
    for name, options in {"plain": {}, **OPTIONS}.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            kind = str(dtype)[6:]
            for backend in ("reference", "torch"):
                yield f"one {name} {backend} {kind}", partial(on_one_device, options, backend, dtype)
    yield "one adapters", partial(on_one_device, {}, "torch", torch.float32, (2, 3))
    yield "one layer", partial(layer_on_one_device, CONFIG)
    yield (
        "one groups",
        partial(
            layer_on_one_device,
            replace(CONFIG, score_function="sigmoid", selection_bias=True, num_expert_groups=4, top_k_groups=2),
        ),
    )
    yield "one shared", partial(layer_on_one_device, replace(CONFIG, shared_intermediate_size=8, bias=False))
    for num_ranks in (1, 2, 4):
        for name, overlap in OVERLAPS.items():
            for dtype in (torch.float32, torch.bfloat16):
                if name == "bf16" and dtype != torch.float32:
                    continue
                case = partial(in_parallel, num_ranks, overlap, "torch", dtype)
                yield f"ranks {num_ranks} {name} {str(dtype)[6:]}", case
    for name, options in OPTIONS.items():
        for overlap in ("C3", "experts", "copies"):
            case = partial(in_parallel, 2, OVERLAPS[overlap], "torch", torch.float32, options=options)
            yield f"ranks 2 {overlap} {name}", case
    for overlap in ("C3", "experts", "copies", "capacity"):
        yield f"adapters {overlap}", partial(in_parallel, 2, OVERLAPS[overlap], "torch", torch.float32, ranks=(2, 3))
        yield f"layer {overlap}", partial(layers, 4, OVERLAPS[overlap])
        yield f"recompute {overlap}", partial(layers, 2, OVERLAPS[overlap], run=recomputed)
        yield f"halves {overlap}", partial(layers, 2, OVERLAPS[overlap], run=in_halves)
        yield f"halves recompute {overlap}", partial(layers, 2, OVERLAPS[overlap], run=recomputed_halves)
        yield (
            f"save input {overlap}",
            partial(in_parallel, 4, OVERLAPS[overlap], "torch", torch.float32, options={"save": "input"}),
        )
        yield f"main grads {overlap}", partial(main_grads, OVERLAPS[overlap])
    for overlap in ("C1", "C3", "remote", "serial", "fp8"):
        yield f"levels {overlap}", partial(layers, 4, OVERLAPS[overlap], wrap=two_levels)
    yield "levels recompute", partial(layers, 4, OVERLAPS["C3"], wrap=two_levels, run=recomputed)
    yield "levels halves", partial(layers, 4, OVERLAPS["C3"], wrap=two_levels, run=in_halves)
    no_bias = replace(CONFIG, bias=False)
    for overlap in ("C3", "experts", "capacity"):
        yield f"replicas {overlap}", partial(layers, 2, OVERLAPS[overlap], no_bias, placement=REPLICAS)
        yield f"placement {overlap}", partial(layers, 2, OVERLAPS[overlap], no_bias, placement=PERMUTED)
    yield "placement copies", partial(layers, 2, OVERLAPS["copies"], no_bias, placement=PERMUTED)
    shared = replace(no_bias, shared_intermediate_size=8)
    for overlap in ("C3", "copies"):
        yield f"shared {overlap}", partial(layers, 2, OVERLAPS[overlap], shared)
    own = replace(no_bias, activation=callable_activation)
    for name, run in {"": None, " recompute": recomputed, " halves": in_halves}.items():
        yield f"callable{name}", partial(layers, 2, OVERLAPS["C3"], own, run=run)
    yield "global loss", partial(layers, 2, OVERLAPS["C3"], replace(CONFIG, load_balance_over="global"))
    for weight_format in FORMATS:
        for num_ranks in (1, 2, 4):
            for overlap in ("C3", "experts", "copies", "capacity"):
                save = "input" if num_ranks == 2 else "hidden"
                case = partial(packed, weight_format, num_ranks, OVERLAPS[overlap], save)
                yield f"packed {weight_format} {num_ranks} {overlap}", case
        yield f"packed {weight_format} levels", partial(packed, weight_format, 4, OVERLAPS["C3"], "hidden", levels=2)
    yield "dropout", dropped
    for num_ranks in (2, 4):
        yield f"rebalance {num_ranks}", partial(rebalanced, num_ranks)


def kernel_cases() -> Iterator[tuple[str, Case]]:
    for name, options in {"plain": {}, **OPTIONS}.items():
        yield f"kernels one {name}", partial(on_one_device, options, "triton", torch.float32)
    yield "kernels adapters", partial(on_one_device, {}, "triton", torch.float32, (2, 3))
    yield "kernels layer", partial(layer_on_one_device, CONFIG, "triton")
    for overlap in ("C3", "experts", "copies", "capacity"):
        yield f"kernels ranks {overlap}", partial(in_parallel, 2, OVERLAPS[overlap], "triton", torch.float32)


def digest(value: Tensor) -> str:
    flat = value.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + data).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], help="how the cases' names begin")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def is_wanted(name: str) -> bool:
        return name.startswith(tuple(arguments.only))

    record: dict[str, dict[str, str]] = {}
    for name, case in kernel_cases() if arguments.kernels else all_cases():
        if is_wanted(name):
            record[name] = {part: digest(value) for part, value in case().items()}
    arguments.file.write_text(json.dumps(record, indent=1))
    print(f"{len(record)} cases, {sum(map(len, record.values()))} tensors: {arguments.file}")
    if arguments.against is None:
        return 0
    before = {name: of for name, of in json.loads(arguments.against.read_text()).items() if is_wanted(name)}
    different = [name for name in record.keys() | before.keys() if record.get(name) != before.get(name)]
    for name in sorted(different):
        mine, theirs = record.get(name, {}), before.get(name, {})
        parts = sorted(part for part in mine.keys() | theirs.keys() if mine.get(part) != theirs.get(part))
        print(f"{name}: {', '.join(parts)}")
    print(f"{len(different)} of {len(record)} cases differ")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
