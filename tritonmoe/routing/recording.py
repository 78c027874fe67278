"""RoutingRecording: which experts every layer chose for every token, kept in as few bytes as the ids need."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tritonmoe.routing.layer_recording import LayerRecording, check_integers
from tritonmoe.routing.rollout import rollout_ids
from tritonmoe.runtime.files import write_whole
from tritonmoe.runtime.plain_pickle import load_tensors

__all__ = ["RoutingRecording", "check_same_layers"]

FORMAT = "tritonmoe routing 1"
FEWEST_COMPARED = 16
"""Of fewer tokens nothing tells whether their rows are shifted."""


class RoutingRecording:
    """The ids (and weights, if asked for) that the routers of a model chose; made by record_routing().

    from_rollout() makes one of what vLLM or SGLang returns, and `recording.add(layer, topk_ids, num_experts)`, once per
    layer and forward, of anything else. Replaying it is an idea of R3 (https://arxiv.org/abs/2510.11370).
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerRecording] = {}
        """Name of the experts module -> its recording, in the order of the model's forward."""

    def add(
        self,
        layer: str,
        topk_ids: Tensor,
        num_experts: int,
        topk_weights: Tensor | None = None,
        is_recorded: Tensor | None = None,
    ) -> None:
        """Append a call of one layer: ids (T, K), of T tokens in the order of the flattened batch.

        is_recorded: (T,) bool, False for rows of which nothing is to be kept, as padding is; None for none.
        Raises:
            ValueError: E or K differs from earlier calls of this layer. TypeError: the ids are no integers.
        """
        found = self.layers.get(layer) or LayerRecording(num_experts)
        if found.num_experts != num_experts:
            raise ValueError(f"{layer} has {found.num_experts} experts in earlier calls, and {num_experts} in this one")
        found.add(topk_ids, topk_weights, is_recorded)
        self.layers[layer] = found

    @classmethod
    def from_rollout(
        cls,
        routed_experts: Sequence,
        token_mask: Tensor,
        like: "RoutingRecording",
        *,
        has_experts: Sequence[bool] | None = None,
        has_last: bool = False,
    ) -> "RoutingRecording":
        """Return one call of B * S tokens with the ids that vLLM or SGLang returned of a rollout's B sequences.

        Tokens without a row choose by themselves in a replay: padding, and the last token, which was never an input.

        A shift by one token is refused where it changes the number of rows, and where `like` holds the same tokens and
        agrees far better with the rows of their neighbours. Otherwise rows that belong to other tokens, or to another
        text of as many tokens, can't be told from right ones, since rows hold no token ids: compare the engine's token
        ids with those of the batch, and look at agreement() with the model's own choice, which is then low.

        Args:
            routed_experts: for each sequence (rows, layers, K) integers, as a tensor, a NumPy array or base64, of an
                npy file as vLLM sends, or of bare int32 as SGLang does. Or a list of such pieces, in their order:
                prompt and completion, or the turns of a conversation, each without the rows of earlier ones. Rows of -1
                in all layers are of tokens without routing.
            token_mask: (B, S) bool or 0 and 1, false where the batch is padded, left or right.
            like: record_routing() of the model that will train, on this batch or any other, of one token say: it has
                the names of layers, E and K.
            has_experts: for each layer in routed_experts whether it has experts, where dense layers have (meaningless)
                ids too; None: all have.
            has_last: the engine gives a row for the last token of each sequence too.
        Raises:
            ValueError: other layers, K or numbers of rows than that; ids outside [0, E), or twice for one token, as in
                what fills dense layers; rows shifted by one. TypeError: no integers, no recording.
        Example:
            A prompt of 2 tokens and 2 new ones, padded by one on the left, has 3 rows; token_mask is [[0, 1, 1, 1, 1]],
            and of the call's 5 tokens 1, 2 and 3 are recorded.
        """
        if not isinstance(like, RoutingRecording):
            raise TypeError(f"like must be a RoutingRecording, as record_routing() makes, got {type(like).__name__}")
        _ = like.num_tokens  # raises where nothing was recorded
        found, is_recorded = rollout_ids(routed_experts, token_mask, like.layers, has_experts, has_last)
        recording = cls()
        for name, ids in found.items():
            recording.add(name, ids, like.layers[name].num_experts, is_recorded=is_recorded)
        if like.num_tokens == recording.num_tokens:
            _check_not_shifted(recording, like, is_recorded.nonzero().squeeze(1))
        return recording

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each call, the same in all layers.

        Raises:
            ValueError: nothing was recorded, or layers were called with other tokens than others.
        """
        if not self.layers:
            raise ValueError("the recording is empty: no layer has been called")
        (first, layer), *others = self.layers.items()
        for name, other in others:
            if other.num_tokens != layer.num_tokens:
                raise ValueError(
                    f"all layers must have the same tokens: {first} has {_calls(layer.num_tokens)}, and {name} has "
                    f"{_calls(other.num_tokens)}"
                )
        return layer.num_tokens

    def token_index(self, batch_size: int) -> Tensor:
        """Return (batch_size, S) int64: the number of the token at each position of each sequence, to rearrange by.

        For calls that each hold the next positions of the same sequences, as generate() makes: one of the prompts,
        then one for each new token. Padding in the prompts has numbers too. Beam search exchanges sequences between
        calls, and assisted decoding drops tokens: after these, record one forward of the result instead.
        Raises:
            ValueError: the tokens of a call are no multiple of batch_size.
        Example:
            Two prompts of 2 tokens, and 1 new token each: the calls have 4 and 2 tokens, and the index is
            [[0, 1, 4], [2, 3, 5]].
        """
        parts, start = [], 0
        for number, num_tokens in enumerate(self.num_tokens):
            if batch_size < 1 or num_tokens % batch_size:
                raise ValueError(
                    f"call {number} has {num_tokens} tokens, which are not those of {batch_size} sequences"
                )
            parts.append(torch.arange(start, start + num_tokens, device="cpu").view(batch_size, -1))
            start += num_tokens
        return torch.cat(parts, dim=1)

    def rearranged(self, *indices: Tensor) -> "RoutingRecording":
        """Return the recording as forwards in another layout would have made it, one forward for each index.

        Args:
            indices: of any shape, (batch, sequence) or (T,), in the order of the new tokens: the number of the recorded
                token, or -1 for one that was not recorded (padding, a last token), which will choose by itself.
        Raises:
            ValueError: no index, or a number that no token has. TypeError: an index is no integers.
        Example:
            Of the index [[0, 1, 4], [2, 3, 5]] above, where token 2 is padding on the left, [[0, 1, 4], [3, 5, -1]] is
            the batch padded on the right, and [0, 1, 4, 3, 5] the packed one.
        """
        total = sum(self.num_tokens)
        if not indices:
            raise ValueError("rearranged() takes an index for each forward, got none")
        for index in indices:
            check_integers("an index", index)
        whole = torch.cat([index.reshape(-1).long().cpu() for index in indices])
        if whole.numel() and not -1 <= int(whole.min()) <= int(whole.max()) < total:
            raise ValueError(
                f"an index must be in [-1, {total}), which are the recorded tokens, got {int(whole.min())} to "
                f"{int(whole.max())}"
            )
        result = RoutingRecording()
        result.layers = {
            name: layer.rearranged(whole, [index.numel() for index in indices]) for name, layer in self.layers.items()
        }
        return result

    def agreement(self, other: "RoutingRecording") -> dict[str, float]:
        """Return the share of equal ids by layer: of each token's K ids those that both chose, whatever their order.

        Tokens that one of them doesn't know (-1 in rearranged) are left out; 1.0 where no token is left.
        Raises:
            ValueError: they have other layers, tokens, E or K.
        Example:
            Ids [[0, 1], [2, 3]] and [[1, 0], [2, 4]]: 3 of 4 ids are equal, 0.75.
        """
        return {name: _mean(shares) for name, shares in self._equal_ids(other).items()}

    def token_agreement(self, other: "RoutingRecording") -> dict[str, float]:
        """Return the share of tokens all of whose K ids are equal, by layer; otherwise as agreement().

        Example:
            Of the ids above, those of one token of two: 0.5.
        """
        return {name: _mean(torch.where(shares < 1, 0.0, shares)) for name, shares in self._equal_ids(other).items()}

    def _equal_ids(self, other: "RoutingRecording") -> dict[str, Tensor]:
        """Return for each layer (T,) shares of equal ids, NaN for tokens that one of both doesn't know."""
        check_same_layers(
            self, {name: layer.num_experts for name, layer in other.layers.items()}, "the other recording"
        )
        found = {}
        for name, layer in self.layers.items():
            a, b = layer.topk_ids, other.layers[name].topk_ids.to(layer.topk_ids.device)
            if a.shape != b.shape:
                raise ValueError(
                    f"both must have the same tokens and K: {name} has {tuple(a.shape)} and {tuple(b.shape)}"
                )
            shares = (a.unsqueeze(2) == b.unsqueeze(1)).any(dim=2).double().mean(dim=1)
            for is_recorded in (layer.is_recorded, other.layers[name].is_recorded):
                if is_recorded is not None:
                    shares = torch.where(is_recorded.to(shares.device), shares, float("nan"))
            found[name] = shares
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write the recording to a file. Raises OSError where it can't be written; then no part of it is left."""
        layers = {name: layer.saved() for name, layer in self.layers.items()}
        content = io.BytesIO()
        torch.save({"format": FORMAT, "layers": layers}, content)
        write_whole(path, content.getvalue(), "recording of the routing")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RoutingRecording":
        """Read what save() has written, into the CPU's memory; runs no code that the file might hold.

        Raises:
            ValueError: it is no such file. OSError: it can't be read.
        """
        try:
            content = load_tensors(Path(path))
        except ValueError as error:
            raise ValueError(f"{path} is no recording of the routing: {error}") from error
        layers = content.get("layers") if isinstance(content, dict) and content.get("format") == FORMAT else None
        if not isinstance(layers, dict):
            raise ValueError(f"{path} is no recording of the routing: save() of a RoutingRecording writes them")
        recording = cls()
        for name, fields in layers.items():
            try:
                if not isinstance(name, str) or not isinstance(fields, dict):
                    raise ValueError("a layer is an object by its name")
                recording.layers[name] = LayerRecording.of_saved(fields)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is damaged: {str(name)[:99]!r}: {error}") from error
        return recording

    def __str__(self) -> str:
        width = max([len(name) for name in self.layers], default=5)
        lines = [f"{'layer':{width}}  {'calls':>7}  {'tokens':>9}  {'E':>5}  {'K':>3}  {'bytes':>11}"]
        for name, layer in self.layers.items():
            size = layer.topk_ids.nbytes + (0 if layer.topk_weights is None else layer.topk_weights.nbytes)
            num_calls, num_tokens = len(layer.num_tokens), sum(layer.num_tokens)
            lines.append(
                f"{name:{width}}  {num_calls:>7}  {num_tokens:>9}  {layer.num_experts:>5}  {layer.top_k:>3}  {size:>11}"
            )
        return "\n".join(lines)


def check_same_layers(recording: RoutingRecording, num_experts: Mapping[str, int], owner: str) -> None:
    """Raise ValueError unless the recording has the layers, with these numbers of experts, that `owner` has."""
    recorded = {name: layer.num_experts for name, layer in recording.layers.items()}
    missing, unknown = _few(recorded.keys() - num_experts), _few(num_experts.keys() - recorded)
    if missing or unknown:
        said = [f"{owner} has no {missing}"] * bool(missing) + [f"the recording has no {unknown}"] * bool(unknown)
        raise ValueError(f"both must have the same layers: {'; '.join(said)}")
    for name, recorded_experts in recorded.items():
        if recorded_experts != num_experts[name]:
            raise ValueError(
                f"both must have the same experts: {name} has {num_experts[name]} in {owner}, and {recorded_experts} "
                "in the recording"
            )


def _check_not_shifted(recording: RoutingRecording, like: RoutingRecording, known: Tensor) -> None:
    """Raise ValueError where the recorded tokens `known` agree far better with their neighbours in `like`."""
    if known.numel() < FEWEST_COMPARED:
        return
    with_own = _mean_agreement(recording, like)
    for where, tokens, neighbours in (("before", known[1:], known[:-1]), ("after", known[:-1], known[1:])):
        with_neighbours = _mean_agreement(recording.rearranged(tokens), like.rearranged(neighbours))
        if 4 * (1 - with_neighbours) < 1 - with_own:
            raise ValueError(
                f"rows must be those of their tokens: {with_own:.0%} of the ids are those that `like` has, and "
                f"{with_neighbours:.0%} those of the token {where}, so the rows are shifted by one; row 0 is of a "
                "sequence's first token"
            )


def _mean_agreement(recording: RoutingRecording, other: RoutingRecording) -> float:
    shares = recording.agreement(other).values()
    return sum(shares) / len(shares)


def _mean(shares: Tensor) -> float:
    is_known = ~shares.isnan()
    return float(shares[is_known].mean()) if is_known.any() else 1.0


def _few(names: Iterable[str]) -> str:
    first, more = sorted(names)[:3], len(list(names)) - 3
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _calls(num_tokens: list[int]) -> str:
    return f"{len(num_tokens)} calls of {sum(num_tokens)} tokens"
