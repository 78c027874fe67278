"""S_ik, the plan of a call and its agreement, against sets built token by token."""

import functools
import itertools
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.overlap import OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.dispatch import header_check
from tritonmoe.dispatch.call_settings import CallSettings, decode_settings, plan_settings
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.header_check import check_headers
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import plan_tokens
from tritonmoe.experts.spec import ExpertSpec
from tritonmoe.transports import PendingExchange, Transport


def owners(row: list[int], num_experts: int, size: int) -> list[int]:
    return [e // (num_experts // size) for e in row if 0 <= e < num_experts]


def s_ik(ids: list[list[int]], num_experts: int, size: int) -> list[set[int]]:
    """The tokens that need any expert of each rank."""
    return [{t for t, row in enumerate(ids) if k in owners(row, num_experts, size)} for k in range(size)]


def header(overlap: OverlapPlan | None = None, num_experts: int = 4, top_k: int = 2, **changes: int) -> CallHeader:
    settings = CallSettings((("activation", "silu"), *plan_settings(overlap or OverlapPlan())))
    common = CallHeader(settings=settings, num_experts=num_experts, top_k=top_k, hidden_size=8, grad_enabled=1)
    return common._replace(**changes)


def with_terms(**changed: object) -> CallHeader:
    """A header of a call of which one or more settings are others."""
    return header(settings=CallSettings({**header().settings.words, **changed}.items()))


def check(headers: Sequence[CallHeader]) -> None:
    """Compare headers as they have come; nothing else has to travel."""
    arrived = [CallHeader._make(one.sealed()) for one in headers]
    check_headers(arrived, lambda: [one.settings.words for one in headers])


def test_worked_example() -> None:
    """The one in the docstring of dispatch/send_plan.py."""
    tokens = plan_tokens(torch.tensor([[0, 1], [1, 3]]), 4, 0, 2, OverlapPlan())
    assert tokens.home_tokens.tolist() == [0, 1, 1]
    assert tokens.home_index.tolist() == [[0, -1], [1, 2]]
    assert tokens.home_ranks.tolist() == [0, 0, 1]
    assert tokens.rows == [[1, 0], [1, 0], [0, 1]]
    assert tokens.pairs == [[2, 0], [1, 0], [0, 1]]
    assert tokens.token_bounds == (0, 2)


def test_two_chunks_without_local_first() -> None:
    """W=2, E=2. Tokens: both ranks | rank 1 twice || rank 0 | nowhere; storage is by (chunk, rank, token)."""
    tokens = plan_tokens(
        torch.tensor([[0, 1], [1, 1], [0, -1], [2, -1]]), 2, 1, 2, OverlapPlan((1, 1), local_first=False)
    )
    assert tokens.token_bounds == (0, 2, 4)
    assert tokens.home_tokens.tolist() == [0, 0, 1, 2]
    assert tokens.home_ranks.tolist() == [0, 1, 1, 0]
    assert tokens.home_index.tolist() == [[0, 1], [-1, 2], [3, -1], [-1, -1]]
    assert tokens.rows == [[1, 2], [1, 0]]
    assert tokens.pairs == [[1, 3], [1, 0]]


@st.composite
def routings(draw):
    """Ids of every rank, uneven, some ranks without tokens."""
    size = draw(st.integers(1, 4))
    num_experts, top_k = size * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 7), min_size=size, max_size=size))
    rows = st.lists(st.integers(-1, num_experts), min_size=top_k, max_size=top_k)
    ids = [draw(st.lists(rows, min_size=count, max_size=count)) for count in counts]
    num_chunks = draw(st.integers(1, 6))
    sizes = draw(
        st.sampled_from([equal_sizes(num_chunks), ramp_sizes(num_chunks)])
        | st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple)
    )
    return ids, num_experts, size, top_k, OverlapPlan(sizes, draw(st.booleans()), draw(st.integers(0, 16)))


def as_ids(rows: list[list[int]], top_k: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), top_k)


@settings(max_examples=100, deadline=None)
@given(drawn=routings())
def test_tokens_of_any_routing(drawn) -> None:
    ids, num_experts, size, top_k, overlap = drawn
    num_chunks, local_first = overlap.num_chunks, overlap.local_first
    for rank, rows in enumerate(ids):
        plan = plan_tokens(as_ids(rows, top_k), num_experts, rank, size, overlap)
        sets = s_ik(rows, num_experts, size)
        bounds = plan.token_bounds
        assert (bounds[0], bounds[-1], len(bounds)) == (0, len(rows), num_chunks + 1)
        total = sum(overlap.chunk_sizes)
        for (first, last), share in zip(pairwise(bounds), overlap.chunk_sizes, strict=True):
            assert abs((last - first) - len(rows) * share / total) < 1
        num_first = len(rows) * overlap.local_start // 16
        chunk_of = [next(c for c in range(num_chunks) if bounds[c] <= t < bounds[c + 1]) for t in range(len(rows))]

        def segment(token: int, to: int, rank=rank, chunk_of=chunk_of, num_first=num_first) -> int:
            if local_first:
                return int(token >= num_first) if to == rank else chunk_of[token] + 2
            return chunk_of[token]

        # A token stands once for each rank that needs it, in order of (segment, rank, token).
        home = sorted((segment(t, k), k, t) for k in range(size) for t in sets[k])
        assert list(zip(plan.home_ranks.tolist(), plan.home_tokens.tolist(), strict=True)) == [
            (k, t) for _, k, t in home
        ]
        places = [[home.index((segment(t, k), k, t)) for k in range(size) if t in sets[k]] for t in range(len(rows))]
        assert plan.home_index.shape == (len(rows), min(size, top_k))
        assert [[place for place in row if place >= 0] for row in plan.home_index.tolist()] == places
        for s in range(num_chunks + 2 * local_first):
            assert plan.rows[s] == [sum((h[0], h[1]) == (s, k) for h in home) for k in range(size)]
            assert plan.pairs[s] == [
                sum(owners(rows[t], num_experts, size).count(k) for seg, to, t in home if (seg, to) == (s, k))
                for k in range(size)
            ]


@settings(max_examples=25, deadline=None)
@given(drawn=routings())
def test_plans_of_any_routing(drawn) -> None:
    """What one rank sends is what the other expects; orders of whole-layer exchanges are inverse to storage."""
    ids, num_experts, size, top_k, overlap = drawn
    num_chunks, local_first = overlap.num_chunks, overlap.local_first

    def on_rank(transport: Transport) -> DispatchPlan:
        own = as_ids(ids[transport.rank], top_k)
        tokens = plan_tokens(own, num_experts, transport.rank, size, overlap)
        return exchange_plan(transport, header(overlap, num_experts, top_k), tokens, overlap)

    plans = tm.run_on_emulated_ranks(on_rank, size, timeout_s=10)
    traffic = [[len(tokens) for tokens in s_ik(rows, num_experts, size)] for rows in ids]
    for k, plan in enumerate(plans):
        assert plan.traffic.tolist() == traffic
        assert plan.num_home == sum(traffic[k])
        assert plan.num_received == sum(row[k] for row in traffic)
        assert plan.pair_offsets[-1] == sum(owners(row, num_experts, size).count(k) for rows in ids for row in rows)
        assert plan.num_local == (traffic[k][k] if local_first else 0)
        for c in range(num_chunks):
            segment = plan.segment(c)
            sent, received = plan.tokens.rows[segment], plan.receive_rows[segment]
            assert received == [plans[i].tokens.rows[segment][k] for i in range(size)]
            for slices, splits in ((plan.home_slice(c), sent), (plan.receive_slice(c), received)):
                assert slices.stop - slices.start == sum(splits)
        assert plan.all_receive_splits == [plans[i].all_send_splits[k] for i in range(size)]
        sources = plan.row_sources().of_rows(torch.device("cpu")).tolist()
        assert [sources.count(i) for i in range(size)] == [row[k] for row in traffic]
        places = plan.place_received(as_ids([], top_k))
        for orders, ranks in (
            ((plan.send_order(), plan.home_order()), plan.tokens.home_ranks.tolist()),
            ((*places, plan.return_order()), sources),
        ):
            by_rank = sorted(range(plan.num_local, len(ranks)), key=lambda row, ranks=ranks: (ranks[row], row))
            assert all(order.tolist() == by_rank for order in orders)


def row_splits_sent(overlap: OverlapPlan | tm.OverlapConfig) -> tuple[list[Tensor], list[list[list[int]]]]:
    """Run forward and backward on two ranks; give each rank's ids, and its input splits of every exchange of rows.

    Tokens of rank 0 need experts {0, 1, 2, 3}, {2, 3}, {0, 1} and none; of rank 1 {0, 1}.
    """
    num_experts, hidden = 4, 3
    sent: list[list[list[int]]] = [[], []]
    ids = [torch.tensor([[0, 1, 2, 3], [2, 3, 2, 3], [0, 0, 1, 1], [-1, 4, -1, 4]]), torch.tensor([[1, 1, 1, 0]])]
    w1, w2 = torch.ones(num_experts, 2 * hidden, hidden), torch.ones(num_experts, hidden, hidden)

    def on_rank(transport: Transport) -> None:
        rank, exchange = transport.rank, transport.exchange

        def recorded(rows: Tensor, input_splits, output_splits, out=None):
            if rows.dtype == torch.float32 and rows.shape[1] == hidden:
                sent[rank].append(list(input_splits))
            return exchange(rows, input_splits, output_splits, out)

        transport.exchange = recorded
        x = torch.ones(len(ids[rank]), hidden, requires_grad=True)
        mine = slice(2 * rank, 2 * rank + 2)
        options = {"num_experts": num_experts, "transport": transport, "overlap": overlap}
        out = tm.expert_parallel_mlp(x, ids[rank], torch.ones(ids[rank].shape), w1[mine], w2[mine], **options)
        out.sum().backward()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=10)
    return ids, sent


@pytest.mark.parametrize("local_first", [True, False], ids=["local_first", "all_travel"])
def test_a_token_travels_once_to_a_rank(local_first: bool) -> None:
    """Count the rows of D columns that a call really sends: |S_ik| there, |S_ik| back, whatever K."""
    ids, sent = row_splits_sent(tm.OverlapConfig(2, local_first))
    traffic = torch.tensor([[len(tokens) for tokens in s_ik(rows.tolist(), 4, 2)] for rows in ids])
    assert traffic.tolist() == [[2, 2], [1, 0]]
    if local_first:
        traffic.fill_diagonal_(0)
    # Dispatch, combine, and the same two in backward; in and out of a rank differ.
    for rank in range(2):
        total = torch.tensor(sent[rank]).sum(0)
        assert torch.equal(total, 2 * traffic[rank] + 2 * traffic[:, rank])


COMPARED = {name: one for one in (*header_check.SAME_CALL, *header_check.SAME_GRADIENTS) for name in one.fields}


@pytest.mark.parametrize("name", COMPARED)
def test_headers_must_agree(name: str) -> None:
    """In words for all that a user knows: rank 2 says something else than the others."""
    headers = [header(), header(), header()._replace(**{name: 1 + getattr(header(), name)})]
    label = re.escape(COMPARED[name].label)
    with pytest.raises(tm.CountMismatch, match=rf"disagree on {label} \(rank 0: (.*), rank 1: \1, rank 2: "):
        check(headers)


@pytest.mark.parametrize("name", ["num_chunks", "chunk_sizes", "wire_dtype", "dropout", "a_new_option"])
def test_terms_must_agree(name: str) -> None:
    """Whatever they are: no table has their names."""
    before = header().settings.words.get(name, "unknown")
    words = re.escape(f"{header_check.LABELS.get(name, name)}")
    with pytest.raises(tm.CountMismatch, match=rf"disagree on {words}.* \(rank 0: {re.escape(before)}, rank 1: 7\): "):
        check([header(), with_terms(**{name: 7})])


def test_terms_travel_as_one_number_that_every_process_makes_alike() -> None:
    settings = CallSettings([("activation", "silu"), ("gated", True)])
    assert CallHeader._make(header(settings=settings).sealed()).settings == 7695885152892547852 < 2**63
    assert decode_settings(settings.text + b"  ") == settings.words
    assert decode_settings(settings.text[:-3]) is decode_settings(b"\xff") is decode_settings(b"7") is None


def test_long_values_are_cut() -> None:
    first, second = (CallSettings([("placement", "1" * 500 + last)]).words["placement"] for last in "12")
    assert first != second
    assert len(first) < 200


def test_only_ranks_that_differ_ask_for_words() -> None:
    """What the others know to be damaged they don't ask for either: they would wait for each other."""

    def ask() -> NoReturn:
        raise AssertionError

    check_headers([header(), header()], ask)
    there = CallHeader._make(with_terms(activation="relu").sealed())
    sent = CallHeader._make(header().sealed())
    assert not sent.is_damaged
    with pytest.raises(tm.CountMismatch, match=r"^the headers of ranks \[1\] were damaged on their way$"):
        check_headers([sent, sent._replace(settings=int(sent.settings) ^ 4)], ask)
    with pytest.raises(tm.CountMismatch, match=r"^the headers of ranks \[0\] were damaged on their way$"):
        check_headers([there._replace(hidden_size=7), sent], ask)


@pytest.mark.parametrize("at", [1, 2])
def test_ranks_hear_of_one_that_fails_before_its_words(at: int) -> None:
    """In the exchange of the lengths, or in that of the texts."""
    heard: list[str] = []

    def on_rank(transport: Transport) -> None:
        post_counts, numbers = transport.post_counts, itertools.count()

        def failing(counts: Tensor) -> PendingExchange:
            if transport.rank == 1 and next(numbers) == at:
                raise OSError("the disk is full")
            return post_counts(counts)

        transport.post_counts = failing
        overlap = OverlapPlan((1,) * (1 + transport.rank))
        tokens = plan_tokens(as_ids([[0, 3]], 2), 4, transport.rank, 2, overlap)
        try:
            exchange_plan(transport, header(overlap), tokens, overlap)
        except tm.TransportError as error:
            heard.append(str(error))
            raise

    with pytest.raises(OSError, match="the disk is full"):
        tm.run_on_emulated_ranks(on_rank, 2, timeout_s=10)
    assert re.search("^the ranks' configurations differ, and the exchange .* failed: .*rank 1", heard[0]), heard


def test_the_words_of_activations() -> None:
    def a_callable_with_a_name(h: Tensor) -> Tensor:
        return h

    words = {
        "relu2": "relu2",
        "ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0)": tm.ClampedSwiGLU(7.0, 1.702, 1.0),
        "ClampedSwiGLU(7.0, alpha=-1.0, up_offset=0.0)": tm.ClampedSwiGLU(7, -1, -0.0),
        "the callable silu": torch.nn.functional.silu,
        "the callable GELU": torch.nn.GELU(),
        "the callable header": functools.partial(header),
        "the callable test_the_words_of_activations.<locals>.a_callable_with_a_name": a_callable_with_a_name,
    }
    for said, activation in words.items():
        assert dict(ExpertSpec(activation=activation).agreed)["activation"] == said


def test_what_of_a_spec_ranks_must_say_alike() -> None:
    """All of it that a field doesn't exclude, so that a new one is compared too."""
    names = [name for name, _ in ExpertSpec().agreed]
    assert names == ["gated", "interleaved", "transposed", "activation", "expert_precision", "dropout", "adapters"]


def test_headers_of_other_calls() -> None:
    """Where each rank is, and what may have made them part."""
    order = "every rank must make the same layers and the same calls"
    here, there = header(layer=1, sequence=4), header(layer=0, sequence=3, is_backward=1)
    match = r"rank 0: forward of layer 1, call 4; rank 1: backward of layer 0, call 3\): " + order
    with pytest.raises(tm.CountMismatch, match=match):
        check([here, there])
    with pytest.raises(tm.CountMismatch, match="rank 1: forward of expert_parallel_mlp, call 4"):
        check([here, header(sequence=4)])
    with pytest.raises(tm.CountMismatch, match="backward of layer 0, call 3; rank 1: forward of layer 0, call 3"):
        check([there, there._replace(is_backward=0)])
    fewer = there._replace(layers_made=2, layers_alive=1)
    match = (
        r"made or freed on some ranks alone .* rank 0 has made 3, of which 3 live; rank 1 has made 2, of which 1 live"
        r"\)\. Make the same layers on every rank, in the same order$"
    )
    with pytest.raises(tm.CountMismatch, match=match):
        check([here._replace(layers_made=3, layers_alive=3), fewer])
    check([there, fewer])  # another layer has been made, and may be called later


def test_headers_that_stop_a_call() -> None:
    check([header(), header(vote=3, needs_any=1)])
    with pytest.raises(tm.CountMismatch, match=r"ranks \[1\] sent something that is not a layer call"):
        check([header(), header(magic=5)])
    with pytest.raises(tm.TransportError, match=r"ranks \[0\] refused the arguments"):
        check([header(error=1), header()])
    with pytest.raises(tm.NonFiniteScores, match="rank 1: 3"):
        check([header(), header(nonfinite_rows=3)])
    with pytest.raises(tm.CountMismatch, match=r"ranks \[1\] run under torch.no_grad"):
        check([header(needs_any=1), header(grad_enabled=0)])


def test_headers_of_other_kinds_of_calls() -> None:
    """They may differ; where plans that were chosen for them do, the error says what the cause is."""
    check([header(auto=1), header(auto=1, save=1, deterministic=1, grad_enabled=0)])
    other = {"save": 1, "deterministic": 1}
    words = (
        "save is hidden on ranks [0, 1], input on ranks [2]; "
        "torch.use_deterministic_algorithms is not set on ranks [0, 1], set on ranks [2]. Make it the same"
    )
    with pytest.raises(tm.CountMismatch, match=re.escape(words)):
        check([header(auto=1), header(auto=1), with_terms(window=7)._replace(auto=1, **other)])
    for headers in (
        [header(), with_terms(window=7)._replace(**other)],
        [header(auto=1), with_terms(serial=True)._replace(auto=1, **other)],
    ):
        with pytest.raises(tm.CountMismatch, match=r"rank 1: (7|True)\): give every rank the same configuration"):
            check(headers)


def test_the_call_is_compared_before_its_plan() -> None:
    with pytest.raises(tm.CountMismatch, match="disagree on top_k of"):
        check([header(), with_terms(num_chunks=5)._replace(top_k=1)])
    with pytest.raises(tm.CountMismatch, match="disagree on which call this is"):
        check([header(), header(layer=1, top_k=5)])


def test_an_error_is_reported_before_a_mismatch() -> None:
    """A rank that refuses its arguments sends an empty header: that is not a disagreement."""
    with pytest.raises(tm.TransportError, match="refused") as caught:
        check([header(), header(error=1, num_experts=0)])
    assert not isinstance(caught.value, tm.CountMismatch)
