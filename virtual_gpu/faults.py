"""What a kernel can do wrong."""

__all__ = ["Deadlock", "MemoryFault"]


class MemoryFault(RuntimeError):
    """An access outside memory, misaligned, or not ordered after one that it conflicts with."""


class Deadlock(RuntimeError):
    """A barrier or a loop that nothing will end."""
