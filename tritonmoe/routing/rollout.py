"""rollout_ids(): what an inference engine returns of a rollout's routing, laid out as the batch that will train."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonmoe.routing.layer_recording import UNSIGNED, LayerRecording, check_integers
from tritonmoe.runtime.files import num_elements

__all__ = ["rollout_ids"]

NPY = b"\x93NUMPY"
"""What every npy file begins with."""


def rollout_ids(
    routed_experts: Sequence,
    token_mask: Tensor,
    layers: Mapping[str, LayerRecording],
    has_experts: Sequence[bool] | None,
    has_last: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return ids (B * S, K) by layer, and is_recorded (B * S,) bool, of the arguments of RoutingRecording.from_rollout.

    Raises:
        ValueError, TypeError: as from_rollout says.
    """
    is_token = _is_token(token_mask)
    flags = [True] * len(layers) if has_experts is None else [bool(flag) for flag in has_experts]
    if sum(flags) != len(layers):
        raise ValueError(
            f"has_experts must be true once for each of the {len(layers)} layers in `like`, and is {sum(flags)} times: "
            "it has one value for each layer in routed_experts"
        )
    all_top_k = sorted({layer.top_k for layer in layers.values()})
    if len(all_top_k) > 1:
        raise ValueError(f"routed_experts has one K, and the layers in `like` have several, {all_top_k}: use add()")
    if isinstance(routed_experts, str) or len(routed_experts) != len(is_token):
        got = "one text" if isinstance(routed_experts, str) else f"{len(routed_experts)} for {len(is_token)} sequences"
        raise ValueError(f"routed_experts must have one entry for each sequence of token_mask, got {got}")
    is_known = is_token if has_last else is_token & (is_token.cumsum(1) != is_token.sum(1, keepdim=True))
    is_here = is_known.flatten()
    rows = _rows(routed_experts, is_token.sum(1).tolist(), is_known.sum(1).tolist(), (len(flags), all_top_k[0]))
    places = dict(zip(layers, [place for place, flag in enumerate(flags) if flag], strict=True))

    is_missing = torch.stack([(rows[:, place].long() == -1).all(1) for place in places.values()]).all(0)
    found = {}
    for name, place in places.items():
        ids = rows[:, place].long()  # E may not fit into the engine's dtype
        _check_ids(ids, is_missing, is_known, name, layers[name].num_experts)
        found[name] = rows.new_zeros(len(is_here), ids.shape[1])
        found[name][is_here] = rows[:, place]
    return found, is_here.masked_scatter(is_here, ~is_missing)


def _is_token(token_mask: Tensor) -> Tensor:
    """Return (B, S) bool, on the CPU. Raises TypeError or ValueError where the mask is no (B, S) of true and false."""
    if not isinstance(token_mask, Tensor) or token_mask.is_floating_point() or token_mask.is_complex():
        got = token_mask.dtype if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise TypeError(f"token_mask must be a tensor of bool or of integers 0 and 1, got {got}")
    is_token = token_mask.cpu().bool()
    if token_mask.dim() != 2 or not torch.equal(is_token.long(), token_mask.cpu().long()):
        raise ValueError(
            f"token_mask must be (B, S) of 0 and 1, as a tokenizer's attention_mask is, got {tuple(token_mask.shape)}"
            + ("" if token_mask.dim() != 2 else f" with values to {int(token_mask.max())}")
        )
    return is_token


def _rows(routed_experts: Sequence, num_tokens: list[int], num_rows: list[int], shape: tuple[int, int]) -> Tensor:
    """Return (rows, layers, K) of all sequences, one below the other; raises ValueError where one has other rows."""
    parts = [torch.empty(0, *shape, dtype=torch.int16, device="cpu")]
    for number, entry in enumerate(routed_experts):
        pieces = list(_pieces(entry, shape, f"routed_experts[{number}]"))
        got = sum(len(piece) for piece in pieces)
        if got != num_rows[number]:
            has_all = num_rows[number] == num_tokens[number]
            if got == num_tokens[number]:
                way_out = "has_last=True where the engine gives a row for the last token too; else they are misaligned"
            elif has_all and got == num_tokens[number] - 1:
                way_out = "has_last=False where the last token has none; else they are misaligned"
            else:
                way_out = "the rows of prompt, completion and turns follow each other, with no gap and none twice"
            raise ValueError(
                f"sequence {number} has {num_tokens[number]} tokens in token_mask, and must have {num_rows[number]} "
                f"rows of routed_experts ({'one for each' if has_all else 'none for its last token'}), got {got}: "
                f"{way_out}"
            )
        parts += [_built(piece, f"routed_experts[{number}]") for piece in pieces]  # no more rows than tokens
    return torch.cat(parts)


def _pieces(entry: object, shape: tuple[int, int], name: str) -> Iterator[Any]:
    """Yield a tensor or an array (rows, layers, K) for each piece of a sequence, and build nothing of its size.

    Raises TypeError or ValueError where a piece is another thing.
    """
    for piece in entry if isinstance(entry, list | tuple) else [entry]:
        rows: Any = _decoded(piece, shape, name) if isinstance(piece, str) else piece
        if hasattr(rows, "__array__") and not isinstance(rows, Tensor):
            import numpy

            rows = numpy.asarray(rows)
            check_integers(name, torch.tensor(numpy.empty(0, rows.dtype), device="cpu"))
        else:
            check_integers(name, rows)
        if rows.ndim != 3 or rows.shape[1:] != shape:
            raise ValueError(
                f"{name} must be (rows, layers, K) = (rows, {shape[0]}, {shape[1]}), as `like` has them, got "
                f"{tuple(rows.shape)}: name layers without experts in has_experts, and cut off the ids that the "
                "engine adds to the K experts, such as those of shared experts"
            )
        yield rows


def _built(rows: Any, name: str) -> Tensor:
    """Return a piece as a tensor on the CPU. Raises ValueError where an id has no place in int64."""
    ids = rows if isinstance(rows, Tensor) else torch.tensor(rows, device="cpu")  # a copy: arrays may be read-only
    if ids.dtype in UNSIGNED:
        ids = ids.long()
        if (ids < 0).any():
            raise ValueError(f"{name} has an unsigned id of 2**63 or more: ids must be in [0, E), or -1 in a row of -1")
    return ids.cpu()


def _decoded(text: str, shape: tuple[int, int], name: str) -> Any:
    """Return the ids of a base64 text: an array of an npy file, or a tensor of int32 ids without a header."""
    try:
        content = base64.b64decode(text, validate=True)
        if content.startswith(NPY):
            return _array(content)
    except Exception as error:  # what a damaged header raises may be any of a dozen types
        raise ValueError(f"{name} must be base64 of an npy file, or of int32 ids, and is damaged: {error}") from error
    row_bytes = 4 * shape[0] * shape[1]
    if len(content) % row_bytes:
        raise ValueError(
            f"{name} has {len(content)} bytes without a header of npy, which must be rows of {shape[0]} layers with "
            f"{shape[1]} int32 ids, {row_bytes} bytes each: has_experts names layers without experts"
        )
    if not content:
        return torch.empty(0, *shape, dtype=torch.int32, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=torch.int32).view(-1, *shape)


def _array(content: bytes) -> Any:
    """Return the array of an npy file, a view of it. Raises ValueError, or what numpy does, where the header is wrong.

    numpy.load takes the memory that a header asks for before it looks whether the file has as much.
    """
    import numpy

    file = io.BytesIO(content)
    is_first = numpy.lib.format.read_magic(file) == (1, 0)
    read = numpy.lib.format.read_array_header_1_0 if is_first else numpy.lib.format.read_array_header_2_0
    sizes, is_fortran, dtype = read(file)
    found = numpy.frombuffer(content, dtype, offset=file.tell())
    if num_elements(sizes) != found.size:
        raise ValueError(f"its header gives it the shape {sizes}, and {found.size} numbers follow")
    return found.reshape(sizes, order="F" if is_fortran else "C")


def _check_ids(ids: Tensor, is_missing: Tensor, is_known: Tensor, layer: str, num_experts: int) -> None:
    """Raise ValueError unless each row (rows, K) that isn't missing has ids in [0, E), and none twice."""
    is_outside = ((ids < 0) | (ids >= num_experts)).any(1) & ~is_missing
    is_twice = (ids.sort(1).values.diff(dim=1) == 0).any(1) & ~is_missing
    for is_wrong, rule, way_out in (
        (
            is_outside,
            f"ids must be in [0, {num_experts})",
            "they are logical ids, not those of an engine's copies of experts, and -1 in all layers marks a token "
            "without routing",
        ),
        (
            is_twice,
            f"the {ids.shape[1]} experts of a token must differ",
            "engines fill layers without experts, and tokens that never ran, so: has_experts names such layers, and "
            "rows of such tokens are to be cut off, or filled with -1",
        ),
    ):
        if is_wrong.any():
            row = int(is_wrong.nonzero()[0])
            sequences = is_known.nonzero()[:, 0]
            number = int(sequences[row])
            token = row - int((sequences < number).sum())
            raise ValueError(
                f"{rule}: token {token} of sequence {number} has {ids[row].tolist()} in {layer}; {way_out}"
            )
