"""two_batches(): a model runs both halves of each batch at once, and gives what the whole batch gives."""

import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from tritonmoe.expert_parallel.plans.halves import two_batches as run_two_batches
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.requirements import CACHES, check_model, check_transformers
from tritonmoe.layer import MoELayer
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.transports import Transport, as_transport

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

__all__ = ["HalvedForward", "HalvesTrial", "split", "two_batches"]

Arguments: TypeAlias = dict[str, Any]
"""The arguments of a model's forward, by name."""
SPLIT = {
    "input_ids": {2: 0},
    "inputs_embeds": {3: 0},
    "attention_mask": {2: 0, 4: 0},
    "position_ids": {2: 0, 3: 1},  # (3 or 4, B, S) where a model turns by time, height and width
    "token_type_ids": {2: 0},
    "labels": {1: 0, 2: 0},
    "shift_labels": {2: 0},
}
"""The arguments of a model's forward that are split: by how many dimensions they have, which is the batch.

Other tensors can't be split, whatever size their first dimension happens to have.
"""
JOINED = ("logits", "last_hidden_state", "hidden_states", "attentions", "router_logits")
"""The results, or tuples of results, whose first dimension is the batch."""
SHARED = ("num_items_in_batch", "logits_to_keep")
"""Tensors that both halves get as they are."""

ORDER = (True, False, False, True, True, False, False, True)
"""Which of the tried steps run in halves. Both ways stand at even and at odd places, since in gradient accumulation
every second step may be followed by an optimizer's."""
SMALLEST_GAIN = 0.02
"""Steps run in halves if they are faster by at least this share."""


def _by_name(given: inspect.BoundArguments, signature: inspect.Signature) -> Arguments:
    """Return the arguments by name, those in **kwargs too."""
    flat: Arguments = {}
    for name, value in given.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL and value:
            raise ValueError("two_batches takes the arguments of a model's forward by name: call model(input_ids=...)")
        else:
            flat[name] = value
    return flat


def _batch_size(arguments: Arguments) -> int:
    """Return how many sequences the batch has."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(arguments.get(name), Tensor):
            return arguments[name].shape[0]
    raise ValueError("two_batches needs input_ids or inputs_embeds to see how many sequences the batch has")


def split(arguments: Arguments, size: int, first: int) -> tuple[Arguments, Arguments]:
    """Return each half's own arguments; those of one sequence are for all."""
    halves: tuple[Arguments, Arguments] = {}, {}
    for name, value in arguments.items():
        if name in SHARED or value is None or isinstance(value, bool | int | float | str):
            continue
        dim = SPLIT.get(name, {}).get(value.dim()) if isinstance(value, Tensor) else None
        if dim is None or value.shape[dim] not in (1, size):
            said = f"a {tuple(value.shape)} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"two_batches can't split {name} ({said}) of a batch of {size} sequences: it splits "
                f"{', '.join(SPLIT)}, whose first dimension is the batch, and position_ids of three dimensions, whose "
                "second one is"
            )
        if value.shape[dim] == size:
            for half, part in zip(halves, value.tensor_split([first], dim), strict=True):
                half[name] = part
    return halves


def _num_targets(arguments: Arguments) -> Tensor | int:
    """Return how many tokens of the whole batch have a target."""
    given = arguments.get("num_items_in_batch")
    if given is not None:
        return given
    targets = arguments.get("shift_labels")
    if targets is None:
        targets = arguments["labels"][..., 1:]
    return (targets != arguments.get("ignore_index", -100)).sum()


@dataclass
class HalvesTrial:
    """What is known of a model's training steps so far; it is the same on every rank.

    A step's time is that from its forward's beginning to the next one's, on the slowest rank. First come steps of whole
    batches, in which num_chunks="auto" settles, and then steps of both kinds in turn.
    """

    num_layers: int
    num_steps: int = 0
    times_ns: dict[bool, list[int]] = field(default_factory=lambda: {True: [], False: []})
    """Of the tried steps, by whether they ran in halves."""
    decision: bool | None = None
    reason: str = ""
    """Of the decision, in one sentence."""
    _began: float | None = None
    _tried: bool | None = None
    """Whether the step that runs now is in halves, if it is one of those that are tried."""

    @property
    def num_settling(self) -> int:
        """How many steps come before those that are tried."""
        return -(-SETTLING_CALLS // self.num_layers) + 1

    def elapsed_ns(self) -> int:
        """Return this rank's time of the step before the one that begins now; 0 where nothing is to be compared."""
        before, self._began = self._began, time.perf_counter()
        return 0 if before is None or self.decision is not None else max(1, int((self._began - before) * 1e9))

    def end(self, slowest_ns: int) -> None:
        """Take in the slowest rank's time of the step that has ended, if that was tried."""
        if self._tried is not None:
            self.times_ns[self._tried].append(slowest_ns)
        self._tried = None

    def interrupt(self) -> None:
        """Forget the step that runs now: what comes before the next one is none. A tried one is tried again."""
        if self._tried is not None:
            self.num_steps -= 1
        self._began = self._tried = None

    def begin(self) -> tuple[bool, str]:
        """Begin a step that could run in halves; return whether it does, and why."""
        place = self.num_steps - self.num_settling
        if self.decision is None and place >= len(ORDER):
            self._decide()
        self.num_steps += 1
        if self.decision is not None:
            return self.decision, self.reason
        if place < 0:
            return False, f"step {self.num_steps} of {self.num_settling} before two halves are tried"
        self._tried = ORDER[place]
        return ORDER[place], f"trying both ways: step {place + 1} of {len(ORDER)}"

    def _decide(self) -> None:
        halves_ms, whole_ms = (statistics.median_low(self.times_ns[is_halved]) / 1e6 for is_halved in (True, False))
        self.decision = halves_ms < (1 - SMALLEST_GAIN) * whole_ms
        words = "faster" if self.decision else f"not faster by {SMALLEST_GAIN:.0%}"
        self.reason = f"two halves were {words}: steps took {halves_ms:.1f} ms, and of one batch {whole_ms:.1f} ms"


class HalvedForward:
    """A model's forward in two halves; what two_batches() puts in the place of the model's own."""

    def __init__(
        self,
        model: "PreTrainedModel",
        spread: Sequence[nn.Module],
        transports: Sequence[Transport],
        trial: HalvesTrial | None,
    ) -> None:
        self.model = model
        self.spread = spread
        """Its experts modules that are spread over ranks."""
        self.transports = transports
        """Over which ranks agree: those of the experts, and the replicas of these."""
        self.trial = trial
        """What decides; None where batches are always halved."""
        self.choice = "there was no forward yet"
        """What the last forward did, and why, in one sentence."""
        self._own = model.__dict__.get("forward")
        self.__signature__ = inspect.signature(self.forward)  # Trainer reads it

    @property
    def forward(self) -> "Callable[..., ModelOutput]":
        """The model's own forward."""
        return self._own or type(self.model).forward.__get__(self.model)

    def remove(self) -> None:
        """Put the model's own forward back."""
        if self._own is None:
            del self.model.__dict__["forward"]
        else:
            self.model.forward = self._own

    def __call__(self, *positional: object, **named: object) -> object:
        given = self.__signature__.bind(*positional, **named)
        arguments = _by_name(given, self.__signature__)
        why_whole = self._why_whole(arguments)
        if why_whole and self.trial is not None:
            self.trial.interrupt()
        is_halved, reason = (False, why_whole) if why_whole else self._agree(arguments)
        before = self._reports()
        if is_halved:
            output = self._run_halves(arguments, reason)
        else:
            self.choice = f"one batch: {reason}"
            output = self.forward(*positional, **named)
        for report, earlier in zip(self._reports(), before, strict=True):
            if report is not None and report is not earlier:
                report.choice += f" ({self.choice})"
        return output

    def _reports(self) -> list[LayerReport | None]:
        return [shards.calls.last_report for shards in map(shards_of, self.spread) if shards is not None]

    def _agree(self, arguments: Arguments) -> tuple[bool, str]:
        """Return whether all ranks halve this batch, and why.

        Raises:
            ValueError: some rank's batch can't be split.
        """
        is_training = self.model.training and torch.is_grad_enabled()
        trial = self.trial if is_training and not torch.are_deterministic_algorithms_enabled() else None
        if trial is None and self.trial is not None:
            self.trial.interrupt()
        elapsed_ns = 0 if trial is None else trial.elapsed_ns()
        size, refusal = 2, None
        try:
            size = _batch_size(arguments)
            split(arguments, size, size // 2)
        except ValueError as error:
            refusal = error
        told = torch.tensor([-size, elapsed_ns, refusal is not None], device="cpu")
        for transport in self.transports:
            transport.all_reduce(told, "max")
        smallest, slowest_ns, is_refused = -int(told[0]), int(told[1]), bool(told[2])
        if trial is not None:
            trial.end(slowest_ns)
        if smallest < 2:
            return False, f"the batch of some rank has {smallest} sequences, and one sequence is not split"
        is_halved, reason = (True, "") if trial is None else trial.begin()
        if is_halved and is_refused:
            if trial is not None:
                trial.interrupt()  # this step's time will be none
            raise refusal or ValueError("two_batches can't split the batch of another rank, whose own error says why")
        return is_halved, reason

    def _why_whole(self, arguments: Arguments) -> str:
        """Return why no rank splits this batch, "" where ranks may; decided by how the model is called."""
        if any(arguments.get(name) is not None for name in CACHES):
            return "the keys and values of earlier tokens are in one cache"
        use_cache = arguments.get("use_cache")
        if use_cache is None and not self.model.training:
            use_cache = getattr(self.model.config, "use_cache", False)
        if use_cache:
            return "use_cache=True asks for one cache of the keys and values of all sequences"
        return ""

    def _run_halves(self, arguments: Arguments, reason: str) -> "ModelOutput | tuple":
        size = _batch_size(arguments)
        first = (size + 1) // 2
        self.choice = f"two halves, of {first} and {size - first} sequences" + (reason and f": {reason}")
        returns_dict = arguments.pop("return_dict", None)
        if returns_dict is None:
            returns_dict = self.model.config.return_dict
        labels = arguments.get("labels")
        shared = {**arguments, "return_dict": True}
        kinds = {parameter.kind for parameter in self.__signature__.parameters.values()}
        if "use_cache" in self.__signature__.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
            shared["use_cache"] = False
        halves = [shared | part for part in split(arguments, size, first)]
        with nullcontext() if labels is None else self._loss_over_whole_batch(arguments):
            outputs = run_two_batches(lambda half: self.forward(**half), *halves)
        joined = self._join(outputs, arguments)
        return joined if returns_dict else joined.to_tuple()

    @contextmanager
    def _loss_over_whole_batch(self, arguments: Arguments) -> Iterator[None]:
        """Make the model's loss of a half its share of the mean over all target tokens of the batch."""
        from transformers import PreTrainedModel
        from transformers.loss.loss_utils import ForCausalLMLoss

        # the one whose loss it is, inside of PEFT's model
        model = next(inner for inner in self.model.modules() if isinstance(inner, PreTrainedModel))
        if model.loss_function is not ForCausalLMLoss:
            raise ValueError(
                f"{type(model).__name__} computes its loss itself, and two_batches can't compute that loss from "
                "halves: leave out `labels`, and compute the loss of the logits"
            )
        loss = _ShareOfLoss(model.loss_function, _num_targets(arguments))
        before = model.__dict__.get("_loss_function")
        model.loss_function = loss
        try:
            yield
        finally:
            if before is None:
                del model.__dict__["_loss_function"]
            else:
                model.loss_function = before
        if loss.num_calls != 2:
            raise ValueError(
                f"{type(model).__name__} doesn't compute its loss by one call of its loss_function, so two_batches "
                "can't weight the losses of the halves: leave out `labels`, and compute the loss of the logits"
            )

    def _join(self, outputs: tuple["ModelOutput", ...], arguments: Arguments) -> "ModelOutput":
        """Return one output of the halves' outputs."""
        first, second = outputs
        joined: Arguments = {}
        for name in first:
            parts = first[name], second[name]
            if name in ("loss", "aux_loss") or parts[0] is None:
                continue
            if name not in JOINED:
                raise ValueError(
                    f"{type(self.model).__name__} gives {name}, and two_batches doesn't know how to join the values "
                    "of two halves: switch that output off"
                )
            if isinstance(parts[0], Tensor):
                joined[name] = torch.cat(parts)
            else:
                joined[name] = tuple(torch.cat(pair) for pair in zip(*parts, strict=True))
        if first.get("loss") is not None:
            joined["loss"] = first["loss"] + second["loss"]
        if first.get("aux_loss") is not None:
            self._join_aux_loss(joined, first["aux_loss"] + second["aux_loss"], arguments)
        return type(first)(**joined)

    def _join_aux_loss(self, joined: Arguments, of_halves: Tensor, arguments: Arguments) -> None:
        """Put in the auxiliary loss of the whole batch, which is no mean of the halves', and into the loss too."""
        model = self.model
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        names = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        if function is None or not all(hasattr(model, name) for name in names) or "router_logits" not in joined:
            raise ValueError(
                f"two_batches can't compute the auxiliary loss of {type(model).__name__} from its router logits: "
                "call it with output_router_logits=False"
            )
        whole = function(
            joined["router_logits"], model.num_experts, model.num_experts_per_tok, arguments.get("attention_mask")
        )
        joined["aux_loss"] = whole
        if "loss" in joined:  # each half has added its own; their gradients cancel exactly
            joined["loss"] = joined["loss"] + model.router_aux_loss_coef * (whole - of_halves).to(joined["loss"].device)


class _ShareOfLoss:
    """A loss function of transformers that divides by the number of targets of the whole batch."""

    def __init__(self, function: Callable[..., Tensor], num_targets: Tensor | int) -> None:
        self._function, self._num_targets = function, num_targets
        self.num_calls = 0

    def __call__(self, *positional: object, **named: object) -> Tensor:
        self.num_calls += 1
        return self._function(*positional, **{**named, "num_items_in_batch": self._num_targets})


def two_batches(model: nn.Module, when: Literal["always", "auto"] = "always") -> HalvedForward:
    """Make every forward of a model run both halves of its batch at once, each while rows of the other are under way.

    The model's experts are spread over ranks before, by `parallelize` or at loading (`ep_implementation`); wrappers
    (DistributedDataParallel, FSDP2, Trainer) come after. Outputs, the loss and all gradients are those of the whole
    batch: the loss is the mean over its target tokens, the auxiliary loss is taken of all router logits. Ranks may have
    other numbers of sequences. Where some rank has one sequence only, and where a cache is asked for, as in generation,
    every rank runs its batch whole: `choice` of what this gives says which it was. Its remove() gives the model its own
    forward back. Dropout draws other numbers than in one batch. See tritonmoe.two_batches for what can't be done.

    Args:
        when: "auto" tries both ways for some training steps, once num_chunks="auto" has settled, and keeps halves if
            steps are faster by at least 2 %; ranks decide alike. No time decides, and batches are halved, under
            torch.use_deterministic_algorithms and outside of training.
    Raises:
        ValueError: the model's experts are not spread over ranks, or the model was upcycled in place, whose auxiliary
            loss is of the whole batch; in a forward: an argument, loss or result that can't be of two halves.
        TypeError: model is no module. ImportError: transformers or greenlet is missing.
    """
    if when not in ("always", "auto"):
        raise ValueError(f'when must be "always" or "auto", got {when!r}')
    check_transformers()
    check_model(model)
    if any(isinstance(module, MoELayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} was upcycled in place, and its auxiliary loss is computed from the whole batch: "
            "call tritonmoe.two_batches with a function that computes the loss of a half"
        )
    over = {experts: shards for experts in experts_modules(model).values() if (shards := shards_of(experts))}
    if not over:
        raise ValueError(
            f"the experts of {type(model).__name__} are not spread over ranks, and two halves would hide nothing: call "
            "parallelize(model, group) first"
        )
    if isinstance(model.__dict__.get("forward"), HalvedForward):
        raise ValueError(f"this {type(model).__name__} runs its batches in halves already: call two_batches() once")
    transports = dict.fromkeys(shards.transport for shards in over.values())
    replicas = [shards.sharding.replicas for shards in over.values() if shards.sharding.replicas is not None]
    transports |= dict.fromkeys(as_transport(mesh) for mesh in replicas)
    trial = HalvesTrial(len(over)) if when == "auto" else None
    halved = HalvedForward(cast("PreTrainedModel", model), list(over), tuple(transports), trial)
    model.forward = halved
    return halved
