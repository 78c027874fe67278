"""What bounds a step, and what would help."""

from tritonmoe.diagnosis.recorder import record
from tritonmoe.diagnosis.trace_writer import on_trace_ready

__all__ = ["on_trace_ready", "record"]
