"""What the experts of one rank are called with: weights and settings, checked and brought to one dtype."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tritonmoe import backends
from tritonmoe.backends.ops import Operations
from tritonmoe.config.layer import MAX_PAIRS, Activation, ExpertLayout, KernelOptions, check_activation
from tritonmoe.runtime.autograd import is_autocast_on

__all__ = [
    "ExpertSettings",
    "ExpertWeights",
    "MainGrads",
    "cast_for_autocast",
    "check_arguments",
    "check_num_pairs",
    "check_options",
    "check_plain",
    "check_tensors",
    "find_main_grads",
    "make_settings",
]


class ExpertWeights(NamedTuple):
    """The weights of this rank's experts; see ExpertLayout for the shapes."""

    gate_up_proj: Tensor
    gate_up_bias: Tensor | None
    down_proj: Tensor
    down_bias: Tensor | None


class MainGrads(NamedTuple):
    """`main_grad` of each weight that has one: where its gradient is added instead of being returned."""

    gate_up_proj: Tensor | None
    gate_up_bias: Tensor | None
    down_proj: Tensor | None
    down_bias: Tensor | None


class ExpertSettings(NamedTuple):
    """What stays the same from call to call: the ops and how they run, the layout, the activation, what is saved."""

    ops: Operations
    layout: ExpertLayout
    activation: Activation
    save: Literal["hidden", "input"] = "hidden"
    options: KernelOptions = KernelOptions()


def check_tensors(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> None:
    """Raise TypeError unless all of them are dense tensors, and the biases tensors or None.

    Also RuntimeError under torch.jit.trace, which would record where these tokens go as constants.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace can't record experts: it would send the tokens of every later call where these ones go. "
            "Use torch.export.export, or torch.compile (for ONNX torch.onnx.export with dynamo=True)"
        )
    required = {"x": x, "topk_ids": topk_ids, "topk_weights": topk_weights}
    for name, tensor in {**required, **weights._asdict()}.items():
        if tensor is None and name in ("gate_up_bias", "down_bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}: pass {name}.to_dense()")


def check_arguments(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    activation: Activation,
) -> None:
    """Raise ValueError or TypeError, with the rule and the values, unless these arguments fit together."""
    check_activation(activation, layout.gated)
    if x.dim() != 2:
        raise ValueError(f"x must be (T, D), got shape {tuple(x.shape)}: flatten leading dimensions first")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids must be (T, K) with T = {x.shape[0]} as in x, got {tuple(topk_ids.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights {tuple(topk_weights.shape)} must have the shape of topk_ids {tuple(topk_ids.shape)}"
        )
    if not topk_weights.is_floating_point():
        raise TypeError(f"topk_weights must be floating point, got {topk_weights.dtype}")
    if not torch.compiler.is_compiling():  # there it would limit every number of tokens that is left open
        check_num_pairs(topk_ids)
    w1, b1, w2, b2 = weights
    check_plain("gate_up_proj", w1)
    check_plain("down_proj", w2)
    if w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(f"gate_up_proj and down_proj must have 3 axes, got {tuple(w1.shape)} and {tuple(w2.shape)}")
    num_experts, model_width, dtype, device = w1.shape[0], x.shape[1], x.dtype, x.device
    if num_experts < 1:
        raise ValueError(f"there must be at least one expert, got gate_up_proj {tuple(w1.shape)}")
    width = w1.shape[2 if layout.transposed else 1]
    if layout.gated and width % 2:
        raise ValueError(f"a gated gate_up_proj needs an even 2F axis, got {tuple(w1.shape)}")
    inner = layout.intermediate_size(width)
    want_w1 = (num_experts, model_width, width) if layout.transposed else (num_experts, width, model_width)
    want_w2 = (num_experts, inner, model_width) if layout.transposed else (num_experts, model_width, inner)
    up_axes, down_axes = ("(E, D, 2F)", "(E, F, D)") if layout.transposed else ("(E, 2F, D)", "(E, D, F)")
    if inner < 1 or model_width < 1:
        raise ValueError(f"D and F must be at least 1, got x {tuple(x.shape)} and gate_up_proj {tuple(w1.shape)}")
    for name, tensor, want, axes in (
        ("gate_up_proj", w1, want_w1, up_axes),
        ("down_proj", w2, want_w2, down_axes),
        ("gate_up_bias", b1, (num_experts, width), "(E, 2F)"),
        ("down_bias", b2, (num_experts, model_width), "(E, D)"),
    ):
        if tensor is None:
            continue
        if tensor.shape != want:
            form = axes if layout.gated else axes.replace("2F", "F")
            raise ValueError(
                f"{name} must be {form} = {want} with D = {model_width} from x and transposed={layout.transposed}, "
                f"gated={layout.gated}; got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype} and x is {dtype}: cast one to the other's dtype")
    for name, tensor in (
        ("topk_ids", topk_ids),
        ("topk_weights", topk_weights),
        ("gate_up_proj", w1),
        ("down_proj", w2),
        ("gate_up_bias", b1),
        ("down_bias", b2),
    ):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and x on {device}: move them to one device")


def check_num_pairs(topk_ids: Tensor) -> None:
    """Raise ValueError where the pairs are too many to be counted in int32."""
    if topk_ids.numel() > MAX_PAIRS:
        raise ValueError(
            f"T*K = {topk_ids.numel()} pairs exceed {MAX_PAIRS}, the range of the int32 positions: "
            "split the batch into several calls"
        )


def check_plain(name: str, weight: Tensor) -> None:
    """Raise TypeError for a weight that no kernel can read as it lies: quantised, sharded, or wrapped otherwise."""
    kind = type(weight).__name__
    if not weight.is_floating_point() or weight.itemsize < 2 or hasattr(weight, "quant_state"):
        raise TypeError(
            f"{name} is quantised ({kind} of {weight.dtype}): the experts take fp64, fp32, bf16 or fp16 and never "
            "dequantise a weight on their own. Leave the experts out of the quantisation, or pass a dequantised weight"
        )
    if type(weight) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(weight):
        raise TypeError(
            f"{name} is a {kind}, not a plain tensor in memory: pass to_local() of a sharded weight (DTensor), or a "
            "dequantised copy of a quantised one (torchao); the experts never gather or dequantise on their own"
        )


def cast_for_autocast(x: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> tuple[Tensor, Tensor, ExpertWeights]:
    """Do what torch.autocast does for a matrix product: x and the weights in its dtype, topk_weights in fp32.

    Nothing changes where autocast is off, and, as there, for fp64.
    """
    if not is_autocast_on(x.device):
        return x, topk_weights, weights
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor, to: torch.dtype) -> Tensor:
        return tensor.to(to) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    for name, weight in weights._asdict().items():
        if weight is not None:
            check_plain(name, weight)
    cast_weights = ExpertWeights(*(None if w is None else cast(w, dtype) for w in weights))  # type: ignore[arg-type]
    return cast(x, dtype), cast(topk_weights, torch.float32), cast_weights


def find_main_grads(weights: ExpertWeights) -> MainGrads | None:
    """Give the `main_grad` of every weight that has one and is trained; None where no weight has.

    Raises:
        ValueError: a main_grad has not its weight's shape and device.
    """
    if not any(hasattr(weight, "main_grad") for weight in weights if weight is not None):
        return None
    found: list[Tensor | None] = []
    for name, weight in weights._asdict().items():
        main_grad = getattr(weight, "main_grad", None) if weight is not None and weight.requires_grad else None
        if main_grad is not None and (main_grad.shape != weight.shape or main_grad.device != weight.device):
            raise ValueError(
                f"{name}.main_grad is {tuple(main_grad.shape)} on {main_grad.device}: it must have the weight's shape "
                f"{tuple(weight.shape)} and device {weight.device}"
            )
        found.append(main_grad)
    return None if all(main_grad is None for main_grad in found) else MainGrads(*found)


def make_settings(
    x: Tensor,
    topk_ids: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    activation: Activation,
    backend: str,
    save: Literal["hidden", "input"],
    options: KernelOptions,
) -> ExpertSettings:
    """Check `save` and `options` and choose the backend for them, x's device and dtype, E on this device, and K."""
    check_options(save, options)
    num_experts, top_k = weights.gate_up_proj.shape[0], topk_ids.shape[1]
    ops = backends.choose(backend, x.device, x.dtype, options, num_experts=num_experts, top_k=top_k)
    return ExpertSettings(ops, layout, activation, save, options)


def check_options(save: str, options: KernelOptions) -> None:
    """Raise ValueError or TypeError unless `save` and `options` can be used."""
    if save not in ("hidden", "input"):
        raise ValueError(f"save must be 'hidden' or 'input', got {save!r}")
    options.check()
