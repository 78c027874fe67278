"""NVIDIA's part of the machine: PTX, its memory, copies and matrix products, from Ampere to Blackwell."""
