"""The Triton kernels, a file each, and how they are launched."""
