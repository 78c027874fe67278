"""What bounds a step, and what would help."""

from tritonmoe.tools.recording.recorder import record
from tritonmoe.tools.recording.trace_writer import on_trace_ready

__all__ = ["on_trace_ready", "record"]
