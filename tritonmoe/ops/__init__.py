"""Tensors on one device: grouping, kernels, backends, and compiling ahead of time."""
