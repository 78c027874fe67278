"""The header of a layer call, 2 of 3: all ranks' headers are compared, and a user reads in words where they differ.

Every rank has all headers, so every rank raises the same error.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

from tritonmoe.config.activations import GATE_FUNCTIONS, MAX_NUMBERS, from_plain
from tritonmoe.config.layer import PerWeight
from tritonmoe.config.overlap import WIRE_DTYPES
from tritonmoe.dispatch.header import (
    CALLABLE,
    CHUNK_BY,
    DTYPE_CODES,
    EXPERT_GRADIENTS,
    FUSED_NAMES,
    MAGIC,
    NAME_FIELDS,
    NUMBER_FIELDS,
    SAVES,
    CallHeader,
    numbers_of,
)
from tritonmoe.errors import CapacityOverflow, CountMismatch, NonFiniteScores, TransportError

__all__ = ["NoLayerCall", "check_headers"]

DTYPE_NAMES = {0: "another one", **{code: str(dtype) for dtype, code in DTYPE_CODES.items()}}


def _activation_words(activation: int, *numbers_and_name: int) -> str:
    numbers, name_bits = numbers_and_name[:MAX_NUMBERS], numbers_and_name[MAX_NUMBERS:]
    if activation == CALLABLE:
        name = struct.pack("<4q", *name_bits).decode(errors="replace").rstrip()
        return f"the callable {name}"
    name = _one_of(FUSED_NAMES)(activation)
    if name not in GATE_FUNCTIONS:
        return name
    count = len(GATE_FUNCTIONS[name].number_names())
    return str(from_plain((name, *numbers_of(*numbers[:count]))))


def _one_of(values: Sequence[object]) -> Callable[[int], str]:
    """Return the words for a place among values."""
    return lambda place: str(values[place]) if 0 <= place < len(values) else f"unknown ({place})"


def _dtype_words(code: int) -> str:
    return DTYPE_NAMES.get(code, f"unknown ({code})")


def _capacity_words(millionths: int) -> str:
    return str(millionths / 1e6) if millionths else "None"


def _replica_words(bits: int) -> str:
    return " and ".join(name for i, name in enumerate(PerWeight._fields) if bits >> i & 1) or "none"


def _rank_words(rank: int) -> str:
    return str(rank) if rank else "no adapter"


def _backwards_words(number: int, last: int, _: int) -> str:
    return f"{number}, the latest of call {last}" if number else "none"


class Compared(NamedTuple):
    """Something that is the same on all ranks: its name for a user, its fields in the header, and their words."""

    label: str
    fields: tuple[str, ...]
    words: Callable[..., str] | None = str
    """Makes words of the fields' values; None where they are checksums, which have no words."""


def _field(name: str, words: Callable[..., str] | None = str) -> Compared:
    return Compared(f"{name} of this layer call", (name,), words)


_FALSE_TRUE = _one_of((False, True))
SAME_CALL = (
    Compared(
        "the backwards that ran before this layer call, or their order",
        ("num_backwards", "last_backward", "backwards"),
        _backwards_words,
    ),
    Compared("which part of a batch this layer call is of", ("half",), _one_of(("all of it", "half 1", "half 2"))),
    _field("num_experts"),
    _field("top_k"),
    _field("hidden_size"),
    _field("intermediate_size"),
    _field("dtype", _dtype_words),
    _field("placement", None),
    Compared("activation of this layer call", ("activation", *NUMBER_FIELDS, *NAME_FIELDS), _activation_words),
    _field("gated", _FALSE_TRUE),
    _field("interleaved", _FALSE_TRUE),
    _field("transposed", _FALSE_TRUE),
    _field("expert_gradients", _one_of(EXPERT_GRADIENTS)),
    _field("gate_up_bias", _one_of(("none", "a tensor"))),
    _field("down_bias", _one_of(("none", "a tensor"))),
    Compared("the rank of the adapter on gate_up_proj in this layer call", ("gate_up_rank",), _rank_words),
    Compared("the rank of the adapter on down_proj in this layer call", ("down_rank",), _rank_words),
    Compared("which of PEFT's adapters are active in this layer call, and with what scale", ("adapters",), None),
    Compared("the dropout of the adapters in this layer call", ("dropout",), lambda bits: str(numbers_of(bits)[0])),
    Compared("whether a CUDA graph captures this layer call", ("captured",), _one_of(("not captured", "captured"))),
)
CHOSEN = (
    _field("num_chunks"),
    _field("chunk_sizes", None),
    _field("local_start"),
    _field("window"),
    _field("backward_window"),
    _field("chunk_by", _one_of(CHUNK_BY)),
)
"""The fields that follow from what num_chunks="auto" chooses."""
SAME_PLAN = (
    *CHOSEN,
    _field("local_first", _FALSE_TRUE),
    _field("serial", _FALSE_TRUE),
    _field("wire_dtype", _one_of(WIRE_DTYPES)),
    _field("capacity", _capacity_words),
    Compared("which replicated weights need gradients in this layer call", ("replica_grads",), _replica_words),
)
KINDS: dict[str, tuple[str, tuple[str, ...] | dict[int, str]]] = {
    "auto": ("num_chunks", ("given", '"auto"')),
    "grad_enabled": ("grad mode", ("torch.no_grad()", "torch.enable_grad()")),
    "save": ("save", SAVES),
    "deterministic": ("torch.use_deterministic_algorithms", ("not set", "set")),
    "topk_weights_dtype": ("dtype of topk_weights", DTYPE_NAMES),
}
"""Fields that may differ between ranks, which then choose other plans: what each is called, and its values' names."""


class NoLayerCall(CountMismatch):
    """Some rank made a collective of the transport where this one called a layer, which that rank didn't count."""


def check_headers(headers: Sequence[CallHeader]) -> None:
    """Raise the same error on every rank unless all ranks make the same call, or run its backward."""
    strangers = [rank for rank, h in enumerate(headers) if h.magic != MAGIC]
    if strangers:
        raise NoLayerCall(
            f"ranks {strangers} sent something that is not a layer call: every rank must make the same "
            "expert-parallel calls, in the same order, on this transport"
        )
    refused = [rank for rank, h in enumerate(headers) if h.error]
    if refused:
        raise TransportError(f"ranks {refused} refused the arguments of this layer call; see the error raised there")
    _check_place(headers)
    _check_agreement(headers, SAME_CALL)
    if any(h.needs_any for h in headers) and not all(h.grad_enabled for h in headers):
        without = [rank for rank, h in enumerate(headers) if not h.grad_enabled]
        raise CountMismatch(
            f"ranks {without} run under torch.no_grad() while other ranks need gradients of this layer call: "
            "every rank must run its backward, so use one grad mode on all"
        )
    without = [rank for rank, h in enumerate(headers) if h.compiled and not h.needs_any]
    if without and any(h.needs_any for h in headers):
        raise CountMismatch(
            f"ranks {without} run this layer call in a compiled graph in which it needs no gradient, while other ranks "
            "need gradients of it: every rank must run its backward, so train something there too, or leave this layer "
            "out of the graph on those ranks (torch.compiler.disable)"
        )
    _check_agreement(headers, SAME_PLAN)
    poisoned = [rank for rank, h in enumerate(headers) if h.replay_overflowed]
    if poisoned:
        raise CapacityOverflow(
            f"ranks {poisoned} heard of a replay of a CUDA graph in which rows of some rank didn't fit into "
            "OverlapConfig.capacity or its router scores weren't finite: outputs and gradients of that replay are NaN. "
            "Use a larger capacity, or leave these layers out of the graph"
        )
    bad = {rank: h.nonfinite_rows for rank, h in enumerate(headers) if h.nonfinite_rows}
    if bad:
        said = ", ".join(f"rank {rank}: {count}" for rank, count in bad.items())
        raise NonFiniteScores(
            f"router scores or weights of some tokens are NaN or infinite ({said}): "
            "look for an overflow in the activations before the router"
        )


def _check_place(headers: Sequence[CallHeader]) -> None:
    """Raise CountMismatch unless all ranks are at the same place of the same program."""
    places = [h.place for h in headers]
    if len(set(places)) == 1:
        return
    said = "; ".join(f"rank {rank}: {place}" for rank, place in enumerate(places))
    why = (
        "every rank must make the same layers and the same calls, forward and backward, in the same order. Look for a "
        "rank that skips one, or takes losses in another order"
    )
    if len({h.layers_made for h in headers}) > 1:
        counts = "; ".join(
            f"rank {rank} has made {h.layers_made}, of which {h.layers_alive} live" for rank, h in enumerate(headers)
        )
        why = (
            f"layers were made or freed on some ranks alone (on this transport, {counts}). Make the same layers on "
            "every rank, in the same order"
        )
    elif len({(h.layer, h.copy) for h in headers}) > 1 and any(h.copy for h in headers):
        why = (
            "a copy of a layer (copy.deepcopy, AveragedModel, a reference model) is a layer of its own, numbered among "
            "the copies of its original as they are made. Make the same copies on every rank, in the same order, those "
            "included that one rank alone needs, and call them in the same order"
        )
    raise CountMismatch(f"the ranks disagree on which call this is ({said}): {why}")


@functools.cache
def _getter(compared: tuple[Compared, ...]) -> Callable[[CallHeader], object]:
    return attrgetter(*(name for one in compared for name in one.fields))


def _check_agreement(headers: Sequence[CallHeader], compared: tuple[Compared, ...]) -> None:
    """Raise CountMismatch unless these are the same on all ranks."""
    if len(set(map(_getter(compared), headers))) == 1:
        return
    for one in compared:
        values = [tuple(getattr(h, name) for name in one.fields) for h in headers]
        if len(set(values)) > 1:
            said = ", ".join(f"rank {rank}: {_words(one, values, rank)}" for rank in range(len(values)))
            why = _other_kinds(headers) if one in CHOSEN else ""
            raise CountMismatch(
                f"the ranks disagree on {one.label} ({said}): "
                + (why or "give every rank the same configuration and make the same calls in the same order")
            )


def _words(compared: Compared, values: Sequence[tuple[int, ...]], rank: int) -> str:
    if compared.words is not None:
        return compared.words(*values[rank])
    first = values.index(values[rank])
    return "its own" if first == rank else f"that of rank {first}"


def _other_kinds(headers: Sequence[CallHeader]) -> str:
    """Say why ranks chose different plans for this call, and the way out; "" where none chose, or nothing differs."""
    said = []
    for name, (words, words_of_value) in KINDS.items():
        ranks: dict[int, list[int]] = {}
        for rank, h in enumerate(headers):
            ranks.setdefault(getattr(h, name), []).append(rank)
        if len(ranks) > 1:
            said.append(f"{words} is " + ", ".join(f"{words_of_value[v]} on ranks {r}" for v, r in ranks.items()))
    if not said or not any(h.auto for h in headers):
        return ""
    return (
        'num_chunks="auto" learns a plan for each kind of call, and this one is of another kind on some ranks: '
        f"{'; '.join(said)}. Make it the same on every rank, or give every rank the same num_chunks"
    )
