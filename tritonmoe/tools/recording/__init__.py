"""Recordings of layer calls: what `record` writes and `tritonmoe doctor` reads."""

from tritonmoe.tools.recording.recorder import on_trace_ready, record

__all__ = ["on_trace_ready", "record"]
