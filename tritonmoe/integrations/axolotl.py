"""axolotl: `plugins: [tritonmoe.integrations.axolotl.TritonMoEPlugin]` runs its models' experts through tritonmoe.

Full fine-tuning and LoRA, of experts too (`lora_target_parameters`). axolotl imports this, with itself.
"""

from typing import TYPE_CHECKING

from axolotl.integrations.base import BasePlugin

from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.names import EXPERTS_IMPLEMENTATION
from tritonmoe.integrations.transformers.registration import register

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from torch import nn

__all__ = ["TritonMoEPlugin"]

KERNELS = ("use_scattermoe", "use_sonicmoe")


class TritonMoEPlugin(BasePlugin):
    """Chooses tritonmoe's experts before axolotl builds its model, and looks afterwards whether the model has them."""

    def pre_model_load(self, cfg: "DictDefault") -> None:
        """Let axolotl build its model with these experts.

        Raises:
            ValueError: the configuration asks for other experts, or for axolotl's own expert parallelism around them.
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
