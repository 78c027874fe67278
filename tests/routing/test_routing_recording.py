"""RoutingRecording: compact, laid out anew, compared, saved; what doesn't fit is said."""

import pytest
import torch

from tritonmoe.routing import RoutingRecording


def record(*calls: list, num_experts: int = 8, layer: str = "a", weights: bool = False) -> RoutingRecording:
    recording = RoutingRecording()
    for call in calls:
        ids = torch.tensor(call)
        recording.add(layer, ids, num_experts, ids / 10 if weights else None)
    return recording


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(8, torch.uint8), (256, torch.uint8), (257, torch.int16), (1024, torch.int16)]
)
def test_ids_take_the_smallest_dtype(num_experts, dtype):
    recording = record([[0, num_experts - 1]], [[1, 2], [3, 4]], num_experts=num_experts)
    ids = recording.layers["a"].topk_ids
    assert ids.dtype == dtype
    assert ids.tolist() == [[0, num_experts - 1], [1, 2], [3, 4]]
    assert recording.num_tokens == [1, 2]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_ids_and_indices_of_any_integer_dtype(dtype):
    """Engines give what holds their ids in the fewest bytes."""
    integers = getattr(torch, dtype)
    recording = RoutingRecording()
    for ids in ([[0, 1], [2, 3]], [[7, 0]]):
        recording.add("a", torch.tensor(ids).to(integers), 8)
    assert recording.layers["a"].topk_ids.tolist() == [[0, 1], [2, 3], [7, 0]]
    rearranged = recording.rearranged(torch.tensor([2, 0]).to(integers), torch.tensor([-1, 1]))
    assert rearranged.layers["a"].topk_ids[[0, 1, 3]].tolist() == [[7, 0], [0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(128, torch.int8), (200, torch.int8), (256, torch.int8), (256, torch.uint8), (32768, torch.int16)],
)
def test_ids_of_a_dtype_that_their_number_does_not_fit(num_experts, dtype, tmp_path):
    """E is one more than the largest id: in the ids' own dtype it may wrap, to 0 or below."""
    largest = min(num_experts - 1, torch.iinfo(dtype).max)
    recording, ids = RoutingRecording(), [[0, 1], [2, largest]]
    recording.add("a", torch.tensor(ids, dtype=dtype), num_experts)
    assert recording.layers["a"].topk_ids.tolist() == ids
    recording.save(tmp_path / "routing.pt")
    again = RoutingRecording.load(tmp_path / "routing.pt")
    assert again.layers["a"].topk_ids.tolist() == ids
    assert again.agreement(recording) == {"a": 1.0}
    if dtype.is_signed:
        recording.add("a", torch.tensor([[0, -1]], dtype=dtype), num_experts)
        with pytest.raises(ValueError, match="and some are outside"):
            _ = recording.layers["a"].topk_ids


def test_many_calls_are_kept_in_their_order():
    recording, expected = RoutingRecording(), []
    for call in range(700):
        ids = [[call % 8, token] for token in range(call % 3)]
        recording.add("a", torch.tensor(ids, dtype=torch.int64).view(-1, 2), 8)
        expected += ids
        if call == 400:
            assert recording.layers["a"].topk_ids.tolist() == expected
    assert recording.layers["a"].topk_ids.tolist() == expected
    assert recording.num_tokens == [call % 3 for call in range(700)]


def test_a_recording_is_a_copy():
    ids = torch.tensor([[0, 1]], dtype=torch.uint8)
    recording = RoutingRecording()
    recording.add("a", ids, 4)
    ids.fill_(3)
    assert recording.layers["a"].topk_ids.tolist() == [[0, 1]]


def test_the_tokens_of_generate_are_laid_out_anew():
    # two prompts of two tokens, the second padded on the left, and one new token each
    recording = record([[0, 1], [1, 2], [7, 7], [2, 3]], [[4, 5], [5, 6]], weights=True)
    index = recording.token_index(2)
    assert index.tolist() == [[0, 1, 4], [2, 3, 5]]
    padded = recording.rearranged(torch.tensor([[0, 1, 4], [3, 5, -1]]))
    layer = padded.layers["a"]
    assert padded.num_tokens == [6]
    assert layer.topk_ids[:5].tolist() == [[0, 1], [1, 2], [4, 5], [2, 3], [5, 6]]
    assert layer.is_recorded.tolist() == [True] * 5 + [False]
    assert torch.equal(layer.topk_weights[:5], layer.topk_ids[:5] / 10)
    assert layer.topk_weights[5].tolist() == [0, 0]
    again = padded.rearranged(torch.tensor([5, 0]), torch.tensor([3]))
    assert again.num_tokens == [2, 1]
    assert again.layers["a"].is_recorded.tolist() == [False, True, True]
    assert padded.rearranged(torch.arange(5)).layers["a"].is_recorded is None
    assert padded.rearranged(torch.empty(0, dtype=torch.int64)).num_tokens == [0]


def test_agreement_is_the_share_of_equal_ids():
    a = record([[0, 1], [2, 3], [6, 7]])
    assert a.agreement(record([[1, 0], [2, 4], [6, 7]])) == {"a": pytest.approx(5 / 6)}
    assert a.agreement(record([[7, 6]], [[0, 1], [1, 0]])) == {"a": 0.0}
    assert a.token_agreement(record([[1, 0], [2, 4], [6, 7]])) == {"a": pytest.approx(2 / 3)}
    known = a.rearranged(torch.tensor([0, 1, -1]))
    assert known.agreement(record([[1, 0], [2, 4], [0, 1]])) == {"a": 0.75}
    assert known.token_agreement(record([[1, 0], [2, 4], [0, 1]])) == {"a": 0.5}
    assert a.rearranged(torch.tensor([-1, -1, -1])).agreement(a) == {"a": 1.0}


def test_a_saved_recording_is_the_same(tmp_path):
    recording = record([[0, 1], [2, 3]], [[4, 5]], weights=True)
    recording.add("b", torch.tensor([[299], [0], [1]]), 300)
    for saved in (recording, record([[0, 1]], [[2, 3]]).rearranged(torch.tensor([1, -1]))):
        saved.save(tmp_path / "new" / "routing.pt")
        loaded = RoutingRecording.load(str(tmp_path / "new" / "routing.pt"))
        assert list(loaded.layers) == list(saved.layers)
        for name, layer in saved.layers.items():
            found = loaded.layers[name]
            assert found.topk_ids.dtype == layer.topk_ids.dtype
            assert torch.equal(found.topk_ids, layer.topk_ids)
            assert (found.num_experts, found.num_tokens) == (layer.num_experts, layer.num_tokens)
            for kept in ("topk_weights", "is_recorded"):
                mine, theirs = getattr(found, kept), getattr(layer, kept)
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)
    assert str(recording).splitlines()[1].split() == ["a", "2", "3", "8", "2", "30"]


@pytest.mark.parametrize("content", [b"no zip", None])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "other.pt"
    if content is None:
        torch.save({"format": "another"}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pt is no recording of the routing"):
        RoutingRecording.load(path)


def test_what_does_not_fit_is_said():
    recording = record([[0, 1]])
    with pytest.raises(ValueError, match=r"must be \(T, 2\), as in earlier calls, got \(1, 3\)"):
        recording.add("a", torch.tensor([[0, 1, 2]]), 8)
    with pytest.raises(ValueError, match="a has 8 experts in earlier calls, and 9"):
        recording.add("a", torch.tensor([[0, 1]]), 9)
    with pytest.raises(TypeError, match=r"must be integers, got torch\.float32"):
        recording.add("a", torch.tensor([[0.0, 1.0]]), 8)
    for array in ([[0, 1]], torch.tensor([[0, 1]]).numpy()):
        with pytest.raises(TypeError, match=rf"must be a tensor, got {type(array).__name__}: torch\.as_tensor"):
            recording.add("a", array, 8)
    with pytest.raises(ValueError, match="either all calls of a layer have weights"):
        recording.add("a", torch.tensor([[0, 1]]), 8, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"ids \(1, 2\) and weights \(1, 1\)"):
        recording.add("a", torch.tensor([[0, 1]]), 8, torch.ones(1, 1))
    for outside in (-1, 8, 256):
        with pytest.raises(ValueError, match=r"must be in \[0, 8\), and some are outside"):
            _ = record([[0, outside]]).layers["a"].topk_ids
    with pytest.raises(ValueError, match="call 0 has 1 tokens, which are not those of 2 sequences"):
        recording.token_index(2)
    with pytest.raises(ValueError, match=r"in \[-1, 1\), which are the recorded tokens, got 0 to 1"):
        recording.rearranged(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="got none"):
        recording.rearranged()
    with pytest.raises(TypeError, match="an index must be integers"):
        recording.rearranged(torch.tensor([True]))
    with pytest.raises(TypeError, match="an index must be a tensor, got list"):
        recording.rearranged([0])
    with pytest.raises(ValueError, match="the recording is empty"):
        RoutingRecording().token_index(1)
    recording.add("b", torch.tensor([[0, 1], [0, 1]]), 8)
    with pytest.raises(ValueError, match="a has 1 calls of 1 tokens, and b has 1 calls of 2"):
        recording.rearranged(torch.tensor([0]))
    with pytest.raises(ValueError, match="the other recording has no b"):
        recording.agreement(record([[0, 1]]))
    with pytest.raises(ValueError, match="a has 9 in the other recording, and 8 in"):
        record([[0, 1]]).agreement(record([[0, 1]], num_experts=9))
    with pytest.raises(ValueError, match=r"a has \(1, 2\) and \(2, 2\)"):
        record([[0, 1]]).agreement(record([[0, 1], [2, 3]]))


def test_calls_after_a_rearrangement() -> None:
    recording = RoutingRecording()
    recording.add("a", torch.tensor([[0, 1], [2, 3]]), 4)
    rearranged = recording.rearranged(torch.tensor([1, -1]))
    rearranged.add("a", torch.tensor([[3, 2]]), 4)
    again = rearranged.rearranged(torch.tensor([2, 1, 0]))
    assert again.layers["a"].topk_ids[[0, 2]].tolist() == [[3, 2], [2, 3]]
    assert again.layers["a"].is_recorded.tolist() == [True, False, True]


def test_a_file_with_one_wrong_bit_is_refused(tmp_path):
    """Wherever it is: in ids it would be another expert. Only bits between the parts of a file mean nothing."""
    recording = record(torch.arange(600).remainder(8).view(300, 2).tolist())
    recording.save(tmp_path / "routing.pt")
    content = (tmp_path / "routing.pt").read_bytes()
    refused = 0
    for position in range(0, len(content), 7):
        wrong = bytearray(content)
        wrong[position] ^= 1 << position % 8
        (tmp_path / "wrong.pt").write_bytes(wrong)
        try:
            found = RoutingRecording.load(tmp_path / "wrong.pt")
        except ValueError:
            refused += 1
        else:
            assert torch.equal(found.layers["a"].topk_ids, recording.layers["a"].topk_ids)
    assert refused > 50
