"""Recordings of several unlike layers, put together from those of one each."""

from dataclasses import replace
from pathlib import Path

from tests.support.synthetic_runs import Run, write_run
from tritonmoe.dispatch.count_exchange import CallMarks
from tritonmoe.tools.recording.call_recording import RecordedPass, Recording
from tritonmoe.tools.recording.recording_reader import read_recording

BETWEEN_S = 0.01
"""After the last rank has ended a pass, the first one enters the next."""


def of_layers(folder: Path, steps_of: list[list[Run]]) -> Recording:
    """Return a recording of layers, of each of which its steps' runs are given: all forwards, then all backwards."""
    layers = [read_recording(write_run(folder / str(layer), steps, seed=layer)) for layer, steps in enumerate(steps_of)]
    size, num_steps, at = layers[0].size, len(steps_of[0]), 100.0
    passes: dict[tuple[int, int, int], list[RecordedPass]] = {}
    for step in range(num_steps):
        forward = [(step, layer, 0) for layer in range(len(layers))]
        for place in [*forward, *((step, layer, 1) for _, layer, _ in reversed(forward))]:
            own = layers[place[1]].calls[step].by_pass[place[2]]
            by_s = at - min(one.entered for one in own)
            passes[place] = [later(one, by_s) for one in own]
            at = max(one.end for one in passes[place]) + BETWEEN_S
    calls = []
    for step in range(num_steps):
        for layer, of in enumerate(layers):
            call = of.calls[step]
            ranks = [
                replace(
                    call.ranks[rank],
                    forward=passes[step, layer, 0][rank],
                    backward=passes[step, layer, 1][rank],
                )
                for rank in range(size)
            ]
            calls.append(replace(call, layer=layer, sequence=len(calls), ranks=tuple(ranks)))
    return replace(layers[0], calls=tuple(calls))


def later(one: RecordedPass, by_s: float) -> RecordedPass:
    """Return a pass so much later."""
    marks = one.marks and CallMarks(*(moment + by_s for moment in one.marks))
    return replace(one, marks=marks, origin=one.origin + by_s)
