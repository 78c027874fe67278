"""What training steps launch on a GPU, without one: every operation gives the reference's values, and its launches are
caught. A process of its own: where Triton's interpreter is on, kernels have no specialisation."""

import argparse
import json
import sys
from contextlib import suppress
from functools import partial
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler, make_backend
from triton.runtime.driver import driver

import tritonmoe as tm
from tritonmoe.config.routing import RoutingRule
from tritonmoe.ops import aot, backends
from tritonmoe.ops.aot import source_of
from tritonmoe.ops.backends import encoded, reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.router_kernels import route, route_grad
from tritonmoe.tools import cli
from tritonmoe.tools.benchmarks.shapes import LayerShape
from tritonmoe.tools.cli.warmup import launches_of_layer

TARGET = aot.TARGETS["sm_90"]
E, K, D, F = 8, 2, 64, 32
NUM_RANKS = 2


def copy_values(ours, theirs):
    if isinstance(ours, torch.Tensor):
        ours.copy_(theirs)
    elif ours is not None:
        for one, other in zip(ours, theirs, strict=True):
            if other is not None:
                copy_values(one, other)


def caught(name):
    """Return an operation whose memory is the Triton backend's, and whose values are the reference's."""

    def run(*arguments, **keywords):
        values = {key: value for key, value in keywords.items() if not key.startswith(("out", "accumulate"))}
        theirs = getattr(reference, name)(*arguments, **values)
        ours = getattr(kernels, name)(*arguments, **keywords)
        copy_values(ours, theirs)
        return ours

    return run


def caught_group(*arguments, **keywords):
    ours, theirs = kernels.group(*arguments, **keywords), reference.group(*arguments, **keywords)
    for name in ("pair_index", "expert_offsets", "inverse", "source_order", "chunk_expert_offsets"):
        copy_values(getattr(ours, name), getattr(theirs, name))
    return ours


OPERATIONS = ModuleType(kernels.__name__)
OPERATIONS.MAX_BLOCK_PAIRS, OPERATIONS.copies_rows, OPERATIONS.group = None, kernels.copies_rows, caught_group
for operation in ("up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad"):
    setattr(OPERATIONS, operation, caught(operation))
encoded.kernels = ModuleType(kernels.__name__)  # products of codes, whose values may be anything
encoded.kernels.__dict__.update({**vars(kernels), "group": caught_group})
backends.choose = lambda *arguments, **keywords: OPERATIONS


def draw(num_tokens, num_experts, main_grad=False):
    """Return x, topk_ids, topk_weights, and weights with biases."""
    sizes = {"gate_up_proj": (2 * F, D), "down_proj": (D, F), "gate_up_bias": (2 * F,), "down_bias": (D,)}
    weights = {name: torch.nn.Parameter(torch.randn(num_experts, *size).bfloat16()) for name, size in sizes.items()}
    if main_grad:
        for weight in weights.values():
            weight.main_grad = torch.zeros(weight.shape)
    x = torch.randn(num_tokens, D).bfloat16().requires_grad_()
    ids = torch.rand(num_tokens, E).topk(K, 1)[1]
    return x, ids, torch.rand(num_tokens, K).softmax(1).requires_grad_(), weights


def run_on_one_device(num_tokens, main_grad=False, **options):
    x, ids, gates, weights = draw(num_tokens, E, main_grad)
    y = tm.moe_mlp(x, ids, gates, **weights, **options)
    if y.requires_grad:
        y.backward(torch.randn_like(y))


def run_on_ranks(num_tokens, plan, main_grad=False, all_to=None, **options):
    inputs = [draw(num_tokens, E // NUM_RANKS, main_grad) for _ in range(NUM_RANKS)]

    def step(transport):
        x, ids, gates, weights = inputs[transport.rank]
        if all_to is not None:
            ids = ids % (E // NUM_RANKS) + all_to * (E // NUM_RANKS)
        y = tm.expert_parallel_mlp(
            x, ids, gates, **weights, num_experts=E, transport=transport, overlap=plan, **options
        )
        if y.requires_grad:
            y.backward(torch.randn_like(y))

    tm.run_on_emulated_ranks(step, NUM_RANKS)


def specialisation(item):
    return f"{item.kernel.__name__} {source_of(item, TARGET).hash()} {item.options}"


def specialisations(step):
    """Run a step, and give what the just-in-time compiler would have to compile for it."""
    with launch.recording(TARGET) as launches:
        step()
    return set(map(specialisation, launches))


def chunks():
    """Steps of one class of pairs per expert, in so many chunks, cut where tokens happen to go."""
    plans = [tm.OverlapPlan((1,) * count, chunk_by=axis) for axis in ("tokens", "experts") for count in (1, 2, 3)]
    return [sorted(specialisations(partial(run_on_ranks, t, plan))) for plan in plans for t in range(36, 42)]


def router():
    """What the router's kernels compile for any number of tokens, forward and backward."""
    rule, steps = RoutingRule(K), []
    for num_tokens in (1, 16, 100, 4096, 5000):

        def step(num_tokens=num_tokens):
            x, weight = torch.empty(num_tokens, D).bfloat16(), torch.empty(E, D).bfloat16()
            routed = route(x, weight, None, rule)
            saved = x, weight, routed.scores, routed.topk_ids, routed.topk_weights
            route_grad(*saved, (routed.logits, routed.scores, routed.topk_weights), rule, (True, True))

        steps.append(sorted(specialisations(step)))
    return steps


def warmup():
    """What steps with each feature compile, and what `tritonmoe warmup` does, on one device and on one of the ranks."""
    plans = [tm.OverlapPlan((1, 2, 1)), tm.OverlapPlan((1, 1, 2), chunk_by="experts")]
    features = [{}, {"save": "input"}, {"main_grad": True}, {"save": "input", "main_grad": True}]
    one_device = [partial(run_on_one_device, t, **feature) for t in (1, 100, 600, 5000) for feature in features]
    one_device += [partial(run_on_one_device, t) for t in (8, 9, 40, 180, 300)]
    ranks = [partial(run_on_ranks, t, plan, **feature) for t in (3, 60, 4500) for plan in plans for feature in features]
    ranks += [partial(run_on_ranks, t, plans[0]) for t in (25, 110, 160)]
    ranks += [partial(run_on_ranks, t, tm.OverlapPlan((1,)), all_to=0) for t in (9, 1000)]

    def inference(step):
        with torch.no_grad():
            step()

    fp8 = tm.ExpertPrecision("fp8_block")
    shapes = {precision: LayerShape("layer", E, K, D, F, bias=True, precision=precision) for precision in (None, fp8)}
    found = {}
    for name, steps, num_ranks, precision in (
        ("one device", one_device, 1, None),
        ("ranks", ranks, NUM_RANKS, None),
        ("one device in fp8", [partial(step, precision=fp8) for step in one_device], 1, fp8),
        ("ranks in fp8", [partial(step, precision=fp8) for step in ranks], NUM_RANKS, fp8),
    ):
        jobs = launches_of_layer(shapes[precision], num_ranks, None, torch.bfloat16, TARGET)
        steps = [*steps, *(partial(inference, step) for step in steps)]
        found[name] = {
            "steps": sorted(set().union(*map(specialisations, steps))),
            "warmup": sorted({specialisation(item) for *_, item in jobs}),
        }
    return found


def warmup_of_an_untested_gpu():
    """Run `tritonmoe warmup` where the GPU is none that the kernels are checked for; one kernel doesn't compile."""
    torch.cuda.is_available = lambda: True
    launch.target_of = lambda device: GPUTarget("cuda", 75, 32)
    tried = []

    def compile_only(source, target, options):
        tried.append(source.hash())
        if len(tried) == 2:
            raise RuntimeError("out of registers")

    triton.compile = compile_only
    parser, said = argparse.ArgumentParser(), []
    cli.warmup.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["warmup", "8", "2", "64", "32", "--tokens", "4", "--ranks", "2"])
    return {"status": cli.warmup.run(arguments, said.append), "said": said, "tried": tried}


class Device:
    """What the just-in-time compiler asks of a GPU's driver."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def cache_entries():
    """Where launches on a GPU look for their code, and where warmup's compiler puts it: entries of Triton's cache."""
    asked = []

    def note(source, target, options):
        backend = make_backend(target)
        parsed = backend.parse_options({**options, **source.parse_options()})
        asked.append(compiler.get_cache_key(source, backend, parsed, env_vars={}))
        raise NotImplementedError

    driver._active = Device()
    triton.compile = triton.compiler.compile = note
    found = {"launch": [], "warmup": []}
    with launch.recording(TARGET) as launches:
        run_on_ranks(60, tm.OverlapPlan((1, 1)), main_grad=True)
    for item in launches:
        with suppress(NotImplementedError):
            item.kernel[item.grid](*item.args, **item.constexprs, **item.options)
        found["launch"].append(asked.pop())
        with suppress(NotImplementedError):
            aot.compile_unchecked(item, TARGET)
        found["warmup"].append(asked.pop())
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump(globals()[sys.argv[1]](), sys.stdout)
