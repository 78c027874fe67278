"""axolotl: `plugins: [tritonmoe.integrations.axolotl.TritonMoEPlugin]` runs its models' experts through tritonmoe.

Full fine-tuning and LoRA, of experts too (`lora_target_parameters`). axolotl imports this, with itself.
"""

from typing import TYPE_CHECKING

from axolotl.integrations.base import BasePlugin

from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.packed.packed_experts import is_packed_weight
from tritonmoe.integrations.transformers.registration import register
from tritonmoe.integrations.transformers.requirements import EXPERTS_IMPLEMENTATION

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from torch import nn

__all__ = ["TritonMoEPlugin"]

KERNELS = ("use_scattermoe", "use_sonicmoe")
READABLE = (
    "experts of quantize_moe_experts are read as they lie in NF4 with plain scales alone. Set load_in_4bit: true and "
    "bnb_config_kwargs: {bnb_4bit_use_double_quant: false}, and leave load_in_8bit, another bnb_4bit_quant_type, "
    "nf4_backend and qlora_sharded_model_loading out; or leave out the plug-in of tritonmoe"
)
"""The way out where axolotl quantises experts otherwise."""


class TritonMoEPlugin(BasePlugin):
    """Chooses tritonmoe's experts before axolotl builds its model, and looks afterwards whether the model has them."""

    def pre_model_load(self, cfg: "DictDefault") -> None:
        """Set these experts in the configuration that axolotl builds its model by.

        Raises:
            ValueError: the configuration asks for other experts, for axolotl's own expert parallelism around them, or
                for experts in 4 or 8 bits that can't be read as they lie.
        """
        asked = [flag for flag in KERNELS if cfg.get(flag)]
        if cfg.get("experts_implementation") not in (None, EXPERTS_IMPLEMENTATION):
            asked.append(f"experts_implementation: {cfg.experts_implementation}")
        if (cfg.get("expert_parallel_size") or 1) > 1:
            asked.append(f"expert_parallel_size: {cfg.expert_parallel_size}")
        if asked:
            raise ValueError(
                f"the configuration asks for {', '.join(asked)}, and only one experts implementation can run a model: "
                "leave these settings out, or leave out the plug-in of tritonmoe. Over ranks, train with "
                "tmt.parallelize() in a program of your own, or with axolotl's expert parallelism alone"
            )
        if cfg.get("quantize_moe_experts"):
            _check_quantised(cfg)
        register()
        cfg.experts_implementation = EXPERTS_IMPLEMENTATION

    def post_model_load(self, cfg: "DictDefault", model: "nn.Module") -> None:
        """Raise ValueError unless the model's experts run through tritonmoe."""
        found = experts_modules(model)
        others = {
            name: str(experts.config._experts_implementation)
            for name, experts in found.items()
            if experts.config._experts_implementation != EXPERTS_IMPLEMENTATION
        }
        if not found or others:
            what = f"those of {next(iter(others))} run as {next(iter(others.values()))!r}" if others else "it has none"
            raise ValueError(
                f"the experts of {type(model).__name__} don't run through tritonmoe ({what}): `tritonmoe models` names "
                "the families that can; leave the plug-in out for others"
            )
        for name, experts in found.items():
            for weight in getattr(experts, "parametrizations", ()):
                if not is_packed_weight(experts, weight):
                    kind = type(experts.get_submodule(f"parametrizations.{weight}.0")).__name__
                    raise ValueError(f"{name}.{weight} would be decoded whole at every step, by {kind}: {READABLE}")


def _check_quantised(cfg: "DictDefault") -> None:
    """Raise ValueError unless quantize_moe_experts makes what is read as it lies."""
    scales_too = (cfg.get("bnb_config_kwargs") or {}).get("bnb_4bit_use_double_quant", True)
    others = {
        "load_in_8bit: true": cfg.get("load_in_8bit"),
        "bnb_4bit_use_double_quant: true (the default)": scales_too,
        f"bnb_4bit_quant_type: {cfg.get('bnb_4bit_quant_type')}": cfg.get("bnb_4bit_quant_type") not in (None, "nf4"),
        "nf4_backend: torchao": cfg.get("nf4_backend") == "torchao",
        "qlora_sharded_model_loading: true": cfg.get("qlora_sharded_model_loading"),
    }
    if asked := [name for name, is_asked in others.items() if is_asked]:
        raise ValueError(f"quantize_moe_experts with {', '.join(asked)}: {READABLE}")
