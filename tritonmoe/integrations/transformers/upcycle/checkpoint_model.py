"""The model that a checkpoint directory describes: its config.json may say anything, and may come from anybody."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader
from tritonmoe.integrations.transformers.upcycle.checkpoint_paths import file_inside
from tritonmoe.integrations.transformers.upcycle.native import build_model
from tritonmoe.runtime.files import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

Read = TypeVar("Read")

__all__ = ["build_skeleton", "find_model_class", "model_name", "read_config", "read_generation_config"]


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
