"""RoutingRecording: which experts every layer chose for every token, kept in as few bytes as the ids need."""

import io
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tritonmoe.runtime.files import check_regular, write_whole

__all__ = ["LayerRecording", "RoutingRecording"]

FORMAT = "tritonmoe routing 1"
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""PyTorch neither compares nor joins them."""
PENDING_CALLS = 256
"""After so many calls, or one of as many tokens, ids are brought into the smallest dtype."""


class LayerRecording:
    """What one layer's router chose, call after call; its tensors stay on the device that they were made on."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        """E: ids are below it, whatever rank holds the experts."""
        self.num_tokens: list[int] = []
        """Tokens of each call. A token's number is its row in all calls, one below the other."""
        self.is_recorded: Tensor | None = None
        """(T,) bool: False for tokens of which nothing is recorded: padding, -1 of a rearranged one; None: has all."""
        self.top_k = 0
        """K; 0 before the first call."""
        self._pending: list[Tensor] = []  # calls as they came: few operations each, since decoding makes many
        self._ids: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._is_outside: Tensor | None = None  # () bool, on the device: some id is not in [0, E)

    def add(self, topk_ids: Tensor, topk_weights: Tensor | None = None, is_recorded: Tensor | None = None) -> None:
        """Append a call: ids (T, K) of any integer dtype, and weights (T, K) where all calls have some.

        is_recorded: (T,) bool, False for rows of which nothing is to be kept; None for none.

        Reads nothing on the host: ids outside [0, E) raise where topk_ids is read first.
        Raises:
            ValueError: the shapes, or whether there are weights, differ from those of earlier calls. TypeError: no ids.
        """
        _check_integers("topk_ids", topk_ids)
        if topk_ids.dim() != 2 or (self.num_tokens and topk_ids.shape[1] != self.top_k):
            expected = f"(T, {self.top_k}), as in earlier calls" if self.num_tokens else "(T, K)"
            raise ValueError(f"topk_ids must be {expected}, got {tuple(topk_ids.shape)}")
        if topk_weights is not None and topk_weights.shape != topk_ids.shape:
            raise ValueError(f"ids {tuple(topk_ids.shape)} and weights {tuple(topk_weights.shape)} must have one shape")
        if self.num_tokens and (topk_weights is None) == bool(self._weights):
            raise ValueError("either all calls of a layer have weights, or none has")
        ids = topk_ids.detach()
        ids = ids.long() if ids.dtype in UNSIGNED else ids.clone()
        if is_recorded is not None:
            ids.masked_fill_(~is_recorded.unsqueeze(1), 0)
        if is_recorded is not None or self.is_recorded is not None:
            before = (
                ids.new_ones(sum(self.num_tokens), dtype=torch.bool) if self.is_recorded is None else self.is_recorded
            )
            now = ids.new_ones(len(ids), dtype=torch.bool) if is_recorded is None else is_recorded.detach()
            self.is_recorded = torch.cat([before, now.to(before.device)])
        self.top_k = topk_ids.shape[1]
        self.num_tokens.append(topk_ids.shape[0])
        self._pending.append(ids)
        if topk_weights is not None:
            self._weights.append(topk_weights.detach().clone())
        if len(self._pending) == PENDING_CALLS or len(topk_ids) >= PENDING_CALLS:
            self._compact()

    def _compact(self) -> None:
        """Bring the calls that came since the last time into the smallest dtype; waits for no device."""
        if self._pending:
            ids = torch.cat(self._pending).long()  # E itself may not fit into their dtype, and would wrap
            is_outside = ((ids < 0) | (ids >= self.num_experts)).any()
            self._is_outside = is_outside if self._is_outside is None else self._is_outside | is_outside
            self._ids.append(ids.to(_smallest_dtype(self.num_experts)))
            self._pending.clear()

    @property
    def topk_ids(self) -> Tensor:
        """(T, K) ids of all calls: uint8 for E up to 256, else int16.

        Raises:
            ValueError: an id is not in [0, E).
        """
        self._compact()
        if self._is_outside is not None:
            if self._is_outside:
                raise ValueError(
                    f"recorded ids must be in [0, {self.num_experts}), and some are not: the router had NaN scores, or "
                    "marks experts of other ranks; spread experts with tritonmoe's parallelize, which keeps ids global"
                )
            self._is_outside = None
            if self.is_recorded is not None and self.is_recorded.all():
                self.is_recorded = None
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids)]
        return self._ids[0]

    @property
    def topk_weights(self) -> Tensor | None:
        """(T, K) weights of all calls, in the dtype that the experts got; None where only ids were recorded."""
        if len(self._weights) > 1:
            self._weights = [torch.cat(self._weights)]
        return self._weights[0] if self._weights else None

    def rearranged(self, index: Tensor, num_tokens: list[int]) -> "LayerRecording":
        """Return the recording of the tokens index (T,), -1 for one that is not recorded, in calls of num_tokens."""
        layer = LayerRecording(self.num_experts)
        ids, weights = self.topk_ids, self.topk_weights
        index = index.to(ids.device)
        is_known, rows = index >= 0, index.clamp(min=0)
        if self.is_recorded is not None:
            is_known = is_known & self.is_recorded.to(ids.device)[rows]
        layer.is_recorded = None if is_known.all() else is_known
        layer.top_k, layer._ids = self.top_k, [ids[rows]]
        if weights is not None:
            layer._weights = [torch.where(is_known.unsqueeze(1), weights[rows], 0.0)]
        layer.num_tokens = num_tokens
        return layer


class RoutingRecording:
    """The ids (and weights, if asked for) that the routers of a model chose; made by record_routing().

    Also made by hand from what an inference engine reports: `recording.add(layer, topk_ids, num_experts)` once per
    layer and forward. Replaying it is an idea of R3 (https://arxiv.org/abs/2510.11370).
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
            _check_integers("an index", index)
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
        layers = {
            name: {
                "num_experts": layer.num_experts,
                "num_tokens": list(layer.num_tokens),
                "topk_ids": layer.topk_ids.cpu(),
                "topk_weights": None if layer.topk_weights is None else layer.topk_weights.cpu(),
                "is_recorded": None if layer.is_recorded is None else layer.is_recorded.cpu(),
            }
            for name, layer in self.layers.items()
        }
        content = io.BytesIO()
        torch.save({"format": FORMAT, "layers": layers}, content)
        write_whole(path, content.getvalue(), "recording of the routing")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RoutingRecording":
        """Read what save() has written, into the CPU's memory; runs no code that the file might hold.

        Raises:
            ValueError: it is no such file. OSError: it can't be read.
        """
        check_regular(Path(path))
        saved = Path(path).read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(saved)) as archive:  # torch.load doesn't compare the sums that it finds
                if damaged := archive.testzip():
                    raise ValueError(f"the sum of {damaged} is another one")
            content = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is no recording of the routing, or is damaged: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or "layers" not in content:
            raise ValueError(f"{path} is no recording of the routing: save() of a RoutingRecording writes them")
        recording = cls()
        for name, fields in content["layers"].items():
            layer = LayerRecording(fields["num_experts"])
            layer.add(fields["topk_ids"], fields["topk_weights"])
            layer.num_tokens, layer.is_recorded = fields["num_tokens"], fields["is_recorded"]
            if sum(layer.num_tokens) != layer.topk_ids.shape[0]:
                raise ValueError(f"{path} is damaged: {name} has other tokens than its calls")
            recording.layers[name] = layer
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


def _check_integers(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(value).__name__}: torch.as_tensor() makes one of an array or a list"
        )
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def _mean(shares: Tensor) -> float:
    is_known = ~shares.isnan()
    return float(shares[is_known].mean()) if is_known.any() else 1.0


def _few(names: Iterable[str]) -> str:
    first, more = sorted(names)[:3], len(list(names)) - 3
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _calls(num_tokens: list[int]) -> str:
    return f"{len(num_tokens)} calls of {sum(num_tokens)} tokens"


def _smallest_dtype(num_experts: int) -> torch.dtype:
    if num_experts <= 256:
        return torch.uint8
    return torch.int16 if num_experts <= 1 << 15 else torch.int32
