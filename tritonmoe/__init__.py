"""Mixture-of-Experts layers with Triton kernels and compute/communication overlap."""

__version__ = "0.1.0"
