"""transformers.Trainer loads what save_pretrained of a model with experts has written, back into such a model.

Trainer's own way is load_state_dict of the files, which passes over what stands there under other names: the weights of
a model upcycled in place, and in most families each expert's. resume_from_checkpoint and load_best_model_at_end so left
experts as they were.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.sharded_model import saves_adapters
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader
from tritonmoe.integrations.transformers.upcycle.description import DESCRIPTION_FILE, WEIGHTS_STEM, read_description

__all__ = ["let_trainer_load_experts", "load_saved"]

MARK = "_tritonmoe_loads_experts"


def let_trainer_load_experts() -> None:
    """Let Trainer, and its subclasses, load them from now on; models without experts go the way they went."""
    from transformers import Trainer

    if hasattr(Trainer, MARK):
        return
    setattr(Trainer, MARK, True)
    load_from_checkpoint: Callable = Trainer._load_from_checkpoint
    load_best_model: Callable = Trainer._load_best_model

    @functools.wraps(load_from_checkpoint)
    def from_checkpoint(trainer: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own = trainer.model if model is None else model
        if not _load(trainer, own, Path(resume_from_checkpoint)):
            load_from_checkpoint(trainer, resume_from_checkpoint, model)

    @functools.wraps(load_best_model)
    def best_model(trainer: Any) -> None:
        if not _load(trainer, trainer.model, Path(trainer.state.best_model_checkpoint)):
            load_best_model(trainer)

    for method in (from_checkpoint, best_model):
        setattr(Trainer, method.__name__, method)


def _load(trainer: Any, model: nn.Module, directory: Path) -> bool:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # which have ways of their own
        return False
    has_experts = bool(experts_modules(model)) and (directory / "config.json").exists()
    return (has_experts or (directory / DESCRIPTION_FILE).exists()) and load_saved(model, directory)


def load_saved(model: nn.Module, directory: Path) -> bool:
    """Load what a model's own save_pretrained wrote; False where Trainer's way is right, for adapters and modules."""
    model_class: Any = type(model)
    if (directory / DESCRIPTION_FILE).exists():
        _load_upcycled(model, directory)
    elif hasattr(model_class, "from_pretrained") and not saves_adapters(model):
        widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
        loaded = model_class.from_pretrained(directory, dtype=widest)  # rounds nothing
        model.load_state_dict(loaded.state_dict())
    else:
        return False
    return True


def _load_upcycled(model: Any, directory: Path) -> None:
    """Load the weights in a directory of such a model into one that was upcycled alike.

    Raises:
        ValueError: the model was not upcycled in place, or in another way than the saved one.
    """
    class_name, settings, blocks = read_description(directory)
    own = getattr(model, "upcycling", None)
    if own is None:
        raise ValueError(
            f"{directory} holds a {class_name} that was upcycled in place, and {type(model).__name__} was not: upcycle "
            'the dense model with target="inplace", or load the directory with load_upcycled(), before Trainer'
        )
    reader = CheckpointReader(directory, WEIGHTS_STEM)
    state = {name: reader[name] for name in reader.keys()}  # noqa: SIM118
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{directory} does not fit this {type(model).__name__}: {error}") from error
    lost = sorted(set(missing) - set(getattr(model, "all_tied_weights_keys", {})))
    if lost or unexpected:
        raise ValueError(
            f"{directory} holds a {class_name} of {settings.num_experts} experts in {len(blocks)} blocks, which does "
            f"not fit this {type(model).__name__}: missing {lost[:4]}, unknown {unexpected[:4]}"
        )
