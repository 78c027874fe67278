"""What training steps launch on a GPU, without one: every operation gives the reference's values, and its launches are
caught. A process of its own: where Triton's interpreter is on, kernels have no specialisation."""

import json
import sys
from functools import partial
from types import ModuleType

import torch

import tritonmoe as tm
from tritonmoe import backends
from tritonmoe.backends import reference
from tritonmoe.backends import triton as kernels
from tritonmoe.kernels import aot, launch
from tritonmoe.kernels.aot import source_of

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
    """Give an operation whose memory is the Triton backend's, and whose values are the reference's."""

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
for operation in ("up", "down", "combine", "down_grad", "up_grad", "weight_grad"):
    setattr(OPERATIONS, operation, caught(operation))
backends.choose = lambda *arguments, **keywords: OPERATIONS


def draw(num_tokens, num_experts, main_grad=False):
    """Give x, topk_ids, topk_weights, and weights with biases."""
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
    y.backward(torch.randn_like(y))


def run_on_ranks(num_tokens, plan, main_grad=False, **options):
    inputs = [draw(num_tokens, E // NUM_RANKS, main_grad) for _ in range(NUM_RANKS)]

    def step(transport):
        x, ids, gates, weights = inputs[transport.rank]
        y = tm.expert_parallel_mlp(
            x, ids, gates, **weights, num_experts=E, transport=transport, overlap=plan, **options
        )
        y.backward(torch.randn_like(y))

    tm.run_on_emulated_ranks(step, NUM_RANKS)


def specialisations(step):
    """Run a step, and give what the just-in-time compiler would have to compile for it."""
    with launch.recording(TARGET) as launches:
        step()
    return {f"{item.kernel.__name__} {source_of(item, TARGET).hash()} {item.options}" for item in launches}


def chunks():
    """Steps of one class of pairs per expert, in so many chunks, cut where tokens happen to go."""
    plans = [tm.OverlapPlan((1,) * count, chunk_by=axis) for axis in ("tokens", "experts") for count in (1, 2, 3)]
    return [sorted(specialisations(partial(run_on_ranks, t, plan))) for plan in plans for t in range(36, 42)]


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump(globals()[sys.argv[1]](), sys.stdout)
