"""The name that transformers knows tritonmoe by, and the release from which on models take it for whole meshes."""

__all__ = ["EP_REGISTRY_SINCE", "EXPERTS_IMPLEMENTATION"]

EXPERTS_IMPLEMENTATION = "tritonmoe"
EP_REGISTRY_SINCE = (5, 23)
"""The release of transformers whose models take an expert-parallel implementation by its name."""
