"""record_routing() and replay_routing(): one model's choice of experts, kept, and taken by a model that trains."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritonmoe.expert_parallel.state import abort_call
from tritonmoe.integrations.transformers.routed_experts import (
    COMPILED,
    RoutedExperts,
    refuse_compiler,
    routed_ids,
    uncompiled_experts,
    watched_routing,
)
from tritonmoe.layer import MoELayer
from tritonmoe.routing.recording import RoutingRecording, check_same_layers
from tritonmoe.routing.replay import LayerReplay
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.other_ranks import in_dummy_forward

__all__ = ["record_routing", "replay_routing"]


@contextmanager
def record_routing(
    model: nn.Module, *, weights: bool = False, path: str | os.PathLike | None = None
) -> Iterator[RoutingRecording]:
    """Record, while the context lasts, which experts a transformers model chooses, under any experts implementation.

    Each forward of a layer is one call, whose tokens are the rows of the flattened (batch, sequence), padding included.
    Models upcycled in place are recorded too, and so are models in wrappers (DistributedDataParallel, FSDP2, PEFT): the
    names of layers are those of the model inside. Ids are global and of this rank's tokens, where experts are spread
    over ranks. A forward that activation checkpointing runs again counts once. Rows that the token_mask of a MoELayer
    leaves out have numbers, and are not recorded. Nothing is read on the host.

    Args:
        weights: also the weights that the experts get, in their dtype.
        path: a file to write when the context ends, as RoutingRecording.save() does; every rank needs one of its own.
    Raises:
        ValueError: the model has no experts that go through transformers' registry, nor tritonmoe's own, or is
            compiled; at the end: no layer was called, or ids were not in [0, E).
        ImportError: transformers is missing or too old.
    Example:
        with tmt.record_routing(model) as recording:
            model(**batch)
    """
    found = uncompiled_experts(model)
    recording = RoutingRecording()

    def record(name: str, topk_ids: Tensor, topk_weights: Tensor, num_nonfinite_rows: Tensor | None) -> None:
        routed = found[name]
        # Where all scores are finite, rows without an id are those that token_mask leaves out.
        is_token = None if num_nonfinite_rows is None else (topk_ids >= 0).any(dim=1) | (num_nonfinite_rows != 0)
        recording.add(routed.layer, topk_ids, routed.num_experts, topk_weights if weights else None, is_token)

    with watched_routing(model, found, record):
        yield recording
    for layer in recording.layers.values():
        _ = layer.topk_ids  # raises where some are not in [0, E)
    if path is not None:
        recording.save(path)


@contextmanager
def replay_routing(model: nn.Module, recording: RoutingRecording) -> Iterator["ReplayCounts"]:
    """Make the routers of a transformers model take recorded ids, while the context lasts.

    The weights of these experts, and their gradients, come from the model's own scores: its router runs as ever, and
    where it calls torch.topk, the values are the scores at the recorded ids. The n-th forward of a layer takes its n-th
    recorded call; activation checkpointing of either kind takes the ids of the forward that it recomputes, also in a
    backward behind the context. Tokens that a rearranged recording doesn't know choose by themselves. Over ranks each
    replays its own recording of its own tokens. Experts get the recorded ids or the forward raises, on every rank. What
    it yields has counted of how many pairs the routers would have chosen other experts: see ReplayCounts.

    Raises:
        ValueError: the model has other layers or experts than the recording, or is compiled; in a forward: other tokens
            or K than recorded, more forwards, a router that can't be replayed; at the end: fewer forwards.
        TypeError: no recording. ImportError: transformers is missing or too old.
    Example:
        with tmt.replay_routing(model, recording) as counts:
            model(**batch).loss.backward()
        share = counts.num_changed_pairs / counts.num_pairs
    """
    if not isinstance(recording, RoutingRecording):
        raise TypeError(
            f"recording must be a RoutingRecording, got {type(recording).__name__}: RoutingRecording.load()"
        )
    found = uncompiled_experts(model)
    owner = f"this {type(model).__name__}"
    check_same_layers(recording, {routed.layer: routed.num_experts for routed in found.values()}, owner)
    replay = _Replay(model, found, recording)
    try:
        yield ReplayCounts(replay.layers)
    except BaseException:
        replay.close()
        raise
    replay.close()
    replay.check_all_taken()


class ReplayCounts:
    """What the forwards of a replay have taken so far, summed over layers; recomputes count nowhere.

    Each number is an int64 tensor () on the device of the first layer: nothing is read on the host.
    """

    def __init__(self, layers: Sequence[LayerReplay]) -> None:
        self._layers = layers

    def _sum(self, number: int) -> Tensor:
        counts = [layer.counts[number] for layer in self._layers if layer.counts is not None]
        return torch.stack([count.to(counts[0].device) for count in counts] or [torch.tensor(0, device="cpu")]).sum()

    @property
    def num_replayed_tokens(self) -> Tensor:
        """The tokens that took recorded ids, in each layer anew."""
        return self._sum(0)

    @property
    def num_pairs(self) -> Tensor:
        """Their pairs, where the router's own choice is known: everywhere, but where it chooses groups of experts in a
        way that the replay doesn't know."""
        return self._sum(1)

    @property
    def num_changed_pairs(self) -> Tensor:
        """Those of these pairs whose experts the router itself, by its scores in this forward, hadn't chosen."""
        return self._sum(2)


class _Replay:
    """The hooks of a replay: they go when no backward can recompute a forward of it any more."""

    def __init__(self, model: nn.Module, found: dict[str, RoutedExperts], recording: RoutingRecording) -> None:
        by_name = {routed.layer: LayerReplay(routed.layer, recording.layers[routed.layer]) for routed in found.values()}
        self.layers = list(by_name.values())
        self.has_failed = False

        def end(module: nn.Module, _: object, result: object) -> None:
            if module is model and not is_recomputing():  # whose exceptions may end a recompute early
                self.has_failed |= result is None and sys.exc_info()[0] is not None

        # All hooks are functions, which a copy of the model leaves as they are: of methods it would copy the replay.
        self.hooks: list[RemovableHandle] = [model.register_forward_hook(end, always_call=True)]
        for routed in found.values():
            self._hook(by_name[routed.layer], routed)

    def _hook(self, layer: LayerReplay, routed: RoutedExperts) -> None:
        block, is_own = routed.block, isinstance(routed.block, MoELayer)
        if block is None:
            raise ValueError("replay needs the router: pass the model that holds these experts")

        def start(module: nn.Module, _: object) -> None:
            if module is not block or in_dummy_forward():  # a copy of the model has the hooks too
                return
            refuse_compiler()
            self._drop_hooks()
            layer.start()

        def finish(module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            if module is not routed.experts or in_dummy_forward():
                return
            try:
                if self.has_failed and layer.is_open:
                    raise ValueError(
                        "a forward has failed in this replay, and the order of calls is lost: begin a new replay"
                    )
                layer.finish(routed_ids(arguments, keywords)[0], allow_skipped=is_own)
            except ValueError:
                if routed.transport is not None:
                    abort_call(routed.transport)
                raise

        def end(module: nn.Module, *_: object) -> None:
            if module is block:
                layer.end()

        self.hooks += [
            block.register_forward_pre_hook(start),
            routed.experts.register_forward_pre_hook(finish, with_kwargs=True),
            block.register_forward_hook(end, always_call=True),
        ]

    def close(self) -> None:
        """End the replay of new forwards."""
        for layer in self.layers:
            layer.end()
            layer.is_open = False
        self._drop_hooks()

    def _drop_hooks(self) -> None:
        if not any(layer.is_open or layer.has_recomputes for layer in self.layers):
            for hook in self.hooks:
                hook.remove()

    def check_all_taken(self) -> None:
        """Raise ValueError unless every recorded call was taken."""
        for layer in self.layers:
            if layer.num_left:
                raise ValueError(
                    f"the recording has {len(layer.recording.num_tokens)} calls of {layer.name}, and {layer.next_call} "
                    f"were replayed: run as many forwards as were recorded, or rearrange the recording; {COMPILED}"
                )
