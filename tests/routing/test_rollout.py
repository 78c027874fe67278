"""RoutingRecording.from_rollout: what engines return, in every form, is one recording; what doesn't fit is said."""

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonmoe.routing import RoutingRecording


def rows_of(num_rows: int, num_layers: int = 2, num_experts: int = 8, top_k: int = 2, seed: int = 0) -> Tensor:
    """Return (rows, layers, K) int16 ids, as a router might have chosen them."""
    scores = torch.rand(num_rows, num_layers, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k, dim=2).indices.to(torch.int16)


def recorded(rows: Tensor, num_experts: int = 8) -> RoutingRecording:
    """Return the recording of one call with these rows (T, layers, K)."""
    recording = RoutingRecording()
    for name, ids in zip(("a", "b"), rows.unbind(1), strict=False):
        recording.add(name, ids, num_experts)
    return recording


def npy(rows: Tensor) -> str:
    content = io.BytesIO()
    np.save(content, rows.numpy())
    return base64.b64encode(content.getvalue()).decode()


def int32(rows: Tensor) -> str:
    return base64.b64encode(rows.numpy().astype("<i4").tobytes()).decode()


def read_only(rows: Tensor) -> np.ndarray:
    array = rows.numpy().copy()
    array.flags.writeable = False
    return array


FORMS = {"tensor": lambda rows: rows, "int64": Tensor.long, "array": read_only, "npy": npy, "int32": int32}
LIKE = recorded(rows_of(1))
LIKE_OF_64 = recorded(rows_of(1, num_experts=64, top_k=4), num_experts=64)


def assert_holds(recording: RoutingRecording, expected: dict[int, Tensor], num_tokens: int) -> None:
    """Check that just these tokens are recorded, with these (layers, K) ids."""
    assert recording.num_tokens == [num_tokens]
    for number, layer in enumerate(recording.layers.values()):
        is_recorded = torch.zeros(num_tokens, dtype=torch.bool)
        is_recorded[list(expected)] = True
        ids = layer.topk_ids  # which finds out whether all are recorded
        assert is_recorded.all() if layer.is_recorded is None else torch.equal(layer.is_recorded, is_recorded)
        for token, chosen in expected.items():
            assert ids[token].tolist() == chosen[number].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_padded_sequences_of_every_form(form):
    first, second, write = rows_of(3), rows_of(1, seed=1), FORMS[form]
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]])  # left, and on both sides
    recording = RoutingRecording.from_rollout([write(first), write(second)], mask, LIKE)
    assert mask.tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert list(recording.layers) == list(LIKE.layers)
    assert_holds(recording, {1: first[0], 2: first[1], 3: first[2], 6: second[0]}, 10)
    packed = recording.rearranged(recording.token_index(2)[mask.bool()])
    assert_holds(packed, {0: first[0], 1: first[1], 2: first[2], 4: second[0]}, 6)


@pytest.mark.parametrize("form", FORMS)
def test_the_default_device_has_no_part_in_it(form):
    rows, like = rows_of(20), recorded(rows_of(21))
    given = FORMS[form](rows)
    with torch.device("meta"):
        recording = RoutingRecording.from_rollout([given], torch.ones(1, 21, dtype=torch.bool, device="cpu"), like)
    assert_holds(recording, dict(enumerate(rows)), 21)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 5), max_size=3),
    forms=st.lists(st.sampled_from(sorted(FORMS)), min_size=4, max_size=4),
    dense=st.lists(st.booleans(), min_size=2, max_size=2),
    has_last=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_a_recording_comes_back(lengths, cuts, forms, dense, has_last, seed):
    """Whatever the padding, the pieces, their forms, the dense layers between, and the last rows."""
    width = max(sum(length) for length in lengths)
    mask, routed_experts, expected = torch.zeros(len(lengths), width, dtype=torch.bool), [], {}
    for number, (left, length, _) in enumerate(lengths):
        mask[number, left : left + length] = True
        num_rows = length if has_last else max(length - 1, 0)
        rows = rows_of(num_rows, seed=100 * seed + number)
        expected |= {number * width + left + token: rows[token] for token in range(num_rows)}
        between = torch.zeros(num_rows, 1, 2, dtype=torch.int16)
        first, second = rows.split(1, dim=1)
        whole = torch.cat([*[between] * dense[0], first, *[between] * dense[1], second], dim=1)
        bounds = [0, *sorted(min(cut, num_rows) for cut in cuts), num_rows]
        pieces = [whole[start:end] for start, end in pairwise(bounds)]
        routed_experts.append([FORMS[forms[place]](piece) for place, piece in enumerate(pieces)])
    has_experts = [*[False] * dense[0], True, *[False] * dense[1], True]
    recording = RoutingRecording.from_rollout(routed_experts, mask, LIKE, has_experts=has_experts, has_last=has_last)
    assert_holds(recording, expected, mask.numel())


def test_turns_and_answers_to_one_prompt():
    prompt, answers = rows_of(3), [rows_of(2, seed=1), rows_of(1, seed=2)]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    recording = RoutingRecording.from_rollout([[prompt, npy(answer)] for answer in answers], mask, LIKE)
    for number, answer in enumerate(answers):
        both = torch.cat([prompt, answer])
        assert recording.layers["b"].topk_ids[6 * number :][: len(both)].tolist() == both[:, 1].tolist()
    assert recording.layers["a"].is_recorded.tolist() == [True] * 5 + [False] + [True] * 4 + [False] * 2


def test_tokens_that_the_engine_has_no_ids_of():
    rows = rows_of(4)
    rows[2] = -1
    mask = torch.ones(1, 4, dtype=torch.bool)
    recording = RoutingRecording.from_rollout([rows], mask, LIKE, has_last=True)
    assert mask.all()
    assert_holds(recording, {token: rows[token] for token in (0, 1, 3)}, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_ids_of_many_experts_in_any_dtype(dtype):
    rows = torch.tensor([[[255, 0]], [[128, 127]]]).to(dtype)
    like = recorded(torch.tensor([[[0, 1]]]), num_experts=256)
    recording = RoutingRecording.from_rollout([rows], torch.tensor([[1, 1, 1]]), like)
    assert recording.layers["a"].topk_ids[:2].tolist() == [[255, 0], [128, 127]]


# What is refused

FOUR = torch.ones(1, 4, dtype=torch.bool)


def with_ids(rows: Tensor, token: int, ids: list[int]) -> Tensor:
    rows[token, 0] = torch.tensor(ids)
    return rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda rows: rows[1:], r"4 tokens in token_mask, and must have 3 rows .*none for its last.*, got 2: .*no gap"),
        (lambda rows: torch.cat([rows[:1], rows]), r"must have 3 rows .*, got 4: has_last=True where"),
        (lambda rows: torch.cat([rows, rows]), r"must have 3 rows .*, got 6: .*none twice"),
        (
            lambda rows: with_ids(rows, 1, [0, 8]),
            r"in \[0, 8\): token 1 of sequence 0 has \[0, 8\] in a; they are logic",
        ),
        (lambda rows: with_ids(rows, 0, [-1, -1]), r"in \[0, 8\): token 0 of sequence 0 has \[-1, -1\] in a; .*in all"),
        (lambda rows: with_ids(rows, 2, [0, 0]), r"2 experts of a token must differ: token 2 .* has \[0, 0\] in a"),
    ],
    ids=["fewer", "last", "twice", "outside", "half", "zeros"],
)
def test_rows_that_are_misaligned(form, change, rule):
    with pytest.raises(ValueError, match=rule):
        RoutingRecording.from_rollout([FORMS[form](change(rows_of(3)))], FOUR, LIKE)


@pytest.mark.parametrize("form", ["tensor", "array", "npy"])
@pytest.mark.parametrize(("num_layers", "top_k"), [(3, 2), (1, 2), (2, 3), (2, 1)])
def test_layers_and_k_that_the_model_has_not(form, num_layers, top_k):
    rows = rows_of(3, num_layers, top_k=top_k)
    with pytest.raises(ValueError, match=rf"\(rows, 2, 2\), as `like` has them, got \(3, {num_layers}, {top_k}\)"):
        RoutingRecording.from_rollout([FORMS[form](rows)], FOUR, LIKE)


def test_dense_layers_that_are_taken_for_others():
    rows = torch.cat([torch.zeros(3, 1, 2, dtype=torch.int16), rows_of(3)], dim=1)
    with pytest.raises(ValueError, match=r"must differ: token 0 of sequence 0 has \[0, 0\] in a; .*has_experts"):
        RoutingRecording.from_rollout([rows], FOUR, LIKE, has_experts=[True, True, False])
    with pytest.raises(ValueError, match="true once for each of the 2 layers in `like`, and is 1 times"):
        RoutingRecording.from_rollout([rows], FOUR, LIKE, has_experts=[False, False, True])


@pytest.mark.parametrize("where", ["before", "after"])
def test_rows_shifted_by_one_that_are_as_many(where):
    """A model's own choice for the same tokens tells them, though it differs in some."""
    own = rows_of(40, num_experts=64, top_k=4)
    given = own[:39].clone()
    given[::8] = rows_of(39, num_experts=64, top_k=4, seed=1)[::8]
    mask, like = torch.ones(1, 40, dtype=torch.bool), recorded(own, num_experts=64)
    aligned = RoutingRecording.from_rollout([given], mask, like)
    assert min(aligned.agreement(like).values()) > 0.85
    shifted = given.roll(1 if where == "before" else -1, 0)
    with pytest.raises(ValueError, match=rf"(\d)% of the ids are those .* (\d\d)% those of the token {where}, so"):
        RoutingRecording.from_rollout([shifted], mask, like)
    other = recorded(rows_of(40, num_experts=64, top_k=4, seed=2), num_experts=64)
    for unrelated in (other, LIKE_OF_64):  # which tell nothing
        RoutingRecording.from_rollout([shifted], mask, unrelated)


def test_a_last_row_that_is_not_there():
    with pytest.raises(ValueError, match=r"must have 4 rows .*one for each.*, got 3: has_last=False where"):
        RoutingRecording.from_rollout([rows_of(3)], FOUR, LIKE, has_last=True)


def test_damaged_texts():
    for text, rule in (
        ("no base64!", "and is damaged"),
        (npy(rows_of(3))[:80], "and is damaged"),
        (
            base64.b64encode(bytes(40)).decode(),
            r"40 bytes without a header of npy.*2 layers with 2 int32 ids, 16 bytes",
        ),
        (base64.b64encode(np.lib.format.magic(1, 0)).decode(), "and is damaged"),
    ):
        with pytest.raises(ValueError, match=rf"routed_experts\[0\].*{rule}"):
            RoutingRecording.from_rollout([text], FOUR, LIKE)
    content = io.BytesIO()
    np.save(content, np.array([{}]), allow_pickle=True)  # nothing that is pickled is read
    with pytest.raises(ValueError, match="and is damaged"):
        RoutingRecording.from_rollout([base64.b64encode(content.getvalue()).decode()], FOUR, LIKE)


def test_an_npy_file_in_columns_or_of_a_later_version() -> None:
    rows = rows_of(3)
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asfortranarray(rows.numpy()), version=(2, 0))
    recording = RoutingRecording.from_rollout([base64.b64encode(content.getvalue()).decode()], FOUR, LIKE)
    assert_holds(recording, dict(enumerate(rows)), 4)


def test_other_arguments_that_do_not_fit():
    rows = rows_of(3)
    with pytest.raises(ValueError, match="one entry for each sequence of token_mask, got 2 for 1 sequences"):
        RoutingRecording.from_rollout([rows, rows], FOUR, LIKE)
    with pytest.raises(ValueError, match="one entry for each sequence of token_mask, got one text"):
        RoutingRecording.from_rollout(npy(rows), FOUR, LIKE)
    with pytest.raises(TypeError, match=r"routed_experts\[0\] must be integers, got torch\.float32"):
        RoutingRecording.from_rollout([rows.float()], FOUR, LIKE)
    with pytest.raises(TypeError, match=r"routed_experts\[0\] must be a tensor, got list: torch\.as_tensor"):
        RoutingRecording.from_rollout([rows.tolist()], FOUR, LIKE)
    with pytest.raises(TypeError, match=r"bool or of integers 0 and 1, got torch\.float32"):
        RoutingRecording.from_rollout([rows], FOUR.float(), LIKE)
    with pytest.raises(ValueError, match=r"must be \(B, S\) of 0 and 1, .*, got \(4,\)"):
        RoutingRecording.from_rollout([rows], FOUR[0], LIKE)
    with pytest.raises(ValueError, match=r"got \(1, 4\) with values to 2"):
        RoutingRecording.from_rollout([rows], 2 * FOUR.long(), LIKE)
    with pytest.raises(TypeError, match="like must be a RoutingRecording, as record_routing"):
        RoutingRecording.from_rollout([rows], FOUR, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="the recording is empty"):
        RoutingRecording.from_rollout([rows], FOUR, RoutingRecording())
    several = recorded(rows_of(1, 1))
    several.add("b", torch.tensor([[0, 1, 2]]), 8)
    with pytest.raises(ValueError, match=r"one K, and the layers in `like` have several, \[2, 3\]"):
        RoutingRecording.from_rollout([rows], FOUR, several)
