"""What `tritonmoe demo` runs."""

from tritonmoe.demo.model import Text, load_shakespeare

__all__ = ["Text", "load_shakespeare"]
