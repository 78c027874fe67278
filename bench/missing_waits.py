"""Delete every barrier, wait and fence of the products' kernels, one at a time, and see what the virtual GPU notices.

The products of plain weights on all GPUs, and those of packed weights on some (PACKED).

A deletion is noticed where the machine raises, or where any byte of the kernel's tensors comes out another. One that is
not noticed is redundant, for one of three reasons: the program never comes there; it can go along with all others of
its kind that come before it in the table, so that what is left keeps the order; or it keeps an order that those before
it keep too, and is noticed once they are gone.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.codegen import source_hash
from tritonmoe.config.formats import FORMATS, WeightFormat, find_format
from tritonmoe.config.layer import ExpertLayout, KernelOptions, Projection
from tritonmoe.ops import aot
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as operations
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands
from tritonmoe.ops.kernels import launch
from tritonmoe.runtime.files import write_whole
from tritonmoe.tools.benchmarks.argument_types import output_file
from virtual_gpu import VIRTUAL_GPUS
from virtual_gpu.deletions import Site, sites_of, without
from virtual_gpu.faults import Deadlock, MemoryFault
from virtual_gpu.launcher import run_launch

__all__ = ["main", "rows_of"]

RESULT = Path("bench") / "results" / "missing_waits.json"
T, K, E, D, F = 200, 2, 2, 272, 144
"""Rows, experts of each row, experts, and widths: several steps of every product, more than are loaded ahead of it, and
several tiles of one program."""
PACKED_D, PACKED_F = 288, 160
"""Widths that the blocks of every format of packed weights divide."""
PACKED = {"mxfp4": ("sm_80", "sm_90", "sm_100"), "fp8": ("sm_80", "sm_90"), "nf4": ("sm_80", "sm_90")}
"""By format of packed weights: the GPUs whose products are tried, one for each kind of matrix instruction. Formats only
differ in arithmetic, which waits for nothing."""
SKIPPED = 40
"""The last rows that don't go to expert 1: the sums over its pairs have one step less, an odd number of them."""


class DeletionTrial:
    """One launch on tensors that every run finds as they were, and what a run without deletions leaves in them."""

    def __init__(self, item: launch.Launch, target: GPUTarget) -> None:
        self.item, self.target = item, target
        arguments = (*item.args, *item.constexprs.values())
        tensors = [one.base if isinstance(one, TensorDescriptor) else one for one in arguments]
        self._tensors: list[Tensor] = [one for one in tensors if isinstance(one, Tensor)]
        self._before = [tensor.clone() for tensor in self._tensors]
        self.assembly = ""
        run_launch(item, target, self._keep)
        self._after = [tensor.clone() for tensor in self._tensors]

    def _keep(self, assembly: str) -> str:
        self.assembly = assembly
        return assembly

    def _restore(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.copy_(value)

    def noticed(self, edit: Callable[[str], str]) -> str:
        """Run with the assembly changed: give what was noticed, or nothing."""
        self._restore(self._before)
        try:
            run_launch(self.item, self.target, edit)
            pairs = zip(self._tensors, self._after, strict=True)
            return "" if all(map(_same_bytes, *zip(*pairs, strict=True))) else "another result"
        except (MemoryFault, Deadlock) as error:
            return str(error).split(": ", 1)[1]
        finally:
            self._restore(self._after)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return a row for each site: what noticed its deletion, or why it is redundant."""
        gone: dict[str, list[Site]] = {}
        for site in sites_of(self.assembly):
            row = {"kind": site.kind, "line": site.line, "instruction": site.text(self.assembly)}
            noticed = self.noticed(without([site]))
            others = gone.setdefault(site.kind, [])
            if not noticed:
                row |= self._redundancy(site, others)
            yield row | ({"noticed": noticed} if noticed else {})

    def _redundancy(self, site: Site, others: list[Site]) -> dict[str, Any]:
        if not self.noticed(site.behind_a_fault):
            return {"redundant": "never runs"}
        noticed = self.noticed(without([*others, site])) if others else ""
        if noticed:
            return {"redundant": "others keep the order", "others": [one.line for one in others], "without": noticed}
        others.append(site)
        return {"redundant": "what is left keeps the order"}


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@contextmanager
def _trials(target: GPUTarget, each: Callable[[DeletionTrial], None]) -> Iterator[None]:
    def run(item: launch.Launch) -> None:
        launches.clear()
        each(DeletionTrial(item, target))

    with launch.recording(target, run) as launches:
        yield


def _packed(shape: tuple[int, int, int], weight_format: WeightFormat, generator: torch.Generator) -> Projection:
    """Return a projection without a bias whose weight is packed: random bytes of finite values."""
    values, scales = find_format(weight_format).empty(shape, "cpu")
    stored = values.view(torch.uint8).random_(0, 256, generator=generator)
    if weight_format == "fp8":
        stored.masked_fill_((stored & 0x7F) == 0x7F, 0)  # NaN
    if scales.dtype == torch.uint8:
        scales.random_(117, 121, generator=generator)
    else:
        scales.uniform_(0, 1e-3, generator=generator)
    return Projection(values, None, ExpertLayout(), scales=scales)


def _run_products(weight_format: WeightFormat | None) -> None:
    """Run every product of a small layer, forward and backward, in one program where the kernel is persistent.

    weight_format: of packed weights, which have no gradients; None for plain ones.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    layout, options = ExpertLayout(), KernelOptions(num_sms=1)
    depth, units = (D, F) if weight_format is None else (PACKED_D, PACKED_F)
    x, dout = random(T, depth), random(T, depth)
    if weight_format is None:
        gate_up = Projection(random(E, 2 * F, D, scale=D**-0.5), random(E, 2 * F), layout)
        down = Projection(random(E, D, F, scale=F**-0.5), random(E, D), layout)
    else:
        gate_up = _packed((E, 2 * units, depth), weight_format, generator)
        down = _packed((E, depth, units), weight_format, generator)
    ids = torch.rand(T, E, generator=generator).topk(K, 1)[1]
    ids[-SKIPPED:][ids[-SKIPPED:] == 1] = -1
    weights = torch.rand(T, K, generator=generator)
    grouping = reference.group(ids, E)
    h, a = operations.up(x, gate_up, grouping, "silu", options=options)
    assert h is not None
    assert a is not None
    operations.down(a, down, grouping, options=options)
    dh, scaled_a, _ = operations.down_grad(dout, down, h, weights, grouping, "silu", options=options)
    operations.up_grad(dh, gate_up, grouping, options=options)
    if weight_format is not None:
        return
    operands = GradientOperands(x, dh, dout, scaled_a, weights)
    for wanted in ("gate_up_proj", "down_proj"):
        operations.weight_grad(grouping, layout, operands, NO_GRADIENTS._replace(**{wanted: True}), options=options)


def rows_of(
    target_name: str, kernels: Collection[str] = (), weight_format: WeightFormat | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one GPU: of all products, or of the kernels named, with plain weights or packed ones."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    subject = {"target": target_name} | ({"format": weight_format} if weight_format else {})

    def each(trial: DeletionTrial) -> None:
        name = trial.item.kernel.__name__.strip("_").removesuffix("_kernel")
        if trial.assembly in seen or (kernels and name not in kernels):
            return
        seen.add(trial.assembly)
        started = time.process_time()
        new = [subject | {"kernel": name, **row} for row in trial.rows()]
        rows.extend(new)
        num_noticed, where = sum("noticed" in row for row in new), " ".join((*subject.values(), name))
        print(f"{where}: {num_noticed} of {len(new)}, {time.process_time() - started:.0f} s", flush=True)

    with _trials(aot.TARGETS[target_name], each):
        _run_products(weight_format)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Write the table; 1 where a deletion is neither noticed nor redundant."""
    parser = argparse.ArgumentParser(prog="python -m bench.missing_waits", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=VIRTUAL_GPUS, default=VIRTUAL_GPUS, help="default: all six")
    parser.add_argument("--kernels", nargs="+", default=(), help="kernels by name (default: all products)")
    parser.add_argument("--json", type=output_file, default=RESULT, help=f"file to write (default {RESULT})")
    arguments = parser.parse_args(argv)
    sources = source_hash()
    rows = [row for name in arguments.targets for row in rows_of(name, arguments.kernels)]
    for weight_format in FORMATS:
        for name in sorted({*PACKED[weight_format]} & {*arguments.targets}):
            rows += rows_of(name, arguments.kernels, weight_format)
    table = {
        "benchmark": "missing_waits",
        "source_hash": sources,
        "triton": importlib.metadata.version("triton"),
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(table, indent=1)[:-2] + f',\n "results": [\n  {lines}\n ]\n}}\n'
    write_whole(arguments.json, text, "table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
