"""A GPU in NumPy: runs compiled kernels without one, to see their values, and accesses that are not in order.

Only what kernels of this project use is there; anything else raises. It says nothing of time.
"""

__all__ = ["VIRTUAL_GPUS"]

VIRTUAL_GPUS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
"""What kernels can be compiled for, and run."""
