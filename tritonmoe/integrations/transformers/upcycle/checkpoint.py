"""Upcycle a checkpoint directory into another, a tensor at a time, for models larger than half of the memory."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonmoe.integrations.transformers.requirements import WEIGHT_DTYPES, check_transformers
from tritonmoe.integrations.transformers.upcycle.checkpoint_destination import check_destination, unpublished
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import (
    CheckpointReader,
    ShardWriter,
    file_inside,
    parse_size,
)
from tritonmoe.integrations.transformers.upcycle.checkpoint_model import (
    DESCRIPTION_FILE,
    WEIGHTS_STEM,
    build_skeleton,
    describe_conversion,
    find_model_class,
    read_config,
)
from tritonmoe.integrations.transformers.upcycle.conversion import make_conversion
from tritonmoe.integrations.transformers.upcycle.expert_init import UpcycleSettings
from tritonmoe.integrations.transformers.upcycle.ffn_blocks import LayerChoice, refuse_experts, refuse_quantised
from tritonmoe.integrations.transformers.upcycle.inplace import InplaceConversion
from tritonmoe.integrations.transformers.upcycle.native import NativeConversion
from tritonmoe.integrations.transformers.upcycle.saved import write_description
from tritonmoe.integrations.weight_sync.checkpoint_names import converted

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

__all__ = ["upcycle_checkpoint"]

log = logging.getLogger("tritonmoe")

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
Progress = Callable[[int, int], None]


def upcycle_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    target: str = "auto",
    layers: LayerChoice = "all",
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
    **settings: Any,
) -> str:
    """Upcycle a safetensors checkpoint directory into a new one as upcycle() does a model; neither is held whole.

    At most one block, its experts, and one shard of the output are in memory. The tensors are those of upcycle() with
    the same settings, bit for bit. Other small files, such as the tokenizer's, are copied. The destination appears
    when it is whole; after an error there is none, and `source` is never changed.

    Args:
        source: a directory with config.json and model.safetensors, or shards and their index.
        destination: a directory that does not exist or is empty.
        progress: called with bytes written and bytes in all.
        settings: num_experts, top_k, granularity, init, shared_expert and seed, as in upcycle().
    Returns:
        The model type of what was written, or "inplace": then load it with load_upcycled, else with from_pretrained.
    Raises:
        ValueError: the checkpoint is not whole or can't be upcycled this way. OSError: the disk is full.
        ImportError: transformers is missing or older than 5.7.
    """
    check_transformers()
    source, shard_bytes = Path(source), parse_size(max_shard_size)
    checked = UpcycleSettings(**settings)
    if (source / DESCRIPTION_FILE).exists():
        raise ValueError(f"{source} holds a model that was upcycled already: upcycling starts from a dense model")
    reader = CheckpointReader(source)
    dense = _dense_skeleton(source, reader)
    refuse_quantised(dense)
    refuse_experts(dense)  # before its tensors, which the files of such a model may name otherwise
    names = _match_names(dense, reader, source)
    small_files = _small_files(source)
    _refuse_quantised_files(dense, names, reader, source)
    conversion = make_conversion(dense, checked, target=target, layers=layers)
    replaced = {name for block in conversion.blocks for name in block.parameter_names}
    sizes = _sizes(dense, names)
    experts = checked.num_experts // checked.granularity + checked.shared_expert
    total = sum(size * (experts if name in replaced else 1) for name, size in sizes.items())
    destination = check_destination(destination, total)
    _refuse_inside(destination, source)
    show = progress or (lambda done, total: None)
    with unpublished(destination) as directory:
        writer = ShardWriter(
            directory, shard_bytes, "model" if isinstance(conversion, NativeConversion) else WEIGHTS_STEM
        )
        for name, tensor in _converted(conversion, names, reader, replaced):
            writer.add(name, tensor)
            show(min(writer.num_bytes, total), total)
        writer.close()
        for path in small_files:
            shutil.copy2(path, directory / path.name)
        _write_config(directory, dense, conversion)
        show(total, total)
    return conversion.target.model_type if isinstance(conversion, NativeConversion) else "inplace"


def _refuse_inside(destination: Path, source: Path) -> None:
    if source.resolve() in destination.resolve().parents:
        raise ValueError(
            f"{destination} lies in {source}, which is not to be changed: choose a directory outside of it"
        )


def _sizes(dense: "PreTrainedModel", names: dict[str, str]) -> dict[str, int]:
    """Return how many bytes each tensor has that is written."""
    itemsize = next(dense.parameters()).element_size()
    return {name: tensor.numel() * itemsize for name, tensor in dense.state_dict().items() if name in names}


def _write_config(directory: Path, dense: "PreTrainedModel", conversion: NativeConversion | InplaceConversion) -> None:
    if isinstance(conversion, InplaceConversion):
        write_description(directory, dense.config, describe_conversion(type(dense).__name__, conversion))
        return
    conversion.config.architectures = [conversion.model_class.__name__]
    conversion.config.dtype = conversion.dtype
    conversion.config.save_pretrained(directory)


def _dense_skeleton(source: Path, reader: CheckpointReader) -> "PreTrainedModel":
    config = read_config(source)
    names = config.architectures or []
    model_class = find_model_class(names[0]) if isinstance(names, list | tuple) and names else None
    if model_class is None:
        raise ValueError(f"{source / 'config.json'} names no architecture that transformers knows, but {names}")
    dtypes = {reader.dtype(name) for name in reader}
    floating = sorted(dtypes.intersection(WEIGHT_DTYPES), key=lambda d: -d.itemsize)
    return build_skeleton(model_class, config, floating[0] if floating else torch.float32, reader)


def _refuse_quantised_files(
    dense: "PreTrainedModel", names: dict[str, str], reader: CheckpointReader, source: Path
) -> None:
    """A file may hold other dtypes than its config says."""
    for name, _ in dense.named_parameters():
        dtype = reader.dtype(names[name]) if name in names else None
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{source} is quantised ({names[name]} is {dtype}): bring it into one of "
                f"{', '.join(map(str, WEIGHT_DTYPES))}, and quantise the result"
            )


def _match_names(dense: "PreTrainedModel", reader: CheckpointReader, source: Path) -> dict[str, str]:
    """Return checkpoint names by state dict names; a base model's prefix may stand on one side only."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    wanted = dense.state_dict()
    prefix = f"{dense.base_model_prefix}."
    transforms = get_model_conversion_mapping(dense)
    names: dict[str, str] = {}
    unknown = []
    for stored in reader:
        candidates = [stored, _renamed(stored, transforms)]
        candidates += [prefix + name for name in candidates] + [name.removeprefix(prefix) for name in candidates]
        own = next((name for name in candidates if name in wanted), None)
        if own is None:
            unknown.append(stored)
        else:
            names[own] = stored
            reader.check_shape(stored, tuple(wanted[own].shape))
    tied = getattr(dense, "all_tied_weights_keys", {})
    missing = sorted(wanted.keys() - names.keys() - tied.keys())
    if missing:
        differing = [*(f"{name} is missing" for name in missing), *(f"{name} is not known" for name in unknown)]
        raise ValueError(
            f"{source} does not hold the tensors of {type(dense).__name__}: {', '.join(differing[:4])} "
            f"({len(differing)} in all). If from_pretrained loads it all the same, call upcycle() on the model"
        )
    if unknown:  # buffers of older releases, as GPT-2's and BERT's checkpoints have; a head that this class has not
        log.warning(
            "left out, as from_pretrained does, what %s has no place for: %s%s",
            type(dense).__name__,
            ", ".join(unknown[:4]),
            f" and {len(unknown) - 4} more" if len(unknown) > 4 else "",
        )
    return {name: names[name] for name in wanted if name in names}


def _renamed(stored: str, transforms: "list[WeightTransform]") -> str:
    """Return the state dict name that from_pretrained gives a stored tensor, where it only renames."""
    from transformers.core_model_loading import WeightConverter

    name = stored
    for transform in transforms:
        renamed, pattern = transform.rename_source_key(name)
        if pattern is not None and isinstance(transform, WeightConverter):
            return stored
        name = renamed
    return name


def _converted(
    conversion: NativeConversion | InplaceConversion,
    names: dict[str, str],
    reader: CheckpointReader,
    replaced: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """Return names and tensors of the result, as its checkpoint has them, in the order of the dense model."""
    first_names = {block.parameter_names[0]: block for block in conversion.blocks}
    for name, stored in names.items():
        if name in first_names:
            block = first_names[name]
            state = conversion.block_state(block, lambda own: reader[names[own]])
        elif name not in replaced:
            state = {name: reader[stored]}
        else:
            continue
        if isinstance(conversion, NativeConversion):
            state = converted(conversion.skeleton, state)  # most families keep one tensor an expert on disk
        yield from state.items()


def _small_files(source: Path) -> list[Path]:
    """Return the files that are copied; raises ValueError for a link to a file elsewhere (`file_inside`)."""
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    return [file_inside(source, name) for name in names if name != "config.json" and not name.endswith(WEIGHT_SUFFIXES)]
