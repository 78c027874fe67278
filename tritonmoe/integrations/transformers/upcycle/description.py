"""tritonmoe_upcycling.json, which says how a saved model was upcycled in place."""

import re
from pathlib import Path

from tritonmoe.integrations.transformers.upcycle.checkpoint_paths import file_inside
from tritonmoe.integrations.transformers.upcycle.expert_init import UpcycleSettings
from tritonmoe.integrations.transformers.upcycle.inplace import InplaceConversion
from tritonmoe.runtime.files import Json, read_json

__all__ = ["DESCRIPTION_FILE", "WEIGHTS_STEM", "describe_conversion", "read_description"]

DESCRIPTION_FILE = "tritonmoe_upcycling.json"
WEIGHTS_STEM = "upcycled"
"""Not "model": from_pretrained must fail on such a directory, not build the dense model with blocks drawn at random."""
FORMAT = 1


def describe_conversion(class_name: str, conversion: InplaceConversion) -> Json:
    return {
        "model_class": class_name,
        "format": FORMAT,
        "settings": conversion.settings.as_dict(),
        "blocks": {str(block.index): block.path for block in conversion.blocks},
    }


def read_description(directory: Path) -> tuple[str, UpcycleSettings, dict[str, str]]:
    """Return the model's class, the settings, and the blocks' paths by their positions."""
    path = directory / DESCRIPTION_FILE
    if not path.exists():
        raise ValueError(
            f"{directory} has no {DESCRIPTION_FILE}: it holds no model upcycled in place, or is half written. Natively "
            "upcycled models load with from_pretrained"
        )
    found = read_json(file_inside(directory, DESCRIPTION_FILE))
    try:
        if found["format"] == FORMAT:
            blocks = found["blocks"]
            if not isinstance(blocks, dict) or not blocks:
                raise TypeError(f"blocks must be an object that isn't empty, got {str(blocks)[:40]}")
            for index, name in blocks.items():
                if not re.fullmatch(r"0|[1-9]\d{0,5}", index) or not isinstance(name, str):
                    raise TypeError(f"blocks[{index!r}] must be the path of a block by its position, got {name!r}")
            return found["model_class"], UpcycleSettings(**found["settings"]), blocks
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): the directory is half written") from error
    raise ValueError(f"{path} has format {found['format']}, this version reads {FORMAT}: install a newer tritonmoe")
