"""Which rows of a layer upcycled in place are tokens, not padding, by the masks that the model was called with."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EnclosingCall", "TokenMask", "find_mask", "tokens_of_calls"]


class EnclosingCall(NamedTuple):
    """A call of a module with the layer inside of it that runs now."""

    path: str
    """The module's, in the model that was upcycled."""
    is_model: bool
    """It is a PreTrainedModel, whose mask is the user's or that of a model around it; else a mask is made from one."""
    takes_mask: bool
    is_time_major: bool
    """Its rows are (S, B, D)."""
    mask: object = None
    """What it was given as attention_mask; None for nothing."""
    has_cache: bool = False
    """It was given keys and values of earlier tokens, which its mask may have columns for."""


class TokenMask(NamedTuple):
    """Which rows of one call of a layer are tokens."""

    tokens: Tensor | None = None
    """bool, of the rows' shape; None: all of them, or see `problem`."""
    whole: object = None
    """The mask of which `tokens` (B, S) was made, where the call has some of its S columns: a chunk."""
    problem: str = ""
    """Why nobody can say."""


EVERY_ROW = TokenMask()


def find_mask(around: Sequence[EnclosingCall], shape: torch.Size) -> TokenMask:
    """Return which rows (of this shape) are tokens, of a layer inside these calls, the outermost first.

    The innermost model's mask is that of the rows: that of the decoder, not of the encoder; no mask for a vision
    tower of a model that has one for its text. Where it was made from another model's mask, that one is taken. Where it
    has other columns than the rows, or the model has none of this name, the one is taken that the model has made for
    its layers, if it has.
    """
    given: object = None
    made: list[object] = []
    for call in reversed(around):
        if not call.is_model:
            if given is None and call.takes_mask:
                made.insert(0, call.mask)
        elif call.mask is None:
            if given is None:
                break
            if call.takes_mask:
                return EVERY_ROW
        else:
            given = call.mask if given is None else given
            if isinstance(call.mask, Tensor) and call.mask.dim() == 2:
                tokens = _fitted(call.mask != 0, shape, call)
                if tokens is not None:
                    return TokenMask(tokens)
                break
    for mask in made:
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == shape:
            return TokenMask(_is_attended(mask))
    chunk = None
    for mask in (given, *reversed(made)):
        tokens = (
            given != 0 if mask is given and isinstance(given, Tensor) and given.dim() == 2 else _attended_keys(mask)
        )
        if tokens is None:
            continue
        fitted = _fitted(tokens, shape, around[-1] if mask is given else None)
        if fitted is not None:
            return TokenMask(fitted)
        if chunk is None and len(shape) == 2 and tokens.shape[0] == shape[0] and tokens.shape[1] > shape[1]:
            chunk = TokenMask(tokens, mask)
    if given is None or (made and all(mask is None for mask in made)):
        return EVERY_ROW  # as its layers do, which mask nothing
    return chunk or TokenMask(problem=_problem(shape, _describe(given)))


def tokens_of_calls(calls: Iterable[tuple[torch.Size, TokenMask]]) -> list[Tensor | None]:
    """Return which rows (T,) of each call of a layer in one forward are tokens, None for all.

    Raises:
        ValueError: nobody can say.
    """
    found: list[Tensor | None] = []
    chunked: list[tuple[object, int, int]] = []  # a mask, its columns so far, and all of them
    shape = torch.Size()
    for shape, mask in calls:
        if mask.problem:
            raise ValueError(mask.problem)
        tokens = mask.tokens
        if tokens is not None and mask.whole is not None:
            begin = 0
            if chunked and chunked[-1][0] is mask.whole:
                begin = chunked.pop()[1]
            end = begin + shape[1]
            chunked.append((mask.whole, end, tokens.shape[1]))
            tokens = tokens[:, begin:end]
        found.append(None if tokens is None else tokens.reshape(-1))
    for whole, end, size in chunked:
        if end != size:
            raise ValueError(_problem((shape[0], end), _describe(whole)))
    return found


def _problem(shape: Sequence[int], mask: str) -> str:
    return (
        f"the auxiliary loss leaves out padding, and which of a layer's rows {tuple(shape)} are padding can't be told "
        f"from the attention mask {mask}: call the model with one (B, S) of its rows, or with none, or leave such "
        "layers dense by layers= of upcycle()"
    )


def _fitted(tokens: Tensor, shape: torch.Size, call: EnclosingCall | None) -> Tensor | None:
    """Return a mask (B, S) in the shape of the rows; None where it is not theirs."""
    if len(shape) == 1:  # OPT's and others', flattened
        return tokens.reshape(-1) if tokens.numel() == shape[0] else None
    if call is not None and call.is_time_major:
        tokens = tokens.T
    elif call is not None and call.has_cache and len(shape) == 2 and tokens.shape[1] > shape[1]:
        tokens = tokens[:, -shape[1] :]
    if tokens.shape[0] == 1 and tokens.shape[1:] == shape[1:]:
        tokens = tokens.expand(shape)
    return tokens if tokens.shape == shape else None


def _attended_keys(mask: object) -> Tensor | None:
    """Return (B, S), whether some query attends to a key, of a mask (B, heads, queries, S); None of anything else."""
    if isinstance(mask, dict):  # one for each kind of layers
        kinds = [found for found in mask.values() if isinstance(found, Tensor)]
        mask = mask.get("full_attention", kinds[0] if kinds else None)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    return _is_attended(mask).any(dim=1).any(dim=1)


def _is_attended(mask: Tensor) -> Tensor:
    """Return where a mask of attention lets tokens through; a floating mask is added to the scores."""
    if mask.is_floating_point():
        return mask.float().exp() > 0
    return mask != 0


def _describe(mask: object) -> str:
    return str(tuple(mask.shape)) if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
