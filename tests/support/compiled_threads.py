"""compiles_in_threads: a mark of tests in which emulated ranks compile."""

import pytest
import torch

__all__ = ["compiles_in_threads"]

compiles_in_threads = pytest.mark.skipif(
    torch.__version__.startswith(("2.10.", "2.11.")),
    reason="torch 2.11 crashes where threads compile, as emulated ranks do, or in what is compiled after them",
)
