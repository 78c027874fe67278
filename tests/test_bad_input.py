"""Bad input gives an error with the rule and the values, on every rank, and nothing hangs."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritonmoe as tm
from tritonmoe.dispatch import count_exchange
from tritonmoe.experts import arguments as argument_checks
from tritonmoe.ops import backends
from tritonmoe.routing.nonfinite import NonFiniteCheck, _Counter
from tritonmoe.transports import LocalTransport, Transport

LIMIT_S = 5.0
"""What no test here comes near unless it hangs."""
TIMEOUT_S = 0.5


def arguments(num_experts: int = 4, num_tokens: int = 3, top_k: int = 2, hidden: int = 8, inner: int = 4) -> dict:
    return {
        "x": torch.ones(num_tokens, hidden),
        "topk_ids": torch.arange(num_tokens * top_k).view(num_tokens, top_k) % num_experts,
        "topk_weights": torch.ones(num_tokens, top_k),
        "gate_up_proj": torch.ones(num_experts, 2 * inner, hidden),
        "down_proj": torch.ones(num_experts, hidden, inner),
    }


def full(*shape: int, **options) -> Callable[[], Tensor]:
    return lambda: torch.ones(*shape, **options)


WRONG: dict[str, tuple[dict[str, Any], type, str]] = {
    "x-1d": ({"x": full(8)}, ValueError, r"x must be \(T, D\), got shape \(8,\)"),
    "x-3d": ({"x": full(1, 3, 8)}, ValueError, r"x must be \(T, D\), got shape \(1, 3, 8\)"),
    "x-integer": ({"x": full(3, 8, dtype=torch.int64)}, TypeError, "x must be floating point, got torch.int64"),
    "x-width": ({"x": full(3, 9)}, ValueError, r"gate_up_proj must be .*\(4, 8, 9\) with D = 9 from x"),
    "ids-float": ({"topk_ids": full(3, 2)}, TypeError, "topk_ids must be int32 or int64, got torch.float32"),
    "ids-int16": ({"topk_ids": full(3, 2, dtype=torch.int16)}, TypeError, "int32 or int64, got torch.int16"),
    "ids-bool": ({"topk_ids": full(3, 2, dtype=torch.bool)}, TypeError, "int32 or int64, got torch.bool"),
    "ids-1d": ({"topk_ids": full(3, dtype=torch.int64)}, ValueError, r"topk_ids must be \(T, K\) with T = 3"),
    "ids-T": ({"topk_ids": full(4, 2, dtype=torch.int64)}, ValueError, r"T = 3 as in x, got \(4, 2\)"),
    "weights-shape": ({"topk_weights": full(3, 1)}, ValueError, r"topk_weights \(3, 1\) must have the shape.*\(3, 2\)"),
    "weights-integer": ({"topk_weights": full(3, 2, dtype=torch.int64)}, TypeError, "topk_weights must be floating"),
    "up-2d": ({"gate_up_proj": full(8, 8)}, ValueError, "must have 3 axes"),
    "up-odd": ({"gate_up_proj": full(4, 7, 8)}, ValueError, r"needs an even 2F axis, got \(4, 7, 8\)"),
    "up-transposed": ({"transposed": True}, ValueError, "transposed=True, gated=True; got"),
    "up-ungated": ({"gated": False}, ValueError, r"down_proj must be \(E, D, F\) = \(4, 8, 8\).*gated=False"),
    "down-F": (
        {"down_proj": full(4, 8, 5)},
        ValueError,
        r"down_proj must be .* = \(4, 8, 4\).*got \(4, 8, 5\)",
    ),
    "down-E": ({"down_proj": full(3, 8, 4)}, ValueError, r"got \(3, 8, 4\)"),
    "up-dtype": (
        {"gate_up_proj": full(4, 8, 8, dtype=torch.float64)},
        TypeError,
        "gate_up_proj is torch.float64 and x",
    ),
    "x-dtype": ({"x": full(3, 8, dtype=torch.bfloat16)}, TypeError, "x is torch.bfloat16: cast one"),
    "up-bias": ({"gate_up_bias": full(4, 4)}, ValueError, r"gate_up_bias must be \(E, 2F\) = \(4, 8\)"),
    "down-bias": ({"down_bias": full(8)}, ValueError, r"down_bias must be \(E, D\) = \(4, 8\)"),
    "bias-dtype": ({"down_bias": full(4, 8, dtype=torch.float16)}, TypeError, "down_bias is torch.float16"),
    "x-device": ({"x": full(3, 8, device="meta")}, ValueError, "is on cpu and x on meta: move them to one device"),
    "ids-device": (
        {"topk_ids": full(3, 2, dtype=torch.int64, device="meta")},
        ValueError,
        "topk_ids is on meta and x on cpu",
    ),
    "down-device": ({"down_proj": full(4, 8, 4, device="meta")}, ValueError, "down_proj is on meta and x on cpu"),
    "activation-name": ({"activation": "swish"}, ValueError, "'swish' is not known: choose one of silu, gelu"),
    "activation-type": (
        {"activation": 3},
        TypeError,
        "must be a name, a ClampedSwiGLU, a SoftcappedSwiGLU or a callable, got <class 'int'>",
    ),
    "clamped-ungated": (
        {"activation": tm.ClampedSwiGLU(1.0), "gated": False, "down_proj": full(4, 8, 8)},
        ValueError,
        "needs a gate and an up half",
    ),
    "callable-shape": ({"activation": lambda h: h}, ValueError, r"must turn \(\d+, 8\) torch.float32 into \(\d+, 4\)"),
    "callable-dtype": (
        {"activation": lambda h: h[:, :4].double()},
        ValueError,
        r"into \(\d+, 4\) torch.float32, got \(\d+, 4\) torch.float64",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
    "save": ({"save": "nothing"}, ValueError, "save must be 'hidden' or 'input', got 'nothing'"),
    "interleaved-ungated": (
        {"gated": False, "interleaved": True, "down_proj": full(4, 8, 8)},
        ValueError,
        "it needs gated=True",
    ),
    "x-none": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "ids-list": ({"topk_ids": [[0, 1]] * 3}, TypeError, "topk_ids must be a tensor, got list"),
    "up-numpy": ({"gate_up_proj": np.ones((4, 8, 8))}, TypeError, "gate_up_proj must be a tensor, got ndarray"),
    "bias-list": ({"gate_up_bias": [1.0]}, TypeError, "gate_up_bias must be a tensor, got list"),
    "x-sparse": ({"x": torch.ones(3, 8).to_sparse()}, TypeError, r"x must be a dense tensor, .*pass x.to_dense\(\)"),
    "up-sparse": ({"gate_up_proj": torch.ones(4, 8, 8).to_sparse()}, TypeError, "gate_up_proj must be a dense tensor"),
    "no-columns": (
        {"x": full(3, 0), "gate_up_proj": full(4, 8, 0), "down_proj": full(4, 0, 4)},
        ValueError,
        r"D and F must be at least 1, got x \(3, 0\)",
    ),
    "no-units": ({"gate_up_proj": full(4, 0, 8), "down_proj": full(4, 8, 0)}, ValueError, "D and F must be at least 1"),
    "gated-text": ({"gated": "no"}, TypeError, "gated must be True or False, got 'no'"),
    "transposed-number": ({"transposed": 0}, TypeError, "transposed must be True or False, got 0"),
    "activation-class": (
        {"activation": torch.nn.SiLU},
        TypeError,
        r"is the class SiLU: pass an instance of it, SiLU\(\)",
    ),
    "callable-none": ({"activation": lambda h: None}, ValueError, r"into \(\d+, 4\) torch.float32, got NoneType"),
}

cases_of_wrong = pytest.mark.parametrize(("changes", "error", "match"), WRONG.values(), ids=WRONG)


def made(changes: dict[str, Any]) -> dict[str, Any]:
    return {n: v() if callable(v) and n != "activation" else v for n, v in changes.items()}


@cases_of_wrong
def test_moe_mlp(changes: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        tm.moe_mlp(**{**arguments(), **made(changes)})


@pytest.mark.parametrize("mode", ["no_grad", "training"])
def test_callable_of_wrong_shape_in_any_mode(mode: str) -> None:
    given = arguments()
    given["x"].requires_grad_(mode == "training")
    with pytest.raises(ValueError, match="the activation callable must turn"):
        tm.moe_mlp(**given, activation=lambda h: h[:1, :4])


def test_too_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_checks, "MAX_PAIRS", 5)
    with pytest.raises(ValueError, match=r"T\*K = 6 pairs exceed 5.*split the batch"):
        tm.moe_mlp(**arguments())


def test_kernels_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="the kernels compute in fp32, fp16 and bf16, not in fp64"):
        tm.moe_mlp(**{n: v.double() if v.is_floating_point() else v for n, v in arguments().items()}, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' can't run here: tensors are on cpu.*Use backend='auto'"):
        tm.moe_mlp(**arguments(), backend="triton")
    assert tm.moe_mlp(**arguments(), backend="auto").shape == (3, 8)


BEYOND_THE_KERNELS: dict[str, tuple[dict[str, int], torch.dtype, str]] = {
    "E": ({"num_experts": 1025}, torch.float32, "there are 1025 experts on this device, the kernels take at most 1024"),
    "K": ({"top_k": 17}, torch.float32, "K is 17 experts per token, the kernels take at most 16"),
    "fp64": ({}, torch.float64, "the kernels compute in fp32, fp16 and bf16, not in fp64"),
}
cases_beyond_the_kernels = pytest.mark.parametrize(
    ("sizes", "dtype", "match"), BEYOND_THE_KERNELS.values(), ids=BEYOND_THE_KERNELS
)


def beyond_the_kernels(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    given = arguments(**sizes, hidden=2, inner=1)
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()} | {"backend": "triton"}


@cases_beyond_the_kernels
def test_limits_of_the_kernels(sizes: dict, dtype: torch.dtype, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = beyond_the_kernels(sizes, dtype)
    message = f"backend='triton' can't run here: {match}. Use backend='auto', 'torch' or 'reference'"
    with pytest.raises(ValueError, match=message):
        tm.moe_mlp(**given)
    with pytest.raises(ValueError, match=message):
        torch.compile(tm.moe_mlp, backend="aot_eager")(**given)
    assert tm.moe_mlp(**given | {"backend": "auto"}).shape == (3, 2)


def test_triton_or_device_too_old_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends.backend_choice, "_triton_version", lambda: "3.5.1")
    with pytest.raises(ValueError, match=r"triton 3\.5\.1 is too old, the kernels need at least 3\.6"):
        tm.moe_mlp(**arguments(), backend="triton")
    for enough in ("3.6.0", "3.10.0+git1", "4.0", None):
        monkeypatch.setattr(backends.backend_choice, "_triton_version", lambda enough=enough: enough)
        assert backends.triton_unusable_reason(torch.device("cpu")) is None
    monkeypatch.setattr(backends.backend_choice, "_compute_capability", lambda index: (7, 5))
    reason = backends.triton_unusable_reason(torch.device("cuda", 1))
    assert reason == "cuda:1 has compute capability 7.5, the kernels need at least 8.0 (Ampere)"


@pytest.mark.parametrize("backend", ["auto", "torch", "triton", "reference"])
def test_dtypes_that_nothing_computes_in(backend: str) -> None:
    given = {n: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for n, v in arguments().items()}
    with pytest.raises(
        TypeError, match=r"quantised \(Tensor of torch.float8_e4m3fn\): the experts take fp64, fp32, bf16 or"
    ):
        tm.moe_mlp(**given, backend=backend)


# One rank of several


Call = Callable[[Transport], object]


def errors_of(fn: Call, num_ranks: int = 2, timeout_s: float = TIMEOUT_S) -> list[Exception | None]:
    """Run fn on every rank and give what each raised; no rank ends before all are through."""

    def on_rank(transport: Transport) -> Exception | None:
        try:
            fn(transport)
        except Exception as error:
            return error
        return None

    before = time.perf_counter()
    errors = tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=timeout_s)
    elapsed = time.perf_counter() - before
    assert elapsed < LIMIT_S, f"took {elapsed:.1f} s"
    return errors


def parallel(transport: Transport, overlap: tm.OverlapConfig | None = None, grad: bool = False, **changes) -> Tensor:
    """A call that fits, up to `changes`; W ranks hold 4 W experts."""
    given = {**arguments(num_experts=4), **made(changes)}
    num_experts = given.pop("num_experts", 4 * transport.size)
    if grad:
        given["x"].requires_grad_()
    return tm.expert_parallel_mlp(
        **given, num_experts=num_experts, transport=transport, overlap=overlap or tm.OverlapConfig(1)
    )


@pytest.mark.parametrize("bad_rank", [0, 1])
@cases_of_wrong
def test_one_rank_has_bad_arguments(changes: dict, error: type, match: str, bad_rank: int) -> None:
    """That rank says why, the others say which rank, and the next call works."""

    def fn(transport: Transport) -> None:
        expected = (
            (error, match) if transport.rank == bad_rank else (tm.TransportError, rf"ranks \[{bad_rank}\] refused")
        )
        with pytest.raises(expected[0], match=expected[1]):
            parallel(transport, **(changes if transport.rank == bad_rank else {}))
        out = parallel(transport, grad=True)
        out.sum().backward()
        assert out.isfinite().all()

    assert errors_of(fn) == [None, None]


@pytest.mark.parametrize("bad_rank", [0, 1, None])
@cases_beyond_the_kernels
def test_ranks_beyond_the_kernels(
    sizes: dict, dtype: torch.dtype, match: str, bad_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank or all (None) ask for the kernels: refused before a row is sent, and the next call works."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = beyond_the_kernels(sizes, dtype)

    def fn(transport: Transport) -> None:
        is_bad = bad_rank in (transport.rank, None)
        call = {
            **given,
            "backend": "triton" if is_bad else "torch",
            "num_experts": transport.size * given["gate_up_proj"].shape[0],
        }
        expected = (ValueError, match) if is_bad else (tm.TransportError, rf"ranks \[{bad_rank}\] refused")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "exchange", lambda *_, **__: pytest.fail("rows were sent"))
            with pytest.raises(expected[0], match=expected[1]):
                tm.expert_parallel_mlp(**call, transport=transport)
        parallel(transport, grad=True).sum().backward()

    assert errors_of(fn) == [None, None]


def test_number_of_experts() -> None:
    def fn(transport: Transport) -> None:
        with pytest.raises(ValueError, match=r"num_experts \(7\) must be divisible by the number of ranks \(3\)"):
            parallel(transport, num_experts=7)
        with pytest.raises(ValueError, match=r"each of 3 ranks holds num_experts / ranks = 2 experts.*has 4"):
            parallel(transport, num_experts=6)
        with pytest.raises(ValueError, match=r"num_experts \(0\) must be divisible"):
            parallel(transport, num_experts=0)
        parallel(transport)

    assert errors_of(fn, 3) == [None] * 3


WRONG_FOR_MANY_RANKS: dict[str, tuple[dict[str, Any], type, str]] = {
    "num_experts": ({"num_experts": 8.0}, TypeError, "num_experts must be a whole number, E over all ranks, got 8.0"),
    "overlap": ({"overlap": 4}, TypeError, r"overlap must be .*got 4: use OverlapConfig\(num_chunks=4\)"),
    "placement": ({"placement": 3}, TypeError, "placement must be an ExpertPlacement or None, got 3"),
    "fillers": ({"fillers": 3}, TypeError, "fillers must be a list of functions without arguments, got 3"),
    "filler": ({"fillers": [3]}, TypeError, r"fillers must be a list of functions without arguments, got \[3\]"),
}


@pytest.mark.parametrize(("changes", "error", "match"), WRONG_FOR_MANY_RANKS.values(), ids=WRONG_FOR_MANY_RANKS)
def test_one_rank_has_arguments_that_are_bad_for_many(changes: dict, error: type, match: str) -> None:
    def fn(transport: Transport) -> None:
        expected = (error, match) if transport.rank == 1 else (tm.TransportError, r"ranks \[1\] refused")
        with pytest.raises(expected[0], match=expected[1]):
            parallel(transport, **(changes if transport.rank == 1 else {}))
        parallel(transport, grad=True).sum().backward()

    assert errors_of(fn) == [None, None]


@pytest.mark.parametrize("transport", [None, "gloo"])
def test_what_is_no_transport(transport: object) -> None:
    with pytest.raises(TypeError, match=r"transport must be a Transport, got \w+: for a torch ProcessGroup it is"):
        tm.expert_parallel_mlp(**arguments(), num_experts=4, transport=transport)


DISAGREEMENTS = {
    "num_chunks": lambda rank: {"overlap": tm.OverlapConfig(1 + rank)},
    "local_first": lambda rank: {"overlap": tm.OverlapConfig(1, local_first=bool(rank))},
    "serial": lambda rank: {"overlap": tm.OverlapConfig(1, serial=bool(rank))},
    "chunk_sizes": lambda rank: {"overlap": tm.OverlapConfig(shape=(1, 2 + rank, 1))},
    "chunk_by": lambda rank: {"overlap": tm.OverlapPlan((1, 1), chunk_by=("tokens", "experts")[rank])},
    "local_start": lambda rank: {"overlap": tm.OverlapPlan((1,), local_start=5 + rank)},
    "window": lambda rank: {"overlap": tm.OverlapPlan((1, 1), window=1 + rank)},
    "backward_window": lambda rank: {"overlap": tm.OverlapPlan((1, 1), backward_window=1 + rank)},
    "top_k": lambda rank: {
        "topk_ids": full(3, 1 + rank, dtype=torch.int64),
        "topk_weights": full(3, 1 + rank),
    },
    "hidden_size": lambda rank: {
        "x": full(3, 8 + rank),
        "gate_up_proj": full(4, 8, 8 + rank),
        "down_proj": full(4, 8 + rank, 4),
    },
    "dtype": lambda rank: {
        name: full(*arguments()[name].shape, dtype=(torch.float32, torch.bfloat16)[rank])
        for name in ("x", "gate_up_proj", "down_proj")
    },
    "num_experts": lambda rank: {
        "num_experts": 8 + 2 * rank,
        "gate_up_proj": full(4 + rank, 8, 8),
        "down_proj": full(4 + rank, 8, 4),
    },
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_disagree(name: str) -> None:
    """Every rank gets the same words; the next call works."""

    def fn(transport: Transport) -> None:
        with pytest.raises(tm.CountMismatch, match=f"the ranks disagree on {name} .*rank 0: .*rank 1: "):
            parallel(transport, **DISAGREEMENTS[name](transport.rank))
        parallel(transport, grad=True).sum().backward()

    assert errors_of(fn) == [None, None]


def test_one_rank_without_gradients() -> None:
    def fn(transport: Transport) -> None:
        with (
            torch.set_grad_enabled(transport.rank == 1),
            pytest.raises(tm.CountMismatch, match=r"ranks \[0\] run under torch.no_grad\(\) while other ranks need"),
        ):
            parallel(transport, grad=True)
        with torch.set_grad_enabled(transport.rank == 1):
            parallel(transport)  # nobody needs a gradient

    assert errors_of(fn) == [None, None]


AUTO = tm.OverlapConfig()
OTHER_KINDS = {
    "save": (
        lambda rank: {"overlap": AUTO, "save": ("input", "hidden")[rank], "grad": True},
        r"this one is of another kind on some ranks: save is input on ranks \[0\], hidden on ranks \[1\]\. Make it",
    ),
    "grad mode": (
        lambda rank: {"overlap": AUTO, "grad_mode": bool(rank)},  # legal, since nobody needs a gradient
        r"grad mode is torch\.no_grad\(\) on ranks \[0\], torch\.enable_grad\(\) on ranks \[1\]\. Make it",
    ),
    "num_chunks": (
        lambda rank: {"overlap": (tm.OverlapConfig(3), AUTO)[rank], "grad": True},
        r'num_chunks is given on ranks \[0\], "auto" on ranks \[1\]\. Make it the same on every rank, or give every',
    ),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_ranks_learn_plans_for_different_kinds_of_calls(name: str) -> None:
    """Rank 1 goes on with the kind of call that both have measured once, rank 0 starts another: both say why."""
    changes, match = OTHER_KINDS[name]

    def fn(transport: Transport) -> None:
        given = changes(transport.rank)
        grad_mode = given.pop("grad_mode", True)
        training = {"overlap": AUTO, "grad": given.get("grad", False)}
        parallel(transport, **training)
        with (
            torch.set_grad_enabled(grad_mode),
            pytest.raises(tm.CountMismatch, match=r"disagree on num_chunks .*rank 0: \d, rank 1: 4\): .*" + match),
        ):
            parallel(transport, **given)
        parallel(transport, **training)

    assert errors_of(fn) == [None, None]


def test_one_rank_without_gradients_where_plans_are_learnt() -> None:
    """That the plans differ too is no news."""

    def fn(transport: Transport) -> None:
        parallel(transport, AUTO, grad=True).sum().backward()
        with (
            torch.set_grad_enabled(transport.rank == 1),
            pytest.raises(tm.CountMismatch, match=r"ranks \[0\] run under torch.no_grad\(\) while other ranks need"),
        ):
            parallel(transport, AUTO, grad=True)

    assert errors_of(fn) == [None, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_weights_that_are_not_finite(value: float) -> None:
    def fn(transport: Transport) -> None:
        weights = torch.ones(3, 2)
        if transport.rank == 1:
            weights[1] = value
        with pytest.raises(tm.NonFiniteScores, match=r"NaN or infinite \(rank 1: 1\)"):
            parallel(transport, topk_weights=lambda: weights)
        parallel(transport)

    assert errors_of(fn, 3) == [None] * 3


def test_more_pairs_than_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's own pairs fit, what one of them would receive does not: all of them say so."""
    monkeypatch.setattr(count_exchange, "MAX_PAIRS", 11)

    def fn(transport: Transport) -> None:
        ids = torch.full((3, 2), 4)
        with pytest.raises(ValueError, match="rank 1 would receive 6 rows of 2 pairs, more than 11"):
            parallel(transport, topk_ids=lambda: ids)

    assert errors_of(fn) == [None, None]
    monkeypatch.setattr(count_exchange, "MAX_PAIRS", 12)
    assert errors_of(lambda t: parallel(t, topk_ids=lambda: torch.full((3, 2), 4))) == [None, None]


def test_one_rank_has_too_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_checks, "MAX_PAIRS", 6)

    def fn(transport: Transport) -> None:
        num_tokens = 3 + transport.rank
        given = {"x": full(num_tokens, 8), "topk_weights": full(num_tokens, 2)}
        parallel(transport, topk_ids=full(num_tokens, 2, dtype=torch.int64), **given)

    refused, too_many = errors_of(fn)
    assert isinstance(too_many, ValueError)
    assert "T*K = 8 pairs exceed 6" in str(too_many)
    assert isinstance(refused, tm.TransportError)


def test_a_rank_raises_in_its_own_code() -> None:
    """The caller gets that error; the ranks that waited for it end at once."""

    def fn(transport: Transport) -> None:
        if transport.rank == 1:
            raise KeyError("own code")
        parallel(transport)

    before = time.perf_counter()
    with pytest.raises(KeyError, match="own code") as caught:
        tm.run_on_emulated_ranks(fn, 3, timeout_s=30)
    assert caught.value.emulated_rank == 1
    assert time.perf_counter() - before < LIMIT_S


def test_an_activation_raises_in_its_own_code() -> None:
    """An error that is no argument error, between two exchanges."""

    def fn(transport: Transport) -> None:
        def activation(h: Tensor) -> Tensor:
            if h.shape[0] and transport.rank == 0:
                raise ZeroDivisionError("in the activation")
            return h[:, :4]

        parallel(transport, activation=activation)

    before = time.perf_counter()
    with pytest.raises(ZeroDivisionError, match="in the activation"):
        tm.run_on_emulated_ranks(fn, 2, timeout_s=30)
    assert time.perf_counter() - before < LIMIT_S


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_never_calls(where: str) -> None:
    """It lives on, but does something else for longer than the timeout."""

    def fn(transport: Transport) -> None:
        out = parallel(transport, grad=True) if where == "backward" else None
        if transport.rank == 1:
            time.sleep(3 * TIMEOUT_S)
        elif out is None:
            parallel(transport)
        else:
            out.sum().backward()

    waited, busy = errors_of(fn)
    assert busy is None
    assert isinstance(waited, tm.TransportError)
    assert "has not heard from ranks [1]" in str(waited)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_makes_one_call_more(where: str) -> None:
    def fn(transport: Transport) -> None:
        out = parallel(transport, grad=True)
        if transport.rank == 0:
            if where == "forward":
                parallel(transport)
            else:
                out.sum().backward()

    more, normal = errors_of(fn)
    assert normal is None
    assert isinstance(more, tm.TransportError)


def test_ranks_run_their_calls_in_another_order() -> None:
    """Two calls of other shapes: seen at the first."""

    def fn(transport: Transport) -> None:
        wide = {"topk_ids": full(3, 3, dtype=torch.int64), "topk_weights": full(3, 3)}
        for changes in ({}, wide) if transport.rank == 0 else (wide, {}):
            parallel(transport, **changes)

    for error in errors_of(fn):
        assert isinstance(error, tm.CountMismatch)
        assert "top_k" in str(error)


def test_a_backward_is_skipped_on_one_rank() -> None:
    """Rank 0 runs backward, rank 1 the next forward: not one of them goes on with wrong rows."""

    def fn(transport: Transport) -> None:
        out = parallel(transport, grad=True)
        if transport.rank == 0:
            out.sum().backward()
        else:
            parallel(transport)

    for error in errors_of(fn):
        assert isinstance(error, tm.TransportError)


def test_a_closed_transport() -> None:
    transport = LocalTransport()
    parallel(transport)
    transport.close()
    with pytest.raises(tm.TransportError, match="closed"):
        parallel(transport)


# Settings


@pytest.mark.parametrize("num_chunks", [0, 33, -1, 1.5, "many", None], ids=repr)
def test_num_chunks(num_chunks: object) -> None:
    with pytest.raises(ValueError, match=rf"num_chunks must be 'auto' or 1\.\.32, got {num_chunks!r}"):
        tm.OverlapConfig(num_chunks)


def test_limits_of_num_chunks() -> None:
    for num_chunks in (1, 32, "auto"):
        assert tm.OverlapConfig(num_chunks).num_chunks == num_chunks
    assert (
        errors_of(lambda t: parallel(t, tm.OverlapConfig(32), grad=True).sum().backward(), timeout_s=20) == [None] * 2
    )


CONFIGS = {
    "K-above-E": ({"num_experts": 4, "top_k": 5}, r"top_k \(5\) must not exceed num_experts \(4\)"),
    "K-above-16": ({"num_experts": 64, "top_k": 17}, "top_k must be at most 16, got 17"),
    "K-zero": ({"top_k": 0}, "top_k must be a positive integer, got 0"),
    "E-above-1024": ({"num_experts": 1025}, "num_experts must be at most 1024, got 1025"),
    "D-zero": ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    "D-float": ({"hidden_size": 8.0}, r"hidden_size must be a positive integer, got 8\.0"),
    "F-negative": ({"intermediate_size": -4}, "intermediate_size must be a positive integer, got -4"),
    "activation": ({"activation": "mish"}, "'mish' is not known"),
    "interleaved-ungated": ({"interleaved": True, "gated": False}, "it needs gated=True"),
    "clamped-ungated": ({"activation": tm.ClampedSwiGLU(1.0), "gated": False}, "use gated=True"),
    "score": (
        {"score_function": "tanh"},
        "score_function must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', got 'tanh'",
    ),
    "softmax-after-sigmoid": (
        {"score_function": "sigmoid", "softmax_after_topk": True},
        "needs score_function='softmax'",
    ),
    "groups": ({"num_expert_groups": 3}, r"num_experts \(8\) must be divisible by num_expert_groups \(3\)"),
    "top-groups": (
        {"num_expert_groups": 2, "top_k_groups": 3},
        r"top_k_groups \(3\) must not exceed num_expert_groups \(2\)",
    ),
    "D-flag": ({"hidden_size": True}, "hidden_size must be a positive integer, got True"),
    "groups-float": ({"num_expert_groups": 2.0}, r"num_expert_groups must be a positive integer, got 2\.0"),
    "groups-zero": ({"num_expert_groups": 0}, "num_expert_groups must be a positive integer, got 0"),
    "top-groups-text": ({"top_k_groups": "x"}, "top_k_groups must be a positive integer, got 'x'"),
    "scaling-nan": (
        {"routed_scaling_factor": float("nan")},
        "routed_scaling_factor must be positive .*got nan",
    ),
    "scaling-text": ({"routed_scaling_factor": "2"}, "routed_scaling_factor must be positive and finite, got '2'"),
    "loss-negative": ({"load_balance_loss_weight": -1.0}, r"load_balance_loss_weight must be finite and not .*-1\.0"),
    "loss-text": ({"z_loss_weight": "x"}, "z_loss_weight must be finite and not negative, got 'x'"),
    "bias": ({"bias": "yes"}, "bias must be True or False, got 'yes'"),
    "gated": ({"gated": "no"}, "gated must be True or False, got 'no'"),
    "renormalize": ({"renormalize": 2}, "renormalize must be True or False, got 2"),
    "K-above-groups": ({"num_expert_groups": 8, "top_k_groups": 1}, r"top_k \(2\) exceeds the 1 experts"),
}


@pytest.mark.parametrize(("changes", "match"), CONFIGS.values(), ids=CONFIGS)
def test_configs(changes: dict, match: str) -> None:
    good = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 8, "top_k": 2}
    tm.MoEConfig(**good)
    with pytest.raises((ValueError, TypeError), match=match):
        tm.MoEConfig(**{**good, **changes})


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf"), "7", None, True])
def test_clamped_swiglu(limit: object) -> None:
    with pytest.raises(ValueError, match=rf"limit must be positive and finite, got {limit!r}"):
        tm.ClampedSwiGLU(limit)
    with pytest.raises(ValueError, match=r"alpha must be a finite number, got 'x'"):
        tm.ClampedSwiGLU(7.0, alpha="x")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tm.OverlapConfig(local_first="no"), "local_first must be True or False, got 'no'"),
        (lambda: tm.OverlapConfig(serial=1), "serial must be True or False, got 1"),
        (lambda: tm.OverlapConfig(memory_budget_bytes=True), "memory_budget_bytes must be a positive number .* True"),
        (lambda: tm.OverlapPlan(4), "chunk sizes must be a tuple of .*got 4"),
        (lambda: tm.OverlapPlan([1, 1]), r"chunk sizes must be a tuple of .*got \[1, 1\]"),
        (lambda: tm.OverlapPlan((1,), window="2"), r"window must be 1\.\.32, got '2'"),
        (lambda: tm.OverlapPlan((1,), local_start=0.5), r"local_start must be 0\.\.16 sixteenths, got 0\.5"),
        (lambda: tm.OverlapPlan((1,), serial="x"), "serial must be True or False, got 'x'"),
        (lambda: tm.ExpertPlacement([[0], [1]]), r"must be a tuple, .*of tuples of expert ids, got \[\[0\], \[1\]\]"),
        (lambda: tm.ExpertPlacement(((0.0, 1.0),)), "of tuples of expert ids"),
        (lambda: tm.ExpertPlacement(3), "of tuples of expert ids, got 3"),
        (lambda: tm.ExpertPlacement.contiguous(7, 2), r"num_experts \(7\) must be divisible by size \(2\)"),
        (lambda: tm.ExpertPlacement.contiguous(8, 0), r"must be divisible by size \(0\)"),
        (lambda: tm.ExpertPlacement.balanced(torch.ones(2, 4), 2), r"load must be \(E,\) .*got \(2, 4\)"),
        (lambda: tm.ExpertPlacement.balanced(torch.full((4,), float("nan")), 2), "load must be .*nan"),
        (lambda: tm.ExpertPlacement.balanced(torch.ones(4), 0), "size must be a number of ranks of at least 1, got 0"),
        (lambda: tm.transports.TwoLevelTransport(3, 2), "world must be the Transport of all ranks, got int"),
        (lambda: tm.transports.TwoLevelTransport(LocalTransport(), "2"), "can't be two or more nodes of node_size = 2"),
        (lambda: LocalTransport().exchange([1], [1], [1]), "rows must be a tensor, got list"),
        (lambda: LocalTransport().exchange_counts([1]), "counts must be a tensor, got list"),
        (lambda: tm.run_on_emulated_ranks(len, 2.5), "num_ranks must be a whole number, got 2.5"),
        (lambda: tm.run_on_emulated_ranks(len, "2"), "num_ranks must be a whole number, got '2'"),
        (lambda: tm.run_on_emulated_ranks(None, 2), "fn must be a function of a transport, got None"),
        (lambda: tm.run_on_emulated_ranks(len, 2, link=50), "link must be a LinkModel or None, got 50"),
        (lambda: tm.run_on_emulated_ranks(len, 2, faults=tm.transports.Death(0, 0)), "faults must be a list of Delay"),
        (lambda: tm.run_on_emulated_ranks(len, 2, timeout_s=None), "timeout_s must be a number of seconds, got None"),
    ],
)
def test_settings(make: Callable[[], object], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make()


# The layer


CONFIG = tm.MoEConfig(8, 4, 8, 2)


def test_layer_input() -> None:
    layer = tm.MoELayer(CONFIG)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., D\) with D = 8, got \(3, 9\)"):
        layer(torch.ones(3, 9))
    with pytest.raises(RuntimeError, match="no statistics before the first forward"):
        layer.statistics()
    for wrong, match in (
        (None, "x must be a tensor, got NoneType"),
        (torch.tensor(1.0), r"x must be \(\.\.\., D\) with D = 8, got \(\)"),
        (torch.ones(3, 8, dtype=torch.int64), "the router takes a floating-point tensor, got torch.int64"),
        (torch.ones(3, 8, device="meta"), "x is on meta and the router on cpu: move them to one device"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            layer(wrong)
    with pytest.raises(TypeError, match="fillers must be a list of functions"):
        layer(torch.ones(3, 8), fillers=3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"transport": 3}, "must be a Transport, a ProcessGroup or a DeviceMesh, got <class 'int'>"),
        ({"config": {"hidden_size": 8}}, "config must be a MoEConfig, got {'hidden_size': 8}: use"),
        ({"overlap": 0}, "overlap must be an OverlapConfig or an OverlapPlan, got 0"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_layer_settings(changes: dict, match: str) -> None:
    for kind in (tm.MoELayer, tm.GroupedExperts):
        with pytest.raises((TypeError, ValueError), match=match):
            kind(**{"config": CONFIG, **changes})


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_scores_that_are_not_finite_on_one_device(value: float) -> None:
    """The step itself reads nothing; the next call says it, once."""
    layer = tm.MoELayer(CONFIG)
    x = torch.ones(5, 8)
    x[[1, 3]] = value
    out = layer(x)
    assert (out[[1, 3]] == 0).all()
    assert out.isfinite().all()
    with pytest.raises(tm.NonFiniteScores, match="scores of 2 tokens were NaN or infinite in an earlier forward"):
        layer(torch.ones(5, 8))
    layer(torch.ones(5, 8))
    layer(torch.ones(5, 8))


def test_scores_that_are_not_finite_are_heard_late() -> None:
    """The host may read after further calls, on a device that is behind; a recompute counts nothing."""
    check, ids = NonFiniteCheck("next"), torch.zeros(4, 2, dtype=torch.int64)
    for count in (0, 2, 3, 0):
        with torch.inference_mode(count == 0):
            check.look(ids, torch.tensor(count))
    with pytest.raises(tm.NonFiniteScores, match="scores of 5 tokens"):
        check.raise_earlier()
    check.look(ids, torch.tensor(0))
    check.raise_earlier()
    of_another_device = check._counters[torch.device("meta")] = _Counter(torch.tensor(0))  # a copy of DataParallel's
    of_another_device.add(torch.tensor(1))
    check.look(ids, torch.tensor(1))
    with pytest.raises(tm.NonFiniteScores, match="scores of 2 tokens"):
        check.raise_earlier()
    layer = tm.MoELayer(CONFIG)
    x = torch.ones(5, 8).index_fill(0, torch.tensor([1]), float("nan")).requires_grad_()
    checkpoint(layer, x, use_reentrant=False)[0].sum().backward()
    with pytest.raises(tm.NonFiniteScores, match="scores of 1 tokens"):
        layer(torch.ones(5, 8))


@pytest.mark.parametrize("way", ["eager", "compiled", "exported", "mode"])
def test_scores_that_are_not_finite_in_the_call_itself(way: str) -> None:
    layer = tm.MoELayer(CONFIG, check="now")
    good, bad = torch.randn(5, 8), torch.ones(5, 8)
    bad[[1, 3]] = float("nan")
    calls = {
        "compiled": lambda: torch.compile(layer, fullgraph=True, backend="aot_eager"),
        "exported": lambda: torch.export.export(layer, (good,)).module(),
    }
    call = calls.get(way, lambda: layer)()
    with FlopCounterMode(display=False) if way == "mode" else nullcontext():
        for grad_enabled in (True, False) if way != "exported" else (True,):
            with torch.set_grad_enabled(grad_enabled), pytest.raises(tm.NonFiniteScores, match="2 tokens are NaN or"):
                call(bad)
            with torch.set_grad_enabled(grad_enabled):
                y = call(good)
    assert torch.equal(y, layer(good))  # and it is not said a second time
    if way == "compiled":
        call(good).sum().backward()
        actual = layer.experts.down_proj.grad
        layer.zero_grad()
        layer(good).sum().backward()
        assert torch.equal(actual, layer.experts.down_proj.grad)


@pytest.mark.parametrize("value", [True, None, "later"])
def test_when_to_check_scores(value: object) -> None:
    with pytest.raises(ValueError, match="check must be 'next' or 'now', got"):
        tm.MoELayer(CONFIG, check=value)


def test_inputs_that_are_not_dense() -> None:
    layer = tm.MoELayer(CONFIG)
    x = torch.ones(3, 8)
    for value in (x.to_sparse(), torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)):
        with pytest.raises(TypeError, match=r"x must be a dense tensor, got a .* one: pass its tokens as one \(T, D\)"):
            layer(value)


def test_a_shared_expert_of_another_dtype() -> None:
    layer = tm.MoELayer(replace(CONFIG, shared_intermediate_size=4)).half()
    with pytest.raises(TypeError, match=r"shared expert is torch\.float16 and x is torch\.float32: cast one"):
        layer(torch.ones(3, 8))


@pytest.mark.parametrize("transport", [None, LocalTransport()], ids=["one_device", "expert_parallel"])
def test_jit_trace_is_refused(transport: Transport | None) -> None:
    """It would keep the routing of the tokens that it was shown."""
    layer = tm.MoELayer(CONFIG, transport)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace can't record experts.*torch\.export"):
        torch.jit.trace(layer, (torch.ones(3, 8),), check_trace=False)


def test_scores_that_are_not_finite_on_one_rank() -> None:
    def fn(transport: Transport) -> None:
        layer = tm.MoELayer(CONFIG, transport, generator=torch.Generator().manual_seed(0))
        x = torch.ones(5, 8)
        if transport.rank == 0:
            x[2, 3] = float("nan")
        with pytest.raises(tm.NonFiniteScores, match=r"\(rank 0: 1\)"):
            layer(x)
        layer(torch.ones(5, 8)).sum().backward()

    assert errors_of(fn) == [None, None]


def test_layer_input_of_one_rank() -> None:
    """A shape that the layer itself refuses: the other ranks hear of it and the next call works."""

    def fn(transport: Transport) -> None:
        layer = tm.MoELayer(CONFIG, transport, generator=torch.Generator().manual_seed(0))
        with pytest.raises((ValueError, tm.TransportError)):
            layer(torch.ones(3, 9 if transport.rank == 1 else 8))
        layer(torch.ones(3, 8)).sum().backward()

    assert errors_of(fn) == [None, None]
