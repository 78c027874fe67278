"""Save and load models upcycled in place, which from_pretrained can't rebuild."""

import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tritonmoe.integrations.transformers.requirements import check_transformers
from tritonmoe.integrations.transformers.upcycle.auxiliary_loss import watch_forwards
from tritonmoe.integrations.transformers.upcycle.checkpoint_destination import check_destination, unpublished
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader, ShardWriter, parse_size
from tritonmoe.integrations.transformers.upcycle.checkpoint_model import (
    build_skeleton,
    find_model_class,
    model_name,
    read_config,
    read_generation_config,
)
from tritonmoe.integrations.transformers.upcycle.checkpoint_paths import file_inside
from tritonmoe.integrations.transformers.upcycle.expert_init import UpcycleSettings
from tritonmoe.integrations.transformers.upcycle.ffn_blocks import FFNBlock, find_blocks, select_blocks
from tritonmoe.integrations.transformers.upcycle.inplace import InplaceConversion, replace_blocks
from tritonmoe.integrations.transformers.upcycle.native import build_model
from tritonmoe.runtime.files import Json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["DESCRIPTION_FILE", "WEIGHTS_STEM", "load_upcycled", "remember_conversion", "write_description"]

DESCRIPTION_FILE = "tritonmoe_upcycling.json"
WEIGHTS_STEM = "upcycled"
"""Not "model": from_pretrained must fail on such a directory, not build the dense model with blocks drawn at random."""
FORMAT = 1


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the model's config, its weights and the description of its conversion; all of it or nothing.

    Bound to a model upcycled in place as its save_pretrained. Load with load_upcycled(). A directory may hold other
    files, as Trainer's does, and an earlier such model, which is replaced once the new one is written.

    Raises:
        ValueError: the experts are spread over ranks by tritonmoe.parallelize.
        FileExistsError: the directory is a file, or holds weights that from_pretrained would load instead.
        OSError: the disk is full; what was there before is there still.
    """
    if not is_main_process:
        return
    state = model.state_dict() if state_dict is None else state_dict
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        raise ValueError(
            "the experts of this model are spread over ranks, and one rank has a part of them: spread them with "
            "tritonmoe.integrations.transformers.parallelize, after which save_pretrained gathers; here, call "
            "tritonmoe.gather_state_dicts(model) on every rank, then model.state_dict(), and save it on one rank with "
            "state_dict="
        )
    tied = {name for name in getattr(model, "all_tied_weights_keys", {}) if name in state}
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    destination = check_destination(save_directory, size, may_hold=_is_no_weight_of_another)
    with unpublished(destination, entry=DESCRIPTION_FILE, stem=WEIGHTS_STEM) as directory:
        writer = ShardWriter(directory, parse_size(max_shard_size), WEIGHTS_STEM)
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.close()
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
        _write(directory, model.config, model.upcycling)


def _is_no_weight_of_another(name: str) -> bool:
    return not (name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json")))


def remember_conversion(model: Any, conversion: InplaceConversion) -> None:
    """Let the model know how it was made, save itself that way, and add its auxiliary loss to its own."""
    model.upcycling = _describe(model_name(type(model)), conversion)
    model.save_pretrained = functools.partial(
        save_pretrained, model
    )  # a bound method would be the class's when unpickled
    watch_forwards(model)


def write_description(
    directory: Path, class_name: str, config: "PreTrainedConfig", conversion: InplaceConversion
) -> None:
    """Write config.json and the description; last, since a directory without them does not load."""
    _write(directory, config, _describe(class_name, conversion))


def load_upcycled(
    directory: str | os.PathLike,
    model_class: "type[PreTrainedModel] | None" = None,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model that was upcycled in place: the dense architecture is built, converted again, and filled.

    Args:
        directory: what save_pretrained of such a model, or upcycle_checkpoint(target="inplace"), wrote.
        model_class: that of the dense model, where transformers doesn't have it: of trust_remote_code, or your own.
        dtype: None keeps that of the checkpoint.
    Raises:
        ValueError: it is no such directory, is not whole, transformers doesn't have its class, or this transformers
            finds other blocks in the model. TypeError: model_class is no class of models.
        ImportError: transformers is missing or older than 5.7.
    """
    check_transformers()
    import transformers

    directory = Path(directory)
    class_name, settings, paths = _read_description(directory)
    config_class = None
    if model_class is not None:
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            raise TypeError(f"model_class must be a class of transformers' models, got {model_class!r}")
        config_class = model_class.config_class
    else:
        model_class = find_model_class(class_name)
    if model_class is None:
        raise ValueError(
            f"{directory} holds a {class_name}, which transformers {transformers.__version__} doesn't have: pass the "
            "class of the dense model as model_class"
        )
    reader = CheckpointReader(directory, WEIGHTS_STEM)
    first_router = f"{next(iter(paths.values()))}.router.weight"
    if first_router not in reader:
        raise ValueError(f"{directory} does not fit its {DESCRIPTION_FILE}: it has no {first_router}")
    config = read_config(directory, config_class)
    stored_dtype = reader.dtype(first_router)
    skeleton = build_skeleton(model_class, config, stored_dtype, reader)
    _check_shapes(skeleton, settings, _described_blocks(skeleton, paths, directory), reader)
    model = build_model(model_class, config, stored_dtype, "cpu")
    blocks = _described_blocks(model, paths, directory)
    replace_blocks(model, settings, blocks, stored_dtype)
    state = {name: reader[name] for name in reader.keys()}  # noqa: SIM118
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{directory} does not fit its config.json: {error}") from error
    lost = sorted(set(missing) - set(getattr(model, "all_tied_weights_keys", {})))
    if lost or unexpected:
        raise ValueError(f"{directory} does not fit {class_name}: missing {lost[:4]}, unknown {unexpected[:4]}")
    model.tie_weights()
    if (generation_config := read_generation_config(directory)) is not None:
        model.generation_config = generation_config
    remember_conversion(model, InplaceConversion(model, settings, blocks))
    converted: nn.Module = model
    return (converted if dtype is None else converted.to(dtype)).eval()


def _described_blocks(model: nn.Module, paths: dict[str, str], directory: Path) -> list[FFNBlock]:
    """Give the model's blocks that the description names; raises ValueError where it means others."""
    blocks = select_blocks(find_blocks(model), [int(index) for index in paths])
    differing = [block.path for block in blocks if paths[str(block.index)] != block.path]
    if differing:
        raise ValueError(
            f"{DESCRIPTION_FILE} in {directory} names other blocks than this transformers finds "
            f"({', '.join(differing[:4])})"
        )
    return blocks


def _check_shapes(
    skeleton: nn.Module, settings: UpcycleSettings, blocks: list[FFNBlock], reader: CheckpointReader
) -> None:
    """Raise ValueError before memory is taken for sizes that config.json claims and no tensor has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    for block in blocks:
        rows = settings.expert_width(block.intermediate_size) * (2 if block.gated else 1)
        shapes[f"{block.path}.experts.gate_up_proj"] = settings.num_experts, rows, block.hidden_size
    for name, shape in shapes.items():
        if name in reader and reader.shape(name) != shape:
            raise ValueError(
                f"{reader.directory} does not fit its config.json: {name} is {reader.shape(name)} in the file, "
                f"{shape} in the model"
            )


def _read_description(directory: Path) -> tuple[str, UpcycleSettings, dict[str, str]]:
    """Give the model's class, the settings, and the blocks' paths by their positions."""
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


def _describe(class_name: str, conversion: InplaceConversion) -> Json:
    return {
        "model_class": class_name,
        "format": FORMAT,
        "settings": conversion.settings.as_dict(),
        "blocks": {str(block.index): block.path for block in conversion.blocks},
    }


def _write(directory: Path, config: "PreTrainedConfig", description: Json) -> None:
    config.save_pretrained(directory)
    text = json.dumps(description, indent=2)
    (directory / DESCRIPTION_FILE).write_text(text + "\n")
