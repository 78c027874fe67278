"""What bounds a step, and what would help."""

from tritonmoe.diagnosis.recorder import record

__all__ = ["record"]
