"""`python -m bench.two_batches --netns 2`: a model's training step in two halves at once, and whole, on slow links.

Forward and backward of a Qwen3-MoE-like model whose experts are spread over ranks, every rank with its own sequences,
dense weights replicated and not reduced. In network namespaces on this machine, one core and one thread each. Variants
run in interleaved rounds, at every rate and on a link that is not shaped: two batches at once, each half in one chunk
and in two; one batch with overlap inside its layers; what "auto" keeps of these; one batch with no overlap; and,
without any exchange, the unspread model on one device. With --node-size the ranks are in nodes, between which rows
travel on two levels, and rates are those of the nodes' uplinks. With --netns 1 nothing is exchanged, and one half after
the other is measured too.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.integrations import transformers as tmt
from tritonmoe.integrations.transformers.bench_model import qwen3_moe_model
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.argument_types import positive, positive_number
from tritonmoe.tools.benchmarks.expert_parallel import num_settling_steps
from tritonmoe.tools.benchmarks.model_sizes import add_model_sizes, check_model_sizes, model_sizes
from tritonmoe.tools.benchmarks.namespaces import Namespaces, ask, check_start, interface_bytes, is_inside, parse_rate
from tritonmoe.tools.benchmarks.ranks import slowest
from tritonmoe.tools.benchmarks.timing import Samples, add_arguments, ratio, summarize, write_json
from tritonmoe.tools.benchmarks.workload import DTYPES, NAMED_WIRE_DTYPES
from tritonmoe.transports import ProcessGroupTransport, Ranks
from tritonmoe.transports.torchrun import torchrun_ranks

__all__ = ["main"]

UNSHAPED = "40gbit"
ONE_BY_ONE = "one half after the other"
SETTLED = 2
"""Steps of every variant that are not counted, after each change of the link's rate."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.two_batches", description=__doc__)
    parser.add_argument("--netns", type=positive, default=2, metavar="N", help="N network namespaces (default 2)")
    parser.add_argument("--node-size", type=positive, metavar="M", help="ranks of a node (default: there are no nodes)")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "400mbit", "200mbit", "100mbit"])
    parser.add_argument("--sequences", type=positive, default=4, help="of each rank (default 4)")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument(
        "--wire-dtype", choices=NAMED_WIRE_DTYPES, help="OverlapConfig.wire_dtype (default: as they are)"
    )
    parser.add_argument("--adapters", type=positive, metavar="R", help="train adapters of rank R on the experts alone")
    parser.add_argument("--timeout-s", type=positive_number, default=120.0, help="of every exchange (default 120)")
    add_model_sizes(parser)
    add_arguments(parser, rounds=9)
    return parser


def _adapted(model: Any, rank: int) -> Any:
    """Return the model with PEFT's adapters on its experts, and nothing else trained."""
    from peft import LoraConfig, get_peft_model

    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=rank, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model, config)


class Step:
    """A training step of this rank, in each variant."""

    def __init__(self, arguments: argparse.Namespace, transport: ProcessGroupTransport) -> None:
        sizes, dtype = model_sizes(arguments), DTYPES[arguments.dtype]
        self.alone: Any = qwen3_moe_model(sizes, dtype=dtype)
        tmt.patch(self.alone)
        self.model: Any = qwen3_moe_model(sizes, dtype=dtype)
        if arguments.adapters:
            self.alone, self.model = (_adapted(model, arguments.adapters) for model in (self.alone, self.model))
        self.num_layers = arguments.layers
        self.num_nodes = 1 if arguments.node_size is None else transport.size // arguments.node_size
        ranks: Ranks = transport.group
        if self.num_nodes > 1:
            ranks = init_device_mesh("cpu", (self.num_nodes, arguments.node_size), mesh_dim_names=("nodes", "ranks"))
        tmt.parallelize(self.model, ranks)
        wire_dtype = None if arguments.wire_dtype is None else NAMED_WIRE_DTYPES[arguments.wire_dtype]
        whole, two = OverlapConfig(wire_dtype=wire_dtype), OverlapConfig(2, local_first=False, wire_dtype=wire_dtype)
        serial = OverlapConfig(1, wire_dtype=wire_dtype, serial=True)
        self.variants: dict[str, Callable[[], float]] = {
            "two batches": lambda: self._spread(whole, self.halved),
            "two batches in 2 chunks": lambda: self._spread(two, self.halved),
            "one batch": lambda: self._spread(whole),
            "auto": lambda: self._spread(whole, self.auto),
            "serial": lambda: self._spread(serial),
            "one device": lambda: self._run(self.alone),
        }
        if transport.size == 1:
            self.variants[ONE_BY_ONE] = self._run_one_by_one
        shape = arguments.sequences, arguments.length
        generator = torch.Generator().manual_seed(transport.rank)
        self.ids = torch.randint(2, sizes.vocab_size, shape, generator=generator)
        self.transport = transport
        self.halved = self._detached(tmt.two_batches(self.model))
        self.auto = self._detached(tmt.two_batches(self.model, "auto"))

    def _detached(self, halved: tmt.HalvedForward) -> tmt.HalvedForward:
        """Return a forward in halves that the model doesn't have yet."""
        halved.remove()
        return halved

    def choose(self) -> str:
        """Make "auto" try both ways anew; return its choice."""
        self.auto = self._detached(tmt.two_batches(self.model, "auto"))
        assert self.auto.trial is not None
        while self.auto.trial.decision is None:
            self.timed("auto")
        return self.auto.choice

    def timed(self, name: str) -> float:
        """Return the seconds of a step on this rank."""
        for model in (self.alone, self.model):
            model.zero_grad(set_to_none=True)
        self.transport.barrier()
        started = time.perf_counter()
        self.variants[name]()
        return time.perf_counter() - started

    def loss(self, name: str) -> float:
        return self.variants[name]()

    def _configure(self, overlap: OverlapConfig) -> None:
        for experts in experts_modules(self.model).values():
            shards = shards_of(experts)
            assert shards is not None
            shards.overlap = overlap

    def _spread(self, overlap: OverlapConfig, halved: tmt.HalvedForward | None = None) -> float:
        self._configure(overlap)
        if halved is None:
            return self._run(self.model)
        self.model.forward = halved
        try:
            return self._run(self.model)
        finally:
            halved.remove()

    def _run_one_by_one(self) -> float:
        """The spread model on both halves of the batch, each whole, and one backward."""
        self._configure(OverlapConfig())
        losses = [self.model(input_ids=ids, labels=ids, use_cache=False).loss for ids in self.ids.chunk(2)]
        loss = sum(losses) / 2
        loss.backward()
        return float(loss.detach())

    def _run(self, model: Any) -> float:
        loss = model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())


def measure(step: Step, rates: list[str], rounds: int) -> list[Json]:
    """Return, for each rate, what summarize_rate() makes of every variant's steps."""
    transport = step.transport
    for _ in range(num_settling_steps(step.num_layers) + 1):
        step.timed("one batch")
    results: list[Json] = []
    unshaped: Samples = {}
    for rate in rates:
        if transport.rank == 0:
            ask(f"{'rate' if step.num_nodes == 1 else 'uplink_rate'} {parse_rate(rate)}")
        transport.barrier()
        choice = step.choose()
        names, shuffle = list(step.variants), random.Random(0).shuffle  # the same order on every rank
        samples: Samples = {name: [] for name in names}
        sent: dict[str, float] = {}
        for number in range(SETTLED + rounds):
            shuffle(names)
            for name in names:
                before = sent_bytes(step)
                seconds = step.timed(name)
                sent[name] = sent_bytes(step) - before
                if number >= SETTLED:
                    samples[name].append(seconds)
        samples = {name: slowest(transport, of_one) for name, of_one in samples.items()}
        unshaped = unshaped or samples
        results.append(summarize_rate(rate, samples, sent, unshaped) | {"choice": choice})
        if transport.rank == 0:
            print(as_line(results[-1]), flush=True)
    return results


def sent_bytes(step: Step) -> float:
    """Return, on rank 0, the bytes that have left it so far, or its node where there are nodes."""
    if step.num_nodes == 1:
        return float(interface_bytes()[1])
    return float(json.loads(ask("uplinks") or "[0]")[0])


def summarize_rate(rate: str, samples: Samples, sent: dict[str, float], unshaped: Samples) -> Json:
    """Return the times at one rate, and what two batches gain: ratios of medians."""
    step = {name: summarize(seconds) for name, seconds in samples.items()}

    def over(slower: str, faster: str) -> float:
        return ratio(step[slower], step[faster], 3)

    wire_s = 8 * sent["two batches"] / parse_rate(rate)
    bound_s = max(statistics.median(unshaped["two batches"]), wire_s)
    of_one_rank = {"beside_one_by_one": over("two batches", ONE_BY_ONE)} if ONE_BY_ONE in samples else {}
    return {
        "rate": rate,
        "step": step,
        "sent_mb": {name: round(of_one / 1e6, 2) for name, of_one in sent.items()},
        "communication_alone_ms": round(1e3 * wire_s, 1),
        "faster_than_one_batch": over("one batch", "two batches"),
        "in_2_chunks_faster_than_one_batch": over("one batch", "two batches in 2 chunks"),
        "faster_than_serial": over("serial", "two batches"),
        "auto_faster_than_one_batch": over("one batch", "auto"),
        "beside_bound": round(statistics.median(samples["two batches"]) / bound_s, 3),
        **of_one_rank,
    }


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure on this process, one of the ranks; the first one prints and writes."""
    torch.set_num_threads(1)
    with torchrun_ranks(timeout_s=arguments.timeout_s) as transport:
        step = Step(arguments, transport)
        losses = {name: step.loss(name) for name in step.variants}
        spread = max(losses.values()) - min(losses.values())
        is_exact = arguments.dtype == "float32" and arguments.wire_dtype is None
        if spread > (1e-4 if is_exact else 3e-2) * abs(losses["one batch"]):
            raise ValueError(f"the variants' losses differ, and their times say nothing: {losses}")
        results = measure(step, [UNSHAPED, *arguments.rates], arguments.rounds)
        if transport.rank == 0:
            described = {name: value for name, value in vars(arguments).items() if name not in ("json", "rank")}
            write_json(arguments.json, "two_batches", {"arguments": described, "rates": results})


def as_line(result: Json) -> str:
    times = ", ".join(f"{name} {of_one['median_ms']:.0f}" for name, of_one in result["step"].items())
    return (
        f"{result['rate']:>8}: {times} ms; communication alone {result['communication_alone_ms']:.0f} ms; two batches "
        f"{result['faster_than_one_batch']:.3f} times as fast as one, in 2 chunks "
        f"{result['in_2_chunks_faster_than_one_batch']:.3f}, {result['faster_than_serial']:.3f} as serial, "
        f"{result['beside_bound']:.3f} of the bound; auto {result['auto_faster_than_one_batch']:.3f} times as fast as "
        f"one ({result['choice']})"
    )


def main() -> int:
    """Start the ranks, or be one of them."""
    arguments = make_parser().parse_args()
    check_model_sizes(arguments)
    for rate in arguments.rates:
        parse_rate(rate)
    check_start(arguments.netns, {})
    if is_inside():
        run_rank(arguments)
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "bench.two_batches", *sys.argv[1:]]
    node_size = arguments.node_size
    if node_size is not None and not (2 <= node_size < arguments.netns and arguments.netns % node_size == 0):
        raise ValueError(
            f"--node-size {node_size} must be at least 2 and divide the {arguments.netns} ranks of --netns"
        )
    with Namespaces(command, arguments.netns, parse_rate(UNSHAPED), node_size=node_size) as namespaces:
        return namespaces.run(arguments.timeout_s)


if __name__ == "__main__":
    sys.exit(main())
