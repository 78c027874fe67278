"""What `tritonmoe demo` runs."""

from tritonmoe.tools.demo.model import Text, load_shakespeare

__all__ = ["Text", "load_shakespeare"]
