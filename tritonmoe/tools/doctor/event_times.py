"""EventTimes: when the events of recorded passes began, what they did and how long they waited, as tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import floats
from tritonmoe.tools.doctor.recorded_steps import COUNTS, Events
from tritonmoe.tools.recording.call_recording import RecordedPass
from tritonmoe.tools.recording.pass_steps import PassSteps, times_of

__all__ = ["EventTimes"]


class EventTimes:
    """When the events of passes that consist of the same ones began, by the recording's clock; all of them (Q,)."""

    def __init__(self, passes: Sequence[RecordedPass], events: Events) -> None:
        origin, total_s = (floats([getattr(one, name) for one in passes]) for name in ("origin", "total_s"))
        entered, posted, left = (
            floats([one.origin if one.marks is None else one.marks[n] for one in passes]) for n in range(3)
        )

        def numbers(of: Sequence[PassSteps]) -> Tensor:
            return times_of(of, [range(len(of[0]))])

        steps = {False: numbers([one.steps for one in passes]), True: numbers([one.steps_inside for one in passes])}
        nothing = torch.zeros_like(origin)
        self.start: list[Tensor] = []
        self.body: list[Tensor] = []
        self.units: list[Tensor] = []
        self.ended: list[Tensor] = []
        """Of every exchange, in the order in which they are posted."""
        self.waited: list[Tensor] = []
        waits: list[Tensor] = []
        """For how long each exchange is waited for."""
        for event in events.events:
            if event.kind is not None:
                start_s, end_s, wait_s, post_s, units = steps[event.is_inside][:, event.place].unbind(1)
                start, body = origin + start_s, post_s if event.posts >= 0 else (end_s - start_s).clamp(min=0)
                units = 0 * units if event.is_inside and event.kind.is_inside_node else units
            elif event.name == COUNTS:
                start, body, units, wait_s = entered, (posted - entered).clamp(min=0), nothing, left - posted
            elif event.name == "plan":
                start, body, units = left, (origin - left).clamp(min=0), nothing
            else:
                start, body, units = origin + total_s, nothing, nothing
            self.start.append(start)
            self.body.append(body)
            self.units.append(units)
            if event.posts >= 0:
                self.ended.append(left if event.kind is None else origin + end_s)
                waits.append(wait_s)
            self.waited.append(sum((waits[exchange] for exchange in event.waits), nothing))
