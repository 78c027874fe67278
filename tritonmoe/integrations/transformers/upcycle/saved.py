"""Save and load models upcycled in place, which from_pretrained can't rebuild."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tritonmoe.integrations.transformers.requirements import check_transformers
from tritonmoe.integrations.transformers.trainer_checkpoints import patch_trainer
from tritonmoe.integrations.transformers.upcycle.auxiliary_loss import watch_forwards
from tritonmoe.integrations.transformers.upcycle.checkpoint_destination import check_destination, unpublished
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader, ShardWriter, parse_size
from tritonmoe.integrations.transformers.upcycle.checkpoint_model import (
    DESCRIPTION_FILE,
    WEIGHTS_STEM,
    build_skeleton,
    describe_conversion,
    find_model_class,
    load_weights_of,
    model_name,
    read_config,
    read_description,
    read_generation_config,
)
from tritonmoe.integrations.transformers.upcycle.expert_init import UpcycleSettings
from tritonmoe.integrations.transformers.upcycle.ffn_blocks import FFNBlock, find_blocks, select_blocks
from tritonmoe.integrations.transformers.upcycle.inplace import InplaceConversion, replace_blocks
from tritonmoe.integrations.transformers.upcycle.native import build_model
from tritonmoe.placement.placed_states import StateDict
from tritonmoe.placement.whole_states import name_in_state
from tritonmoe.runtime.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["load_upcycled", "remember_conversion", "write_description"]


def save_pretrained(
    model: "PreTrainedModel",
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    **hub_settings: object,
) -> None:
    """Write the model's config, its weights and the description of its conversion; all of it or nothing.

    Bound to a model upcycled in place as its save_pretrained. Load with load_upcycled(). A directory may hold other
    files, as Trainer's does, and an earlier such model, which is replaced once the new one is written. Where adapters
    of PEFT are attached (model.add_adapter), these alone are written, as of any model.

    Args:
        state_dict: None is the model's own; another has a whole tensor of every parameter, by its name in the model.
        token: and `hub_settings`, are for the Hub alone, as transformers' own.
        save_original_format: says nothing here: names are those in the model, which load_upcycled() reads.
    Raises:
        ValueError: parameters are spread over ranks; the state dict has not all; or what was asked for could not be
            loaded again (push_to_hub, variant, distributed_checkpoint).
        FileExistsError: the directory is a file, or holds weights that from_pretrained would load instead.
        OSError: the disk is full; what was there before is there still.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        settings: dict[str, object] = {"distributed_checkpoint": True} if distributed_checkpoint else {}
        settings |= {"push_to_hub": push_to_hub, "max_shard_size": max_shard_size, "variant": variant, "token": token}
        settings |= {"save_peft_format": save_peft_format, "save_original_format": save_original_format}
        save: Callable[..., None] = type(model).save_pretrained
        save(model, save_directory, is_main_process, state_dict, **settings, **hub_settings)
        return
    _refuse_what_loads_nowhere(push_to_hub, variant, distributed_checkpoint)
    if not is_main_process:
        return
    state = model.state_dict() if state_dict is None else state_dict
    _check_state(model, state)
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
        write_description(directory, model.config, cast(Json, model.upcycling))


def _refuse_what_loads_nowhere(push_to_hub: bool, variant: str | None, distributed_checkpoint: bool) -> None:
    if push_to_hub:
        raise ValueError(
            "a model upcycled in place is saved into a directory, from which load_upcycled() loads it, and "
            "push_to_hub=True is not for it: save it without, and upload the directory with model.push_to_hub(repo_id) "
            "or huggingface_hub.upload_folder(repo_id=..., folder_path=...)"
        )
    if variant is not None:
        raise ValueError(
            f"load_upcycled() knows no variants, got variant={variant!r}: save into a directory of its own, after "
            "model.to(dtype) where it is for another dtype"
        )
    if distributed_checkpoint:
        raise ValueError(
            "a model upcycled in place is written whole, not with distributed_checkpoint=True: leave it out, or save "
            "model.state_dict() with torch.distributed.checkpoint, which loads into such a model again"
        )


def _check_state(model: nn.Module, state: StateDict) -> None:
    """Raise ValueError unless the state has every parameter of the model, whole."""
    spread = next((name for name, tensor in state.items() if hasattr(tensor, "full_tensor")), None)
    if spread is not None:
        raise ValueError(
            f"weights of this model are spread over ranks ({spread}), and one rank has a part of them: of experts that "
            "tritonmoe.integrations.transformers.parallelize has spread, save_pretrained gathers them; here, call "
            "tritonmoe.gather_state_dicts(model) on every rank, then model.state_dict(), and save it on one rank with "
            "state_dict="
        )
    names = {name_in_state(name) for name, _ in model.named_parameters()}
    lost = sorted(names - state.keys() - getattr(model, "all_tied_weights_keys", {}).keys())
    if lost:
        raise ValueError(
            f"the state dict lacks {len(lost)} of {len(names)} parameters of {type(model).__name__} ({lost[0]}), and "
            f"load_upcycled() could not load it; it has {', '.join(list(state)[:2]) or 'nothing'}: pass that of the "
            "model itself, not of a wrapper around it"
        )


def _is_no_weight_of_another(name: str) -> bool:
    return not (name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json")))


def remember_conversion(model: "PreTrainedModel", conversion: InplaceConversion) -> None:
    """Note on the model how it was made, make it save itself that way, and add its auxiliary loss to its own."""
    # a bound method would be the class's when unpickled
    save = functools.partial(save_pretrained, model)
    vars(model).update(upcycling=describe_conversion(model_name(type(model)), conversion), save_pretrained=save)
    watch_forwards(model)


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
    class_name, settings, paths = read_description(directory)
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
    load_weights_of(model, reader, f"its config.json, of a {class_name}", assign=True)
    model.tie_weights()
    if (generation_config := read_generation_config(directory)) is not None:
        model.generation_config = generation_config
    remember_conversion(model, InplaceConversion(model, settings, blocks))
    patch_trainer()
    converted: nn.Module = model
    return (converted if dtype is None else converted.to(dtype)).eval()


def _described_blocks(model: nn.Module, paths: dict[str, str], directory: Path) -> list[FFNBlock]:
    """Return the model's blocks that the description names; raises ValueError where it means others."""
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
        if name in reader:
            reader.check_shape(name, shape)


def write_description(directory: Path, config: "PreTrainedConfig", description: Json) -> None:
    """Write config.json and the description; last, since a directory without them does not load."""
    config.save_pretrained(directory)
    text = json.dumps(description, indent=2)
    (directory / DESCRIPTION_FILE).write_text(text + "\n")
