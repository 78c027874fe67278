"""Checkpoints of transformers.Trainer: models with spread experts are saved and resumed, upcycled ones loaded.

With spread experts every rank takes part, and a checkpoint is whole or refused. In its directory `checkpoint-N` the
model is as save_pretrained leaves it, and the optimizer as torch.distributed.checkpoint does, for any number of ranks.
trainer_state.json comes last: without it, a checkpoint is half written.
"""

import functools
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import torch
from torch import nn

from tritonmoe.integrations.torch_distributed.parallelize import expert_parameters
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.integrations.transformers.requirements import wrap_method
from tritonmoe.integrations.transformers.sharded_model import gathered_state, on_first_rank, saves_adapters
from tritonmoe.integrations.transformers.upcycle.checkpoint_files import CheckpointReader
from tritonmoe.integrations.transformers.upcycle.checkpoint_model import (
    DESCRIPTION_FILE,
    WEIGHTS_STEM,
    load_weights_of,
    read_description,
)
from tritonmoe.placement.placed_states import StateDict

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

__all__ = ["IS_UPCYCLED", "load_saved", "patch_trainer"]

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer_sharded"
"""The directory of the optimizer's shards. Called so, Trainer asks for optimizer.pt where the experts aren't spread."""

IS_UPCYCLED = "_tritonmoe_is_upcycled"
"""An entry of the __dict__ of models that upcycle() has made natively; those in place have `upcycling`."""
TRAINER_STATE, SCHEDULER = "trainer_state.json", "scheduler.pt"
MARK = "_tritonmoe_is_patched"


class SpreadTrainer(Protocol):
    """What is used here of a Trainer at work: of its many optional parts, those that it has by then."""

    model: nn.Module
    args: "TrainingArguments"
    state: "TrainerState"
    accelerator: "Accelerator"
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    push_to_hub: Callable[..., object]
    _save: Callable[..., None]
    _get_output_dir: Callable[..., str]


Original: TypeAlias = Callable[..., object]
"""Trainer's own method, which one of these functions stands in for."""


def patch_trainer() -> None:
    """Make Trainer, and its subclasses, save, resume and load models that were spread or upcycled, from now on.

    Trainer calls save_pretrained and the optimizer's state_dict on one rank alone, where spread experts can't be
    gathered, and loads by load_state_dict of the files, which passes over weights that have other names there: those of
    a model upcycled in place, and in most families each expert's. Other models go the way they went.
    """
    from transformers import Trainer

    if hasattr(Trainer, MARK):
        return
    setattr(Trainer, MARK, True)
    for function in (
        train,
        save_model,
        _save_checkpoint,
        _save_optimizer_and_scheduler,
        _save_rng_state,
        _load_optimizer_and_scheduler,
    ):
        wrap_method(Trainer, function.__name__, functools.partial(_if_spread, function))
    wrap_method(Trainer, "_load_from_checkpoint", _load_from_checkpoint)
    wrap_method(Trainer, "_load_best_model", _load_best_model)


def _if_spread(
    function: Original, original: Original, trainer: SpreadTrainer, *arguments: object, **named: object
) -> object:
    """Call a function of this file where the experts of the trainer's model are spread, else Trainer's own method."""
    if not is_spread(trainer.model):
        return original(trainer, *arguments, **named)
    return function(original, trainer, *arguments, **named)


def train(
    original: Original,
    trainer: SpreadTrainer,
    resume_from_checkpoint: str | bool | None = None,
    *rest: object,
    **named: object,
) -> object:
    """Resume from whole checkpoints only; True takes the last one."""
    if resume_from_checkpoint is True:
        resume_from_checkpoint = _last_whole_checkpoint(Path(cast(str, trainer.args.output_dir)))
    elif resume_from_checkpoint and not (Path(resume_from_checkpoint) / TRAINER_STATE).exists():
        raise ValueError(
            f"{resume_from_checkpoint} has no {TRAINER_STATE}, so it is not a checkpoint of Trainer, or half written. "
            "resume_from_checkpoint=True takes the last whole checkpoint of output_dir"
        )
    return original(trainer, resume_from_checkpoint, *rest, **named)


def _last_whole_checkpoint(directory: Path) -> str:
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(found, key=lambda path: -int(path.name.partition("-")[2]))
    whole = [path for path in newest_first if (path / TRAINER_STATE).exists()]
    if not whole:
        raise ValueError(f"{directory} holds no whole checkpoint of Trainer ({len(found)} half written)")
    if whole[0] != newest_first[0]:
        logger.warning("%s is half written: resuming from %s", newest_first[0], whole[0])
    return str(whole[0])


def save_model(
    original: Original, trainer: SpreadTrainer, output_dir: str | None = None, _internal_call: bool = False
) -> None:
    """Gather the model on every rank, and write it on the one that writes."""
    directory = cast(str, trainer.args.output_dir) if output_dir is None else output_dir
    model: nn.Module = trainer.model
    is_writer = trainer.args.should_save
    state = gathered_state(model, keep=is_writer)
    on_first_rank(model, lambda: trainer._save(directory, state_dict=state), is_first=is_writer, where=directory)
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def _save_checkpoint(original: Original, trainer: SpreadTrainer, model: nn.Module, trial: object) -> None:
    """Remove trainer_state.json of an older checkpoint of this step, then save, which ends with writing it."""
    directory = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
    if trainer.args.should_save:
        (directory / TRAINER_STATE).unlink(missing_ok=True)
        shutil.rmtree(directory / OPTIMIZER, ignore_errors=True)
    original(trainer, model, trial)
    trainer.accelerator.wait_for_everyone()


def _save_optimizer_and_scheduler(original: Original, trainer: SpreadTrainer, output_dir: str) -> None:
    import torch.distributed.checkpoint as distributed_checkpoint

    distributed_checkpoint.save(_optimizer_state(trainer), checkpoint_id=os.path.join(output_dir, OPTIMIZER))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))


def _save_rng_state(original: Original, trainer: SpreadTrainer, output_dir: str) -> None:
    """Save this rank's state, and wait for every rank: trainer_state.json is written next."""
    original(trainer, output_dir)
    trainer.accelerator.wait_for_everyone()


def _load_optimizer_and_scheduler(original: Original, trainer: SpreadTrainer, checkpoint: str | None) -> None:
    import torch.distributed.checkpoint as distributed_checkpoint
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    if checkpoint is None:
        return
    shards = Path(checkpoint) / OPTIMIZER
    if not shards.exists():
        if (Path(checkpoint) / "optimizer.pt").exists():
            raise ValueError(
                f"the optimizer in {checkpoint} belongs to a model whose experts were not spread: resume without "
                "parallelize(), or load the checkpoint's model with from_pretrained and start a new training"
            )
        return  # save_only_model
    state = _optimizer_state(trainer)
    distributed_checkpoint.load(state, checkpoint_id=str(shards))
    set_optimizer_state_dict(trainer.model, _own_optimizer(trainer), optim_state_dict=state["optimizer"])
    trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))


def _optimizer_state(trainer: SpreadTrainer) -> StateDict:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {"optimizer": get_optimizer_state_dict(trainer.model, _own_optimizer(trainer))}


def _own_optimizer(trainer: SpreadTrainer) -> torch.optim.Optimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # without Accelerate's around it


def _load_from_checkpoint(
    original: Original, trainer: "Trainer", resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    own = cast(nn.Module, trainer.model) if model is None else model
    if not _load(trainer, own, Path(resume_from_checkpoint)):
        original(trainer, resume_from_checkpoint, model)


def _load_best_model(original: Original, trainer: "Trainer") -> None:
    best = cast(str, trainer.state.best_model_checkpoint)  # there is one by then
    if not _load(trainer, cast(nn.Module, trainer.model), Path(best)):
        original(trainer)


def is_spread(model: nn.Module) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in expert_parameters(model))


def _load(trainer: "Trainer", model: nn.Module, directory: Path) -> bool:
    if not is_spread(model) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # have ways of their own
        return False
    return load_saved(model, directory)


def load_saved(model: nn.Module, directory: Path) -> bool:
    """Load what a model's own save_pretrained wrote; return False, and load nothing, where Trainer's way is right.

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
    load_weights_of(model, CheckpointReader(directory, WEIGHTS_STEM), f"this {type(model).__name__}")
