"""The model that a checkpoint directory describes, in config.json and tritonmoe_upcycling.json.

Both may hold anything, and may come from anybody.
"""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader, file_inside
from tritonmoe.integrations.transformers.upcycle.expert_init import UpcycleSettings
from tritonmoe.integrations.transformers.upcycle.inplace import InplaceConversion
from tritonmoe.integrations.transformers.upcycle.native import build_model
from tritonmoe.runtime.files import Json, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

__all__ = [
    "DESCRIPTION_FILE",
    "WEIGHTS_STEM",
    "build_skeleton",
    "describe_conversion",
    "find_model_class",
    "load_weights_of",
    "model_name",
    "read_config",
    "read_description",
    "read_generation_config",
]

Read = TypeVar("Read")
DESCRIPTION_FILE = "tritonmoe_upcycling.json"
WEIGHTS_STEM = "upcycled"
"""Not "model": from_pretrained must fail on such a directory, not build the dense model with blocks drawn at random."""
FORMAT = 1


def read_config(directory: Path, kind: "type[PreTrainedConfig] | None" = None) -> "PreTrainedConfig":
    """Return the config that config.json describes, of this kind or of the one it names, whose code is not run.

    Raises:
        ValueError: it is missing or damaged, or transformers refuses it. ImportError: it needs another package.
    """
    import transformers

    make = (kind or transformers.AutoConfig).from_pretrained
    return _read(directory, "config.json", lambda: make(directory, trust_remote_code=False))


def read_generation_config(directory: Path) -> "GenerationConfig | None":
    """Return what generation_config.json describes, None where there is none; raises ValueError as read_config does."""
    import transformers

    if not (directory / "generation_config.json").exists():
        return None
    make = transformers.GenerationConfig.from_pretrained
    return _read(directory, "generation_config.json", lambda: make(directory))


def _read(directory: Path, name: str, make: Callable[[], Read]) -> Read:
    try:
        found = read_json(file_inside(directory, name))
    except FileNotFoundError as error:
        raise ValueError(f"{directory} has no {name}: is it a checkpoint of transformers, wholly written?") from error
    if not isinstance(found, dict):
        raise ValueError(f"{directory / name} is damaged: it must be an object, and is {str(found)[:40]}")
    try:
        return make()
    except ImportError:
        raise
    except Exception as error:  # each config class has its own
        raise ValueError(f"transformers can't use {directory / name}: {type(error).__name__}: {error}") from error


def find_model_class(name: object) -> "type[PreTrainedModel] | None":
    """Return the class of models that transformers has by this name; None for anything else, whatever it is."""
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def model_name(model_class: type) -> str:
    """Return the name by which find_model_class finds this class; of others the full name, by which it finds none."""
    name = model_class.__name__
    return name if find_model_class(name) is model_class else f"{model_class.__module__}.{model_class.__qualname__}"


def build_skeleton(
    model_class: "type[PreTrainedModel]", config: "PreTrainedConfig", dtype: torch.dtype, reader: CheckpointReader
) -> "PreTrainedModel":
    """Build the model on the meta device, where no size is too large.

    Raises ValueError where the config describes none, or more layers than `reader` has tensors.
    """
    path, num_tensors = reader.directory / "config.json", len(reader)
    try:
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(num_layers, int) and num_layers > num_tensors:
            raise ValueError(f"num_hidden_layers is {num_layers}, and the checkpoint holds {num_tensors} tensors")
        return build_model(model_class, config, dtype, "meta")
    except ImportError:
        raise
    except Exception as error:  # each model class has its own
        raise ValueError(f"{path} describes no {model_class.__name__}: {type(error).__name__}: {error}") from error


def describe_conversion(class_name: str, conversion: InplaceConversion) -> Json:
    return {
        "model_class": class_name,
        "format": FORMAT,
        "settings": asdict(conversion.settings),
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


def load_weights_of(model: nn.Module, reader: CheckpointReader, what: str, *, assign: bool = False) -> None:
    """Load every tensor of a checkpoint into a model of exactly these; tied weights may be missing.

    Args:
        what: describes the model in errors.
        assign: put the tensors in the place of the model's own.
    Raises:
        ValueError: they don't fit.
    """
    state = {name: reader[name] for name in reader}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{reader.directory} does not fit {what}: {error}") from error
    lost = sorted(set(missing) - set(getattr(model, "all_tied_weights_keys", {})))
    if lost or unexpected:
        raise ValueError(f"{reader.directory} does not fit {what}: missing {lost[:4]}, unknown {unexpected[:4]}")
