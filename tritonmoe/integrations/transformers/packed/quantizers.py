"""Loading of quantised checkpoints with their experts packed: what transformers' quantizers become."""

from tritonmoe.integrations.transformers.names import EXPERTS_IMPLEMENTATION

__all__ = ["load_packed", "register_fp8_experts"]


def register_fp8_experts() -> None:
    """Let transformers' own modules of FP8 experts run through tritonmoe, by its name."""
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:  # a release before that registry
        return
    from tritonmoe.integrations.transformers.experts import experts_forward

    ALL_FP8_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def load_packed() -> None:
    """Let from_pretrained() keep experts of MXFP4 and FP8 checkpoints packed; calling it again changes nothing.

    Raises:
        ImportError: this transformers loads such checkpoints otherwise than is known here.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    try:
        from tritonmoe.integrations.transformers.packed.packed_quantizers import PACKED_QUANTIZERS
    except ImportError as error:
        raise ImportError(
            f"register(packed=True) needs transformers 5.24, whose loading of quantised checkpoints it continues: "
            f"{error}. Older ones load such checkpoints with Mxfp4Config(dequantize=True)"
        ) from error
    AUTO_QUANTIZER_MAPPING.update(PACKED_QUANTIZERS)
