"""The name that transformers knows tritonmoe by, and since when it has the place for it."""

__all__ = ["EP_REGISTRY_SINCE", "EXPERTS_IMPLEMENTATION"]

EXPERTS_IMPLEMENTATION = "tritonmoe"
EP_REGISTRY_SINCE = (5, 23)
"""The release of transformers whose models take an expert-parallel implementation by its name."""
