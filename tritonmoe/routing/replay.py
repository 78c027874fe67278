"""LayerReplay: a router's own code runs, and its top-k takes recorded ids with the scores that it has there."""

from collections.abc import Callable
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tritonmoe.routing.layer_recording import LayerRecording
from tritonmoe.runtime.autograd import checkpointed_calls, is_recomputing

__all__ = ["LayerReplay", "is_replaying"]

ANOTHER_LAYOUT = (
    "record and replay the same batches in the same order, or lay the recording out as the new batches are, with "
    "recording.rearranged()"
)


def is_replaying() -> bool:
    """Return whether a replay answers this thread's torch.topk now."""
    return any(isinstance(mode, LayerReplay) for mode in _get_current_function_mode_stack())


class _Calls:
    """The recorded calls that one checkpointed call of a function has taken, and how far its recompute has come."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.task = -1
        """The backward that recomputes it now: a second one starts anew."""
        self.position = 0


class LayerReplay(TorchFunctionMode):
    """The replay of one layer. Between start() and finish() torch.topk over all E scores gives the recorded ids.

    Values are the scores at these ids, so what follows, and its gradients, are the router's own. Where groups of
    experts are chosen before, those of the recorded ids are among them. Tokens that the recording doesn't know choose
    by themselves. The n-th forward takes the n-th recorded call; a recompute of activation checkpointing takes the call
    of the forward that it recomputes.
    """

    def __init__(self, name: str, recording: LayerRecording) -> None:
        super().__init__()
        self.name = name
        self.recording = recording
        self.next_call = 0
        self.is_open = True
        """False when the replay has ended: then only recomputes of its forwards take ids."""
        self.is_active = False
        self._recorded: Tensor = recording.topk_ids  # (T, K) of all calls
        self._offsets = [0]
        for num_tokens in recording.num_tokens:
            self._offsets.append(self._offsets[-1] + num_tokens)
        self._calls: WeakKeyDictionary[object, _Calls] = WeakKeyDictionary()
        self._around: object = None  # the checkpointed call that this one is part of
        self._number = 0
        self._problem = ""
        self._ids: Tensor | None = None  # (T, K) int64: those of the call that is replayed now
        self._is_recorded: Tensor | None = None  # (T, 1)
        self._chosen: Tensor | None = None  # (T, K): they, and what tokens that aren't recorded chose
        self._given: tuple[Tensor, int | None] | None = None  # their copy that the router got, and its version
        self._grouped: Tensor | None = (
            None  # (T, groups, E / groups): the scores, before experts of groups were left out
        )
        self._own_groups: Tensor | None = None  # (T, chosen groups): those that the router would have chosen
        self._num_changed: Tensor | None = None  # () int64, of this call
        self.counts: Tensor | None = None
        """(3,) int64, of all calls but recomputes: tokens that took recorded ids, their pairs, and how many of these
        the router would have given other experts, by the scores that it had there; None before the first."""

    @property
    def num_left(self) -> int:
        """How many recorded calls nothing has taken yet."""
        return len(self.recording.num_tokens) - self.next_call

    @property
    def has_recomputes(self) -> bool:
        """Return whether a backward may still recompute forwards of this replay."""
        return len(self._calls) > 0

    def start(self) -> None:
        """Begin the block that holds the router. finish() reports errors."""
        self.end()
        number = self._find_call()
        if number is not None and is_replaying():
            self._problem = f"{self.name} takes the ids of another replay already: end one before the other begins"
        elif number is not None:
            self._number = number
            self.is_active = True
            self.__enter__()

    def end(self) -> None:
        """End the block, by an exception for example, and forget this call."""
        self._stop()
        self._ids = self._is_recorded = self._chosen = self._given = self._around = None
        self._grouped = self._own_groups = self._num_changed = None
        self._problem = ""

    def _stop(self) -> None:
        """Make the router choose by itself from here on."""
        if self.is_active:
            self.is_active = False
            self.__exit__(None, None, None)

    def _find_call(self) -> int | None:
        """Return the number of the recorded call to take; None to take none, whether that is right or a problem."""
        around = checkpointed_calls()
        if len(around) > 1 and (self.is_open or any(call in self._calls for call in around)):
            self._problem = (
                f"{self.name} stands in a checkpoint inside another one, and a replay can't tell whose forward is "
                "recomputed: checkpoint it once"
            )
            return None
        self._around = around[0] if around else None
        if not is_recomputing():
            if self.is_open and not self.num_left:
                self._problem = (
                    f"the recording has {len(self.recording.num_tokens)} calls of {self.name}, and this is one more: "
                    f"{ANOTHER_LAYOUT}"
                )
            return self.next_call if self.is_open and self.num_left else None
        calls = None if self._around is None else self._calls.get(self._around)
        if calls is None:
            if self.is_open:
                self._problem = (
                    f"a backward recomputes a forward of {self.name} of which the replay knows nothing: begin the "
                    "replay before the forward, and checkpoint with torch.utils.checkpoint"
                )
            return None
        task = torch._C._current_graph_task_id()
        if calls.task != task:
            calls.task, calls.position = task, 0
        if calls.position == len(calls.numbers):
            self._problem = (
                f"a recompute calls {self.name} more often than the forward did ({len(calls.numbers)} times)"
            )
            return None
        return calls.numbers[calls.position]

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in _BEST_OF_GROUPS:
            self._note_groups(args[0] if args else kwargs.get("input"))
        if func is not torch.topk and func is not Tensor.topk:
            return func(*args, **kwargs)
        return self._topk(func, args, kwargs)

    def _topk(self, func: Callable[..., object], args: tuple, kwargs: dict) -> object:
        scores, k, dim = _topk_arguments(*args, **kwargs)
        num_experts, (num_tokens, top_k) = self.recording.num_experts, self._shape
        if dim not in (None, -1, scores.dim() - 1):
            return func(*args, **kwargs)
        if k == top_k and scores.shape[-1] == num_experts and scores.numel() == num_tokens * num_experts:
            ids = self._recorded_ids(scores.device)
            own = cast("torch.return_types.topk", func(scores.detach(), *args[1:], **_without_input(kwargs))).indices
            own = own.reshape(ids.shape)
            self._num_changed = self._count_changed(ids, own)
            if self._is_recorded is not None:
                ids = torch.where(self._is_recorded, ids, own)
            given = ids.clone().reshape(*scores.shape[:-1], k)
            self._chosen, self._given = ids, (given, _version(given))
            return torch.return_types.topk((scores.gather(-1, given), given))
        num_groups = scores.shape[-1]
        if (
            scores.dim() == 2
            and len(scores) == num_tokens
            and k < num_groups < num_experts
            and num_experts % num_groups == 0
        ):
            # the choice of groups comes before: an expert outside of them would have no score (DeepSeek-V2)
            groups = self._recorded_ids(scores.device) // (num_experts // num_groups)
            is_needed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, groups, True)
            if self._is_recorded is not None:
                is_needed &= self._is_recorded
            self._own_groups = scores.detach().topk(k, dim=1).indices
            ids = scores.detach().masked_fill(is_needed, float("inf")).topk(k, dim=1).indices
            return torch.return_types.topk((scores.gather(1, ids), ids))
        return func(*args, **kwargs)

    def _note_groups(self, scores: object) -> None:
        """Keep the scores (T, groups, E / groups) of which a router takes the best of each group."""
        num_experts, (num_tokens, _) = self.recording.num_experts, self._shape
        if (
            isinstance(scores, Tensor)
            and scores.dim() == 3
            and scores.shape[0] == num_tokens
            and scores.shape[1] * scores.shape[2] == num_experts
        ):
            self._grouped = scores.detach()

    def _count_changed(self, ids: Tensor, own: Tensor) -> Tensor | None:
        """Return () int64: how many recorded pairs the router would have given other experts than these ids (T, K).

        own: its choice (T, K), but among the groups of the recorded experts where it chooses groups before. None where
        nobody has seen its scores outside of them.
        """
        if self._own_groups is not None:
            if self._grouped is None:
                return None
            is_chosen = torch.zeros(self._grouped.shape[:2], dtype=torch.bool, device=ids.device)
            is_chosen = is_chosen.scatter_(1, self._own_groups, True).unsqueeze(2)
            own = self._grouped.masked_fill(~is_chosen, float("-inf")).flatten(1).topk(ids.shape[1], dim=1).indices
        is_changed = (ids.unsqueeze(2) != own.unsqueeze(1)).all(dim=2)
        return (is_changed if self._is_recorded is None else is_changed & self._is_recorded).sum()

    @property
    def _shape(self) -> tuple[int, int]:
        """T and K of the call that is replayed now."""
        return self.recording.num_tokens[self._number], self._recorded.shape[1]

    def _recorded_ids(self, device: torch.device) -> Tensor:
        if self._ids is None:
            first = self._offsets[self._number]
            rows = slice(first, first + self._shape[0])
            self._ids = self._recorded[rows].to(device).long()
            if self.recording.is_recorded is not None:
                self._is_recorded = self.recording.is_recorded[rows].to(device).unsqueeze(1)
        return self._ids

    def finish(self, topk_ids: Tensor, *, allow_skipped: bool = False) -> None:
        """Check that the experts get the recorded ids: by identity, or where the router made others of them, by value.

        A comparison by value reads one flag on the host. allow_skipped: ids below 0 may stand in their place.
        Raises:
            ValueError: they don't, or there is no recorded call for this forward.
        """
        was_active = self.is_active
        self._stop()
        if self._problem:
            raise ValueError(self._problem)
        if not was_active:
            if self.is_open:
                raise ValueError(
                    f"{self.name} was called outside of its block, and the block's router is what takes recorded ids: "
                    "call the block"
                )
            return
        shape = self._shape
        if tuple(topk_ids.shape) != shape:
            raise ValueError(
                f"call {self._number} of {self.name} was recorded with {shape[0]} tokens and {shape[1]} ids each, and "
                f"this forward has {topk_ids.shape[0]} tokens and {topk_ids.shape[-1]} ids each: {ANOTHER_LAYOUT}"
            )
        if not self._is_given(topk_ids, allow_skipped):
            raise ValueError(
                f"the experts of {self.name} got other ids than the recorded ones: its router doesn't choose with "
                "torch.topk over the scores of all experts (phimoe's samples), or changes the ids behind it, and can't "
                "be replayed"
            )
        self._take()

    def _is_given(self, topk_ids: Tensor, allow_skipped: bool) -> bool:
        if (
            self._chosen is None or self._given is None
        ):  # no top-k: ids that follow from the tokens may be the recorded ones (hash routing)
            ids = self._recorded_ids(topk_ids.device)
            is_equal = topk_ids == ids
            return bool((is_equal if self._is_recorded is None else is_equal | ~self._is_recorded).all())
        given, version = self._given
        is_same = topk_ids.data_ptr() == given.data_ptr() and version is not None and _version(given) == version
        if is_same and topk_ids.dtype == given.dtype and topk_ids.is_contiguous():
            return True
        is_equal = topk_ids == self._chosen
        return bool((is_equal | (topk_ids < 0) if allow_skipped else is_equal).all())

    def _take(self) -> None:
        if is_recomputing():
            self._calls[self._around].position += 1
            return
        if self._around is not None:
            self._calls.setdefault(self._around, _Calls()).numbers.append(self._number)
        self.next_call += 1
        num_tokens, top_k = self._shape
        ids = self._ids
        assert ids is not None  # _is_given() has compared them
        num_replayed = ids.new_full((), num_tokens) if self._is_recorded is None else self._is_recorded.sum()
        is_known = self._chosen is None or self._num_changed is not None  # ids that follow from the tokens are the same
        num_changed = ids.new_zeros(()) if self._num_changed is None else self._num_changed
        counts = torch.stack([num_replayed, num_replayed * top_k * is_known, num_changed])
        self.counts = counts if self.counts is None else self.counts + counts


_BEST_OF_GROUPS = (torch.topk, Tensor.topk, torch.max, Tensor.max, torch.amax, Tensor.amax)
"""By these a router scores groups of experts: DeepSeek-V3 by the two best of each, DeepSeek-V2 by the best."""


def _without_input(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name != "input"}


def _version(tensor: Tensor) -> int | None:
    """Count the writes into a tensor; None in inference mode, which counts none."""
    return None if tensor.is_inference() else tensor._version


def _topk_arguments(
    input: Tensor, k: int, dim: int | None = None, *_: object, **__: object
) -> tuple[Tensor, int, int | None]:
    """Return those arguments of torch.topk that are looked at."""
    return input, k, dim
