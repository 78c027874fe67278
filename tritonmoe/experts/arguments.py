"""The tensors that the experts of one rank are called with: checked, and of one dtype."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tritonmoe.config.formats import format_of, weight_shape
from tritonmoe.config.layer import MAX_PAIRS, ExpertLayout, PerWeight
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.experts.quantized_weight import check_content, check_packed, weight_formats
from tritonmoe.experts.tensors import NAMES, OPTIONAL, CallTensors
from tritonmoe.runtime.autograd import is_autocast_on
from tritonmoe.runtime.stand_in import StandIn
from tritonmoe.runtime.streamed import find_streamed

__all__ = [
    "cast_for_autocast",
    "check_num_pairs",
    "check_plain",
    "check_strides",
    "checked_tensors",
    "find_main_grads",
    "have_wider_main_grads",
]


MAX_OFFSET = 2**31 - 1
PLAIN = frozenset((Tensor, nn.Parameter))
"""The types of tensors that are nothing else; every call asks."""


def checked_tensors(
    given: CallTensors[Tensor], layout: ExpertLayout, precision: ExpertPrecision | None = None
) -> CallTensors[Tensor]:
    """Return the tensors of a call in the dtypes of torch.autocast, if they fit together.

    Raises:
        ValueError, TypeError: they don't fit; the message has the rule and the values. RuntimeError: torch.jit.trace
        would record where these tokens go as constants.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace can't record experts: it would send the tokens of every later call to the experts of "
            "these tokens. Use torch.export.export, or torch.compile (for ONNX torch.onnx.export with dynamo=True)"
        )
    device = getattr(given.x, "device", None)
    for name, tensor in zip(NAMES, given.flatten(), strict=False):
        if tensor is None:
            if name in OPTIONAL:
                continue
        elif type(tensor) in PLAIN and tensor.layout == torch.strided and tensor.device == device:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if isinstance(tensor, StandIn):
            raise ValueError(f"{name} has no values: {tensor.why}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}: pass {name}.to_dense()")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and x on {device}: move them to one device")
    tensors = cast_for_autocast(given)
    _check_tokens(tensors)
    if precision is not None:
        _check_for_precision(tensors, precision)
    _check_weights(tensors.x, tensors.weights, layout)
    return tensors


def _check_for_precision(inputs: CallTensors[Tensor], precision: ExpertPrecision) -> None:
    """Raise TypeError or ValueError unless experts can multiply such tensors in this precision."""
    x, weights = inputs.x, inputs.weights
    if x.dtype != torch.bfloat16:
        raise TypeError(
            f"{precision} rounds bf16 rows and weights, and these are {x.dtype}: run the layer under "
            "torch.autocast(device, torch.bfloat16), which keeps parameters in fp32, or cast the layer to bf16"
        )
    if weights.gate_up_scales is not None or weights.down_scales is not None:
        raise ValueError(f"{precision} is for weights that train, and packed ones are frozen: leave one of them out")
    if find_streamed(weights.gate_up_proj) is not None:
        raise ValueError(f"{precision} is for weights that train, and offloaded ones are frozen: leave one of them out")
    if weights.gate_up_a is not None or weights.down_a is not None:
        raise ValueError(f"experts with adapters don't compute in {precision}: leave one of them out")


def _check_tokens(inputs: CallTensors[Tensor]) -> None:
    x, topk_ids, topk_weights, *_ = inputs
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


def _check_weights(x: Tensor, weights: PerWeight[Tensor], layout: ExpertLayout) -> None:
    w1, b1, w2, b2, *_ = weights
    up_scales, down_scales = weights.gate_up_scales, weights.down_scales
    for name, values, scales in (("gate_up_proj", w1, up_scales), ("down_proj", w2, down_scales)):
        if scales is None:
            check_plain(name, values)
        else:
            check_packed(name, values, scales)
            check_content(values, scales)
    if w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(f"gate_up_proj and down_proj must have 3 axes, got {tuple(w1.shape)} and {tuple(w2.shape)}")
    num_experts, model_width = w1.shape[0], x.shape[1]
    up_shape = tuple(w1.shape) if up_scales is None else weight_shape(w1, up_scales)
    if num_experts < 1:
        raise ValueError(f"there must be at least one expert, got gate_up_proj {up_shape}")
    width = up_shape[2 if layout.transposed else 1]
    if layout.gated and width % 2:
        raise ValueError(f"a gated gate_up_proj needs an even 2F axis, got {up_shape}")
    inner = layout.intermediate_size(width)
    if inner < 1 or model_width < 1:
        raise ValueError(f"D and F must be at least 1, got x {tuple(x.shape)} and gate_up_proj {up_shape}")
    want_w1 = (num_experts, model_width, width) if layout.transposed else (num_experts, width, model_width)
    want_w2 = (num_experts, inner, model_width) if layout.transposed else (num_experts, model_width, inner)
    for name, tensor, scales, want in (
        ("gate_up_proj", w1, up_scales, want_w1),
        ("down_proj", w2, down_scales, want_w2),
        ("gate_up_bias", b1, None, (num_experts, width)),
        ("down_bias", b2, None, (num_experts, model_width)),
    ):
        if tensor is None:
            continue
        shape = tensor.shape if scales is None else weight_shape(tensor, scales)
        if shape != want:
            raise _other_shape(name, shape, want, x, layout)
        if scales is None:
            if tensor.dtype != x.dtype:
                raise _other_dtype(name, tensor, x)
            continue
        if x.dtype != torch.bfloat16:
            raise TypeError(
                f"{name} is packed, and stands for a bf16 weight, but x is {x.dtype}: cast x to bf16 (model.to("
                "torch.bfloat16) leaves packed weights as they are), or call under torch.autocast with bf16"
            )
        format_of(tensor, scales).check_width(inner, f"decode {name} to bf16")
    for name, factor_a, factor_b, sizes in (
        ("gate_up", weights.gate_up_a, weights.gate_up_b, (num_experts, width, model_width)),
        ("down", weights.down_a, weights.down_b, (num_experts, model_width, inner)),
    ):
        if factor_a is not None and factor_b is not None:
            _check_factors(name, x, factor_a, factor_b, sizes)


AXES = {
    "gate_up_proj": ("(E, 2F, D)", "(E, D, 2F)"),
    "down_proj": ("(E, D, F)", "(E, F, D)"),
    "gate_up_bias": ("(E, 2F)", "(E, 2F)"),
    "down_bias": ("(E, D)", "(E, D)"),
}
"""How a weight's shape is written, without `transposed` and with it."""


def _other_shape(
    name: str, shape: tuple[int, ...], want: tuple[int, ...], x: Tensor, layout: ExpertLayout
) -> ValueError:
    axes = AXES[name][layout.transposed]
    form = axes if layout.gated else axes.replace("2F", "F")
    return ValueError(
        f"{name} must be {form} = {want} with D = {x.shape[1]} from x and transposed={layout.transposed}, "
        f"gated={layout.gated}; got {tuple(shape)}"
    )


def _other_dtype(name: str, tensor: Tensor, x: Tensor) -> TypeError:
    return TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}: cast one to the other's dtype")


def _check_factors(name: str, x: Tensor, factor_a: Tensor, factor_b: Tensor, sizes: tuple[int, int, int]) -> None:
    """Check an adapter's factors for a weight whose (E, out, in) are `sizes`."""
    num_experts, width, depth = sizes
    for factor in (f"{name}_a", factor_a), (f"{name}_b", factor_b):
        check_plain(*factor)
        if factor[1].dtype != x.dtype:
            raise _other_dtype(*factor, x)
    shapes = tuple(factor_a.shape), tuple(factor_b.shape)
    rank = factor_a.shape[1] if factor_a.dim() == 3 else 0
    if rank < 1 or shapes != ((num_experts, rank, depth), (num_experts, width, rank)):
        raise ValueError(
            f"{name}_a and {name}_b must be (E, R, in) and (E, out, R) of the weight that they adapt, here "
            f"({num_experts}, R, {depth}) and ({num_experts}, {width}, R) with R of at least 1, in this order whatever "
            f"the layout; got {shapes[0]} and {shapes[1]}"
        )


def check_num_pairs(topk_ids: Tensor) -> None:
    """Raise ValueError where the pairs are too many to be counted in int32."""
    if topk_ids.numel() > MAX_PAIRS:
        raise ValueError(
            f"T*K = {topk_ids.numel()} pairs exceed {MAX_PAIRS}, the range of the int32 positions: "
            "split the batch into several calls"
        )


def check_strides(inputs: CallTensors[Tensor]) -> None:
    """Raise ValueError where an offset inside an expert, a bias or a token's slots is past the kernels' int32.

    Along the first axis they compute in int64; rows of x that aren't contiguous they copy.
    """
    x, weights, tensors = inputs.x, inputs.weights, inputs.flatten()
    for tensor in tensors:
        if tensor is not None and tensor is not x and not tensor.is_contiguous():
            break
    else:
        if max(weights.gate_up_proj.stride(0), weights.down_proj.stride(0)) <= MAX_OFFSET:
            return
    for name, tensor in zip(NAMES, tensors, strict=False):
        if tensor is None or tensor is x:
            continue
        for axis, (size, stride) in enumerate(zip(tensor.shape[1:], tensor.stride()[1:], strict=True), 1):
            if (size - 1) * stride > MAX_OFFSET:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} with strides {tensor.stride()} lies too far apart for the kernels: "
                    f"(size - 1) * stride may be at most {MAX_OFFSET} along each axis but the first, and along axis "
                    f"{axis} is {(size - 1) * stride}. Pass {name}.contiguous(), once for all calls, or "
                    "backend='torch'"
                )


def check_plain(name: str, weight: Tensor) -> None:
    """Raise TypeError for a weight that no kernel can read as it lies: quantised, sharded, or wrapped otherwise."""
    kind = type(weight).__name__
    if not weight.is_floating_point() or weight.itemsize < 2 or hasattr(weight, "quant_state"):
        raise TypeError(
            f"{name} is quantised ({kind} of {weight.dtype}): the experts take fp64, fp32, bf16 or fp16, or a "
            "tritonmoe.QuantizedWeight, which holds packed values and their scales. Make a QuantizedWeight of these "
            "tensors, leave the experts out of the quantisation, or pass a dequantised weight"
        )
    if type(weight) not in PLAIN and is_traceable_wrapper_subclass(weight):
        raise TypeError(
            f"{name} is a {kind}, not a plain tensor in memory: pass to_local() of a sharded weight (DTensor), or a "
            "dequantised copy of a quantised one (torchao); the experts never gather or dequantise on their own"
        )


def cast_for_autocast(inputs: CallTensors[Tensor]) -> CallTensors[Tensor]:
    """Return x and the weights in the dtype of torch.autocast, as for a matrix product, and topk_weights in fp32.

    Nothing changes where autocast is off, and, as there, for fp64.
    """
    x, topk_weights, weights = inputs.x, inputs.topk_weights, inputs.weights
    if not is_autocast_on(x.device):
        return inputs
    dtype = torch.get_autocast_dtype(x.device.type)
    packed = zip(("gate_up_proj", "down_proj"), weight_formats(weights), strict=True)
    kept = {"gate_up_scales", "down_scales", *(name for name, found in packed if found is not None)}
    cast: dict[str, Tensor] = {}
    for name, weight in weights._asdict().items():
        if weight is not None and name not in kept:
            check_plain(name, weight)
            if weight.dtype != dtype and find_streamed(weight) is not None:
                raise TypeError(
                    f"{name} stays in a file as {weight.dtype}, and torch.autocast would cast all of it to {dtype}: "
                    f"call model.to({dtype}) before offload_experts(), or leave autocast off"
                )
            cast[name] = _cast_unless_fp64(weight, dtype)
    cast_weights = weights._replace(**cast)
    topk_weights = _cast_unless_fp64(topk_weights, torch.float32)
    return inputs._replace(x=_cast_unless_fp64(x, dtype), topk_weights=topk_weights, weights=cast_weights)


def _cast_unless_fp64(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def have_wider_main_grads(weights: PerWeight[Tensor] | None) -> PerWeight[bool]:
    """Return which projections have a main_grad that keeps what rounding to the weight's dtype would lose."""
    names = ("gate_up_proj", "down_proj") if weights is not None else ()

    def is_wider(weight: Tensor | None) -> bool:
        main_grad = getattr(weight, "main_grad", None)
        return weight is not None and main_grad is not None and main_grad.itemsize > weight.itemsize

    return PerWeight(*(name in names and is_wider(getattr(weights, name)) for name in PerWeight._fields))


def find_main_grads(weights: PerWeight[Tensor]) -> PerWeight[Tensor | None] | None:
    """Return the `main_grad` of every weight that has one and is trained; None where no weight has.

    A gradient is added to the weight's main_grad instead of being returned.
    Raises:
        ValueError: a main_grad has not its weight's shape and device.
    """
    if not any(hasattr(weight, "main_grad") for weight in weights if weight is not None):
        return None
    found: list[Tensor | None] = []
    for name, weight in zip(PerWeight._fields, weights, strict=True):
        if weight is None or not weight.requires_grad:
            found.append(None)
            continue
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is not None and (main_grad.shape != weight.shape or main_grad.device != weight.device):
            raise ValueError(
                f"{name}.main_grad is {tuple(main_grad.shape)} on {main_grad.device}: it must have the weight's shape "
                f"{tuple(weight.shape)} and device {weight.device}"
            )
        found.append(main_grad)
    return None if all(main_grad is None for main_grad in found) else PerWeight(*found)
