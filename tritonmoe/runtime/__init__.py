"""PyTorch and the machine: what any part of the package may need of them."""
