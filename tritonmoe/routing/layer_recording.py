"""LayerRecording: what one layer's router chose, call after call, in as few bytes as the ids need."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritonmoe.config.numbers import is_integer

__all__ = ["LayerRecording", "check_integers"]

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
        check_integers("topk_ids", topk_ids)
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
                    f"recorded ids must be in [0, {self.num_experts}), and some are outside: the router had NaN "
                    "scores, or it marks experts of other ranks. Spread experts with tritonmoe's parallelize, which "
                    "keeps ids global"
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

    def saved(self) -> dict[str, object]:
        """Return what a file holds of the layer: plain data, and tensors on the CPU."""
        return {
            "num_experts": self.num_experts,
            "num_tokens": list(self.num_tokens),
            "topk_ids": self.topk_ids.cpu(),
            "topk_weights": None if self.topk_weights is None else self.topk_weights.cpu(),
            "is_recorded": None if self.is_recorded is None else self.is_recorded.cpu(),
        }

    @classmethod
    def of_saved(cls, fields: Mapping[str, Any]) -> "LayerRecording":
        """Return the layer of which `saved` made these fields.

        Raises:
            ValueError, TypeError: it didn't, or somebody has changed the fields since.
        """
        if missing := {"num_experts", "num_tokens", "topk_ids", "topk_weights", "is_recorded"} - fields.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        num_experts, num_tokens = fields["num_experts"], fields["num_tokens"]
        if not is_integer(num_experts) or not 0 < num_experts < 1 << 31:
            raise ValueError("num_experts must be a whole number of at least 1")
        if not isinstance(num_tokens, list) or not all(is_integer(count) and count >= 0 for count in num_tokens):
            raise ValueError("num_tokens must be a list of whole numbers of at least 0, one for each call")
        ids, weights, is_recorded = fields["topk_ids"], fields["topk_weights"], fields["is_recorded"]
        check_integers("topk_ids", ids)
        if ids.dim() != 2 or sum(num_tokens) != len(ids):
            raise ValueError(f"topk_ids must be (T, K) with T = {sum(num_tokens)}, got {tuple(ids.shape)}")
        if weights is not None and not (isinstance(weights, Tensor) and weights.is_floating_point()):
            raise TypeError("topk_weights must be a tensor of floating-point numbers")
        if is_recorded is not None and not (
            isinstance(is_recorded, Tensor) and is_recorded.dtype == torch.bool and is_recorded.shape == ids.shape[:1]
        ):
            raise ValueError(f"is_recorded must be ({len(ids)},) bool")
        layer = cls(num_experts)
        layer.add(ids, weights)
        layer.num_tokens, layer.is_recorded = num_tokens, is_recorded
        _ = layer.topk_ids  # raises where one is outside of [0, E)
        return layer

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


def check_integers(name: str, value: object) -> None:
    """Raise TypeError unless this is a tensor of integers."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(value).__name__}: torch.as_tensor() makes one of an array or a list"
        )
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def _smallest_dtype(num_experts: int) -> torch.dtype:
    if num_experts <= 256:
        return torch.uint8
    return torch.int16 if num_experts <= 1 << 15 else torch.int32
