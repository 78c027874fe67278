"""Which activation an experts module of transformers has: one that the kernels know, or its own method.

Most families have the library's default gate, `act_fn(gate) * up`. About ten override `_apply_gate`; the clamped ones
are listed here, and a test compares each with the class's own code. Everything else runs as a callable between the
two grouped products: always right, not fused.
"""

from typing import Any

from torch import nn

from tritonmoe.config.activations import Activation, ClampedSwiGLU, SoftcappedSwiGLU
from tritonmoe.integrations.transformers.discovery import ExpertsClass, ExpertsModule

__all__ = ["CLAMPED_GATES", "SOFTCAPPED_GATES", "choose_activation", "fused_name", "named_activation"]

DEFAULT_GATE = "_default_apply_gate"

CLAMPED_GATES: dict[str, tuple[str, str | None, bool]] = {
    "GptOssExperts": ("limit", "alpha", True),
    "OpenAIPrivacyFilterExperts": ("limit", "alpha", False),
    "MiniMaxM3VLExperts": ("swiglu_limit", "swiglu_alpha", False),
    "DeepseekV4Experts": ("limit", None, False),
    "Glm5NextTextExperts": ("swiglu_limit", None, False),
    "HYV4Experts": ("swiglu_limit", None, False),
    "HYV4VLExperts": ("swiglu_limit", None, False),
}
"""Class that defines `_apply_gate` -> its attributes for limit and alpha, and whether columns are interleaved.

With an alpha, the gate is gpt-oss's: `g * sigmoid(alpha * g) * (u + 1)`; without, it is `silu(g) * u` or, where the
module has one, `act_fn(g) * u`. Both clamp.
"""

SOFTCAPPED_GATES = ("Inkling2Experts", "Inkling2LoopExperts")
"""Classes whose `_apply_gate` is `act_fn(g, u)`, where act_fn has the modules gate_softcap and up_softcap."""

FP8_EXPERTS, FP8_LIMITS = "FP8Experts", ("swiglu_alpha", "swiglu_limit", "limit", "gate_softcap", "up_softcap")
"""transformers' class of experts in FP8, which stands in the place of any, and the limits of its gate."""

_FUSED_NAMES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "relu": "relu",
    "ReLUSquaredActivation": "relu2",
}
"""Name of an activation's class, or of a plain function, in torch and transformers -> our name."""


def fused_name(act_fn: object) -> str | None:
    """Return the kernels' name for an activation module or function of torch or transformers; None if it has none."""
    kind: object = type(act_fn) if isinstance(act_fn, nn.Module) else act_fn
    if getattr(kind, "__module__", "").split(".")[0] not in ("torch", "transformers"):
        return None
    if isinstance(act_fn, nn.GELU):
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    return _FUSED_NAMES.get(getattr(kind, "__name__", ""))


def choose_activation(experts: ExpertsModule) -> tuple[Activation, bool]:
    """Return the activation of an experts module, and whether its gate and up columns are interleaved.

    A callable takes the rows in the weights' own column order, so there the second value is False.
    """
    act_fn: Any = getattr(experts, "act_fn", None)
    if not getattr(experts, "has_gate", True):
        return fused_name(act_fn) or act_fn, False
    apply_gate = experts._apply_gate
    method: Any = getattr(type(experts), "_apply_gate", None)
    if "_apply_gate" in experts.__dict__ or not getattr(method, "__module__", "").startswith("transformers."):
        return apply_gate, False  # replaced on this module, or not transformers' own code
    if method.__name__ == DEFAULT_GATE and getattr(experts, "is_concatenated", True):
        return fused_name(act_fn) or apply_gate, False
    defined_by = next(cls.__name__ for cls in type(experts).__mro__ if "_apply_gate" in cls.__dict__)
    if defined_by in CLAMPED_GATES:
        limit_name, alpha_name, is_interleaved = CLAMPED_GATES[defined_by]
        limit = getattr(experts, limit_name, None)
        if limit is not None and alpha_name is not None:
            return ClampedSwiGLU(float(limit), alpha=float(getattr(experts, alpha_name)), up_offset=1.0), is_interleaved
        if limit is not None and (act_fn is None or fused_name(act_fn) == "silu"):
            return ClampedSwiGLU(float(limit)), is_interleaved
    if defined_by == FP8_EXPERTS and all(getattr(experts, name, None) is None for name in FP8_LIMITS):
        return fused_name(act_fn) or apply_gate, False
    if defined_by in SOFTCAPPED_GATES and type(act_fn).__module__ == method.__module__:
        return SoftcappedSwiGLU(float(act_fn.gate_softcap.softcap), float(act_fn.up_softcap.softcap)), False
    return apply_gate, False


def named_activation(found: ExpertsClass) -> str:
    """Return how a class's activation runs: inside the kernels, or as the class's own code between two products."""
    if not found.has_own_gate:
        return "act(gate) * up, fused" if found.is_gated else "act(up), fused"
    if found.name in SOFTCAPPED_GATES:
        return "softcapped SwiGLU, fused"
    return "clamped SwiGLU, fused" if found.name in CLAMPED_GATES else "its own, called"
