"""read_literal: Python literals read by one thread at a time."""

import ast
import threading
from typing import Any

__all__ = ["read_literal"]

_reading = threading.Lock()


def read_literal(text: str) -> Any:
    """Return the value of a Python literal.

    Threads that read at the same time can make CPython 3.11 raise SystemError ("AST constructor recursion depth
    mismatch"), and emulated ranks are threads.
    Raises:
        ValueError, SyntaxError: it is none.
    """
    with _reading:
        return ast.literal_eval(text)
