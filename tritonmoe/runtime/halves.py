"""Half: one of two halves of a batch that take turns in one thread, each in a greenlet of its own.

A greenlet is a function call that can be left in its middle, with all calls that it has made, for another one. The
halves hand over to each other at the same places of the program, one after the other, so every rank runs the pieces of
both in the same order, and posts its exchanges in it.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from tritonmoe.runtime.thread_state import ThreadState

__all__ = ["Half", "NodeOrder", "current_half", "for_both_halves", "keep_for_this_half", "run_in_turns"]

Result = TypeVar("Result")

_current: "contextvars.ContextVar[Half | None]" = contextvars.ContextVar("tritonmoe_half", default=None)
"""Every greenlet has a context of its own."""


class NodeOrder:
    """The order in which both halves make the autograd nodes that post and wait, which their backward must reverse.

    Autograd does so by itself, in one thread: a node is made after those whose results it uses, and among the nodes
    that may run the youngest runs first. Ranks whose nodes ran in another order would wait for each other's exchanges.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._task = -1
        self._latest = -1

    def next_number(self) -> int:
        """Return the number of the node that is made now."""
        return next(self._numbers)

    def check(self, number: int) -> None:
        """Raise RuntimeError if an older node than this one has already run in this backward, or this one itself."""
        task = torch._C._current_graph_task_id()
        if task == self._task and number >= self._latest:
            raise RuntimeError(
                "autograd runs the backward of two batches in another order than the reverse of the forward, and the "
                "other ranks follow the reverse of the forward: keep the layers, and all modules between them, on "
                "one device"
            )
        self._task, self._latest = task, number


class Half:
    """One of the two, and where it is."""

    def __init__(self, function: Callable[[], object], number: int, nodes: NodeOrder) -> None:
        from greenlet import greenlet

        self.number = number
        """1 or 2."""
        self.nodes = nodes
        self.calls: list[object] = []
        """What tells apart the layers that it has called, in their order."""
        self._left: dict[tuple, object] = {}
        """What it has left for the second half at the same place of the program, if it is the first one."""
        self.has_ended = False
        self.is_closed = False
        self.result: Any
        self.sibling: Half
        self.state: ThreadState
        """Of the thread, when this half was left."""
        self.kept: dict[tuple[int, str], tuple[object, object]] = {}
        """By object and name: attributes that the halves set on what they share, and this half's values."""
        self._function = function
        self.greenlet = greenlet(self._run)
        self.greenlet.gr_context = contextvars.copy_context()

    def _run(self) -> None:
        _current.set(self)
        self.state.put()
        self.result = self._function()
        self.has_ended = True
        self.state = ThreadState.take()

    def begin_call(self, layer: object) -> None:
        """Note that this half calls a layer.

        Raises:
            ValueError: the other half calls another one, or none, at this place.
        """
        self._check_open()
        place = len(self.calls)
        self.calls.append(layer)
        theirs = self.sibling.calls
        if place < len(theirs) and theirs[place] != layer:
            raise ValueError(
                f"the halves of a batch must call the same layers in the same order: call {place + 1} is of another "
                f"layer in half {self.number} than in half {self.sibling.number}"
            )
        self._check_calls_of_ended()

    def leave(self, name: Hashable, value: object) -> None:
        """Keep a value that the second half takes when it has called as many layers as this half has now."""
        self._left[len(self.calls), name] = value

    def take(self, name: Hashable) -> object:
        """Return what the first half has left at this place of the program, once; None where it has left nothing."""
        return self.sibling._left.pop((len(self.calls), name), None)

    def hand_over(self) -> None:
        """Run the other half until it hands over too, or ends.

        Raises:
            ValueError: it has ended, and called fewer layers. GreenletExit: it has failed.
        """
        self._check_open()
        if not self.sibling.has_ended:
            self.state = ThreadState.take()
            try:
                self.sibling.greenlet.switch()
            finally:
                self.state.put()
                for (_, name), (owner, value) in self.kept.items():
                    setattr(owner, name, value)
        self._check_calls_of_ended()

    def _check_open(self) -> None:
        from greenlet import GreenletExit, getcurrent

        if self.is_closed:
            raise GreenletExit("the other half of the batch has failed")
        if getcurrent() is not self.greenlet:
            raise RuntimeError("the layers of half a batch must be called by its own function, in its own thread")

    def _check_calls_of_ended(self) -> None:
        sibling = self.sibling
        if sibling.has_ended and len(sibling.calls) < len(self.calls):
            raise ValueError(
                f"the halves of a batch must call the same layers in the same order: half {sibling.number} has ended "
                f"after {len(sibling.calls)} calls of layers, and half {self.number} makes one more"
            )

    def close(self, error: BaseException) -> None:
        """End this half where it stands, since one of them has raised this error."""
        from greenlet import GreenletExit

        self.is_closed = True
        if self.greenlet and not self.greenlet.dead:
            # What it raises on its way out would hide the error that ended both.
            with contextlib.suppress(Exception):
                self.greenlet.throw(GreenletExit(f"the other half of the batch raised {type(error).__name__}: {error}"))


def current_half() -> Half | None:
    """Return the half that runs now; None outside of two batches."""
    return _current.get()


def keep_for_this_half(owner: object, *names: str) -> None:
    """Keep these attributes of an object for the half that runs now, whatever the other half sets.

    When both have ended the attributes are None: what one half left is not the batch's.
    """
    half = current_half()
    if half is not None:
        for name in names:
            half.kept[id(owner), name] = owner, getattr(owner, name)


def for_both_halves(source: Tensor, dtype: torch.dtype, make: Callable[[], Result]) -> Result:
    """Return make(); to the second half of a batch what it gave to the first one at this place, of the same source.

    So gradients of both halves are summed before autograd goes on to the source. What is made depends on the source,
    which FSDP2 may have exchanged since, on this dtype and on nothing else that the halves do.
    """
    half = None if torch.compiler.is_compiling() else current_half()
    if half is None:
        return make()
    name = id(source), dtype, torch.is_grad_enabled()
    if half.number == 2:
        left = half.take(name)
        return cast(Result, left.result) if isinstance(left, _Made) else make()
    result = make()
    half.leave(name, _Made(source, result))
    return result


class _Made(NamedTuple):
    """What the first half made."""

    source: Tensor
    """Kept, so that no other tensor gets its id."""
    result: object


def run_in_turns(functions: Sequence[Callable[[], Result]]) -> tuple[Result, Result]:
    """Run two functions, each up to its next hand_over() in turn, the first one first, and give what both returned.

    Random numbers: the first goes on with the global generators, the second one has its own, seeded from them.
    """
    nodes = NodeOrder()
    first, second = halves = [Half(function, number, nodes) for number, function in enumerate(functions, 1)]
    first.sibling, second.sibling = second, first
    second.state = ThreadState.take().with_other_numbers()
    before = first.state = ThreadState.take()
    try:
        while not (first.has_ended and second.has_ended):
            for half in halves:
                if not half.has_ended:
                    half.greenlet.switch()
        before = replace(before, generators=first.state.generators)
        return first.result, second.result
    except BaseException as error:
        for half in halves:
            half.close(error)
        raise
    finally:
        before.put()
        for half in halves:
            for (_, name), (owner, _) in half.kept.items():
                setattr(owner, name, None)
        for half in halves:  # they hold each other, and with that what they have computed
            vars(half).clear()
