"""transformers.Trainer loads what save_pretrained of a model with experts has written, back into such a model.

Trainer's own way is load_state_dict of the files, which passes over what stands there under other names: the weights of
a model upcycled in place, and in most families each expert's. resume_from_checkpoint and load_best_model_at_end so left
experts as they were.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from tritonmoe.integrations.torch_distributed.parallelize import expert_parameters
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.sharded_model import saves_adapters
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader
from tritonmoe.integrations.transformers.upcycle.description import DESCRIPTION_FILE, WEIGHTS_STEM, read_description

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

__all__ = ["IS_UPCYCLED", "is_spread", "let_trainer_load_experts", "load_saved"]

logger = logging.getLogger(__name__)

IS_UPCYCLED = "_tritonmoe_is_upcycled"
"""An entry of the __dict__ of models that upcycle() has made natively; those in place have `upcycling`."""
MARK = "_tritonmoe_loads_experts"


def let_trainer_load_experts() -> None:
    """Let Trainer, and its subclasses, load models that were upcycled or spread; others go the way they went."""
    from transformers import Trainer

    if hasattr(Trainer, MARK):
        return
    setattr(Trainer, MARK, True)
    load_from_checkpoint: Callable = Trainer._load_from_checkpoint
    load_best_model: Callable = Trainer._load_best_model

    @functools.wraps(load_from_checkpoint)
    def from_checkpoint(trainer: "Trainer", resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own = cast(nn.Module, trainer.model) if model is None else model
        if not _load(trainer, own, Path(resume_from_checkpoint)):
            load_from_checkpoint(trainer, resume_from_checkpoint, model)

    @functools.wraps(load_best_model)
    def best_model(trainer: "Trainer") -> None:
        best = cast(str, trainer.state.best_model_checkpoint)  # there is one by then
        if not _load(trainer, cast(nn.Module, trainer.model), Path(best)):
            load_best_model(trainer)

    for method in (from_checkpoint, best_model):
        setattr(Trainer, method.__name__, method)


def is_spread(model: nn.Module) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in expert_parameters(model))


def _load(trainer: "Trainer", model: nn.Module, directory: Path) -> bool:
    if not is_spread(model) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # have ways of their own
        return False
    return load_saved(model, directory)


def load_saved(model: nn.Module, directory: Path) -> bool:
    """Load what a model's own save_pretrained wrote; False where Trainer's way is right.

    That is so for adapters, and for models which tritonmoe has neither made nor spread. As in Trainer's way, a part
    that the directory lacks stays as it is, but for experts.
    """
    if (directory / DESCRIPTION_FILE).exists():
        _load_upcycled(model, directory)
        return True
    model_class = cast("type[PreTrainedModel]", type(model))
    is_ours = IS_UPCYCLED in model.__dict__ or is_spread(model)
    if not is_ours or not hasattr(model_class, "from_pretrained") or saves_adapters(model):
        return False
    widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
    state = model_class.from_pretrained(directory, dtype=widest).state_dict()  # rounds nothing
    added = model.state_dict().keys() - state.keys()
    if added:  # to the model, after its class had made it
        reader = CheckpointReader(directory)
        state |= {name: reader[name] for name in added if name in reader}
    missing, _ = model.load_state_dict(state, strict=False)
    experts = tuple(f"{name}." for name in experts_modules(model))
    lost = [name for name in missing if name.startswith(experts)]
    if lost:
        raise ValueError(
            f"{directory} doesn't have all weights of the experts of this {model_class.__name__}: {lost[:4]}"
        )
    if missing:
        logger.warning("%s lacks %s of this %s, which stay as they are", directory, missing[:4], model_class.__name__)
    return True


def _load_upcycled(model: nn.Module, directory: Path) -> None:
    """Load the weights in a directory of such a model into one that was upcycled alike.

    Raises:
        ValueError: the model was not upcycled in place, or in another way than the saved one.
    """
    class_name, settings, blocks = read_description(directory)
    own: dict | None = getattr(model, "upcycling", None)
    if own is None:
        raise ValueError(
            f"{directory} holds a {class_name} that was upcycled in place, and {type(model).__name__} was not: upcycle "
            'the dense model with target="inplace", or load the directory with load_upcycled(), before Trainer'
        )
    names = ("num_experts", "top_k", "granularity", "shared_expert")
    found = {name: getattr(settings, name) for name in names} | {"blocks": blocks}
    wanted = {name: own["settings"][name] for name in names} | {"blocks": own["blocks"]}
    differing = [name for name in found if found[name] != wanted[name]]
    if differing:
        raise ValueError(
            f"{directory} does not fit this {type(model).__name__}, which was upcycled in another way: saved "
            f"{', '.join(f'{name}={found[name]}' for name in differing)}; this model "
            f"{', '.join(f'{name}={wanted[name]}' for name in differing)}: upcycle it as the saved one was, or load "
            "the directory with load_upcycled(), before Trainer"
        )
    reader = CheckpointReader(directory, WEIGHTS_STEM)
    state = {name: reader[name] for name in reader}
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
