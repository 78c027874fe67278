"""transformers' quantizers of MXFP4 and FP8 checkpoints, whose experts stay packed.

Imported where they are asked for alone: they continue what transformers has since 5.24.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

from tritonmoe.config.formats import FORMATS, FP8_BLOCK
from tritonmoe.integrations.transformers.discovery import ExpertsModule, experts_modules
from tritonmoe.integrations.transformers.packed.packed_experts import PackedLayout, set_packed, up_name
from tritonmoe.integrations.transformers.requirements import EXPERTS_IMPLEMENTATION
from tritonmoe.integrations.transformers.sharded_model import STATE_TO_SAVE
from tritonmoe.placement.placed_states import StateDict

__all__ = ["PACKED_QUANTIZERS"]


class PackedMxfp4Quantizer(Mxfp4HfQuantizer):
    """The experts of gpt-oss as its checkpoints have them."""

    def validate_environment(self, *_: object, **__: object) -> None:
        _check_pre_quantized(self)

    def param_needs_quantization(self, *_: object, **__: object) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, use_kernels: bool = False, **_: object
    ) -> None:
        if self.quantization_config.dequantize:
            return
        for experts in _plain_experts(model, "mxfp4"):
            for name in (up_name(experts), "down_proj"):
                shape = num_experts, depth, width = tuple(getattr(experts, name).shape)
                values, scales = FORMATS["mxfp4"].empty((num_experts, width, depth), "meta")
                parts = values.unflatten(2, (-1, 16)), scales
                set_packed(experts, name, parts, shape, PackedLayout("mxfp4", is_transposed=False))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        if not self.quantization_config.dequantize:
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)

    def get_load_operations(self) -> dict[str, object]:
        return super().get_load_operations() if self.quantization_config.dequantize else {}

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, object], dict[str, object]]:
        return _state_to_save(model), {}

    @property
    def is_trainable(self) -> bool:
        return True


class PackedFP8Quantizer(FineGrainedFP8HfQuantizer):
    """Experts in FP8 blocks as checkpoints have them, in the model's own modules; other weights in bf16."""

    def validate_environment(self, *_: object, **__: object) -> None:
        _check_pre_quantized(self)
        size = self.quantization_config.weight_block_size
        if not self.quantization_config.dequantize and tuple(size or ()) != (FP8_BLOCK, FP8_BLOCK):
            raise ValueError(
                f"experts in FP8 stay packed in blocks of {FP8_BLOCK} x {FP8_BLOCK}, and this checkpoint has "
                f"{size}: load it with FineGrainedFP8Config(dequantize=True)"
            )

    def param_needs_quantization(self, *_: object, **__: object) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        if self.quantization_config.dequantize:
            return
        for experts in _plain_experts(model, "fp8"):
            inner = experts.down_proj.shape[1 if getattr(experts, "is_transposed", False) else 2]
            if inner % FP8_BLOCK:
                raise ValueError(
                    f"the experts of {type(model).__name__} have F = {inner}, and FP8 experts stay packed where F is a "
                    f"multiple of {FP8_BLOCK}, so that the gate and the up half begin with a block: load this "
                    "checkpoint with quantization_config=FineGrainedFP8Config(dequantize=True)"
                )
            for name in (up_name(experts), "down_proj"):
                parts = FORMATS["fp8"].empty(getattr(experts, name).shape, "meta")
                for own_name, part in zip((name, f"{name}_scale_inv"), parts, strict=True):
                    experts.register_parameter(own_name, nn.Parameter(part, requires_grad=False))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        if self.quantization_config.dequantize:
            return model
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        for experts in experts_modules(model).values():
            for name in (up_name(experts), "down_proj"):
                getattr(experts, name).requires_grad_(False)
                getattr(experts, f"{name}_scale_inv").requires_grad_(False)
        conversions = getattr(model, "_weight_conversions", None) or []
        kept = [one for one in conversions if not _dequantizes(one)]
        model.__dict__["_weight_conversions"] = kept
        skipped = set(self.quantization_config.modules_to_not_convert or ())
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.quantization_config.modules_to_not_convert = sorted(skipped | linear)  # they are bf16 from here on
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, object], dict[str, object]]:
        return _state_to_save(model), {}

    def get_weight_conversions(self) -> list[object]:
        if self.quantization_config.dequantize or not self.pre_quantized:
            return super().get_weight_conversions()
        return [WeightConverter(names, name, [Fp8Dequantize(self)]) for name, names in self.serialized_names.items()]


def _state_to_save(model: nn.Module) -> StateDict:
    """Return what save_pretrained is given, or the model's own."""
    given = model.__dict__.get(STATE_TO_SAVE)
    return model.state_dict() if given is None else given


def _dequantizes(conversion: object) -> bool:
    return any(type(one).__name__ == "Fp8Dequantize" for one in getattr(conversion, "operations", ()))


def _check_pre_quantized(quantizer: HfQuantizer) -> None:
    if not quantizer.pre_quantized:
        raise ValueError(
            "register(packed=True) keeps experts of quantised checkpoints packed, and this checkpoint is not "
            "quantised: load it as it is, and call quantize_experts(model, 'nf4') or 'mxfp4'"
        )


def _plain_experts(model: nn.Module, method: str) -> list[ExpertsModule]:
    """Return the modules of experts whose weights are to be packed."""
    found = list(experts_modules(model).values())
    if not found:
        raise ValueError(
            f"{type(model).__name__} is quantised by {method}, and none of its experts runs through tritonmoe: load it "
            "before register(packed=True), or with dequantize=True in its quantization_config"
        )
    return found


PACKED_QUANTIZERS = {"mxfp4": PackedMxfp4Quantizer, "fp8": PackedFP8Quantizer}
"""By the names of their methods."""
