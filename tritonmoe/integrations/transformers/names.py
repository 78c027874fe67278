"""The names that transformers knows tritonmoe by, and that it gives to arguments of its models."""

__all__ = ["CACHES", "EP_REGISTRY_SINCE", "EXPERTS_IMPLEMENTATION", "STATE_TO_SAVE"]

EXPERTS_IMPLEMENTATION = "tritonmoe"
EP_REGISTRY_SINCE = (5, 23)
"""The release of transformers whose models take an expert-parallel implementation by its name."""
STATE_TO_SAVE = "_tritonmoe_state_to_save"
"""The attribute of a model that holds, while it is saved, the state dict that save_pretrained was given."""
CACHES = ("cache", "past_key_values")
"""The arguments with keys and values of earlier tokens."""
