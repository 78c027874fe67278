"""The header of a layer call, 2 of 3: all ranks' headers are compared, and a user reads in words where they differ.

Every rank has all headers, so every rank raises the same error.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, index
from typing import NamedTuple, NoReturn

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.call_settings import PLAN_NAMES
from tritonmoe.dispatch.header import DTYPE_CODES, MAGIC, SAVES, CallHeader
from tritonmoe.errors import CapacityOverflow, CountMismatch, NonFiniteScores, PeerFailure

__all__ = ["AllWords", "NoLayerCall", "check_headers"]

AllWords = Sequence[Mapping[str, str]]
"""Every rank's words of its CallSettings, by name."""
DTYPE_NAMES = {0: "another one", **{code: str(dtype) for dtype, code in DTYPE_CODES.items()}}


def _one_of(values: Sequence[object]) -> Callable[[int], str]:
    """Return the words for a place among values."""
    return lambda place: str(values[place]) if 0 <= place < len(values) else f"unknown ({place})"


def _replica_words(bits: int) -> str:
    return " and ".join(name for i, name in enumerate(PerWeight._fields) if bits >> i & 1) or "none"


def _backwards_words(number: int, last: int, _: int) -> str:
    return f"{number}, the latest of call {last}" if number else "none"


class Compared(NamedTuple):
    """Something of a call that is the same on all ranks: its name for a user, its fields in the header, and words."""

    label: str
    fields: tuple[str, ...]
    words: Callable[..., str] = str
    """Makes words of the fields' values."""


OF_CALL = "{} of this layer call"
SAME_CALL = (
    Compared(
        "the backwards that ran before this layer call, or their order",
        ("num_backwards", "last_backward", "backwards"),
        _backwards_words,
    ),
    Compared("which part of a batch this layer call is of", ("half",), _one_of(("all of it", "half 1", "half 2"))),
    *(Compared(OF_CALL.format(name), (name,)) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")),
    Compared("whether a CUDA graph captures this layer call", ("captured",), _one_of(("not captured", "captured"))),
)
SAME_GRADIENTS = (
    Compared("which replicated weights need gradients in this layer call", ("replica_grads",), _replica_words),
)
LABELS = {
    "gate_up_rank": "the rank of the adapter on gate_up_proj in this layer call",
    "down_rank": "the rank of the adapter on down_proj in this layer call",
    "adapters": "which of PEFT's adapters are active in this layer call, and with what scale",
    "dropout": "the dropout of the adapters in this layer call",
}
"""What the settings are called that don't go by their own name."""
CHOSEN = ("num_chunks", "chunk_sizes", "local_start", "window", "backward_window", "chunk_by")
"""The settings that follow from what num_chunks="auto" chooses."""
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


_all_that_is_equal = attrgetter(
    *("magic", "sequence", "layer", "copy", "is_backward", "error", "settings"),
    *(name for one in (*SAME_CALL, *SAME_GRADIENTS) for name in one.fields),
)


def check_headers(headers: Sequence[CallHeader], ask: Callable[[], AllWords]) -> None:
    """Raise the same error on every rank unless all ranks make the same call, or run its backward.

    ask: gets the words of all ranks' settings, in an exchange that every rank makes; called where they differ.
    """
    if len(set(map(_all_that_is_equal, headers))) > 1 or headers[0].magic != MAGIC or headers[0].error:
        _check_one_call(headers, ask)
    _check_gradients(headers)
    poisoned = [rank for rank, h in enumerate(headers) if h.replay_overflowed]
    if poisoned:
        raise CapacityOverflow(
            f"ranks {poisoned} report a replay of a CUDA graph in which some rank's rows didn't fit into "
            "OverlapConfig.capacity, or its router scores weren't finite. Outputs and gradients of that replay are "
            "NaN. Use a larger capacity, or leave these layers out of the graph"
        )
    bad = {rank: h.nonfinite_rows for rank, h in enumerate(headers) if h.nonfinite_rows}
    if bad:
        said = ", ".join(f"rank {rank}: {count}" for rank, count in bad.items())
        raise NonFiniteScores(
            f"router scores or weights of some tokens are NaN or infinite ({said}): "
            "look for an overflow in the activations before the router, or in a stage of torch.distributed.pipelining "
            "give PipelineStage input_args and output_args, without which torch runs the stage on uninitialised memory"
        )


def _check_one_call(headers: Sequence[CallHeader], ask: Callable[[], AllWords]) -> None:
    """Raise what the headers differ in, in the order in which one thing explains another."""
    strangers = [rank for rank, h in enumerate(headers) if h.magic != MAGIC]
    if strangers:
        raise NoLayerCall(
            f"ranks {strangers} sent something that is not a layer call: every rank must make the same "
            "expert-parallel calls, in the same order, on this transport"
        )
    refused = [rank for rank, h in enumerate(headers) if h.error]
    if refused:
        raise PeerFailure(f"ranks {refused} refused the arguments of this layer call; see the error raised there")
    _check_place(headers)
    words: AllWords = ()
    if len({index(h.settings) for h in headers}) > 1:
        damaged = [rank for rank, h in enumerate(headers) if h.is_damaged]
        if damaged:
            raise CountMismatch(f"the headers of ranks {damaged} were damaged on their way")
        words = ask()
    _check_agreement(headers, SAME_CALL)
    names = list(dict.fromkeys(name for one in words for name in one))
    _check_words(headers, words, [name for name in names if name not in PLAN_NAMES])
    _check_gradients(headers)
    _check_words(headers, words, [name for name in names if name in PLAN_NAMES])
    _check_agreement(headers, SAME_GRADIENTS)


def _check_gradients(headers: Sequence[CallHeader]) -> None:
    """Raise CountMismatch unless every rank can run the backward that some rank needs."""
    if not any(h.needs_any for h in headers):
        return
    without = [rank for rank, h in enumerate(headers) if not h.grad_enabled]
    if without:
        raise CountMismatch(
            f"ranks {without} run under torch.no_grad() while other ranks need gradients of this layer call: every "
            "rank must run the call's backward, so use the same grad mode on all ranks"
        )
    without = [rank for rank, h in enumerate(headers) if h.compiled and not h.needs_any]
    if without:
        raise CountMismatch(
            f"ranks {without} run this layer call in a compiled graph in which the call needs no gradient, while "
            "other ranks need gradients of it. Every rank must run the call's backward: train a parameter before or "
            "in this layer on those ranks too, or leave the layer out of the graph there (torch.compiler.disable)"
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


def _check_agreement(headers: Sequence[CallHeader], compared: tuple[Compared, ...]) -> None:
    """Raise CountMismatch unless these are the same on all ranks."""
    for one in compared:
        values = [tuple(getattr(h, name) for name in one.fields) for h in headers]
        if len(set(values)) > 1:
            _raise_mismatch(one.label, [one.words(*value) for value in values])


def _check_words(headers: Sequence[CallHeader], words: AllWords, names: Sequence[str]) -> None:
    """Raise CountMismatch unless the settings with these names are the same on all ranks."""
    for name in names:
        said = [one.get(name, "unknown") for one in words]
        if len(set(said)) > 1:
            why = _other_kinds(headers) if name in CHOSEN else ""
            _raise_mismatch(LABELS.get(name, OF_CALL.format(name)), said, why)


def _raise_mismatch(label: str, said: Sequence[str], why: str = "") -> NoReturn:
    """Raise what the ranks differ in; why: the cause, where one is known."""
    raise CountMismatch(
        f"the ranks disagree on {label} ({', '.join(f'rank {rank}: {words}' for rank, words in enumerate(said))}): "
        + (why or "give every rank the same configuration and make the same calls in the same order")
    )


def _other_kinds(headers: Sequence[CallHeader]) -> str:
    """Return why ranks chose other plans for this call, and the way out; "" where none chose, or nothing differs."""
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
