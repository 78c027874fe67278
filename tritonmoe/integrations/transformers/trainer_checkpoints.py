"""transformers.Trainer with spread experts: every rank takes part in its checkpoints, which are whole or refused.

In its directory `checkpoint-N` the model is as save_pretrained leaves it, and the optimizer as
torch.distributed.checkpoint does, for any number of ranks. trainer_state.json comes last: without it, a checkpoint is
half written.
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

from tritonmoe.integrations.transformers.sharded_model import gathered_state, on_first_rank
from tritonmoe.integrations.transformers.trainer_loading import is_spread, let_trainer_load_experts
from tritonmoe.placement.placed_states import StateDict

__all__ = ["let_trainer_save_spread_models"]

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer_sharded"
"""The directory of the optimizer's shards. Called so, Trainer asks for optimizer.pt where the experts aren't spread."""
if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState, TrainingArguments

TRAINER_STATE, SCHEDULER = "trainer_state.json", "scheduler.pt"
MARK = "_tritonmoe_saves_spread_models"


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


def let_trainer_save_spread_models() -> None:
    """Let Trainer, and its subclasses, save and resume models whose experts are spread, from now on.

    It calls save_pretrained and the optimizer's state_dict on one rank alone, where spread experts can't be gathered.
    Other models go the way they went.
    """
    from transformers import Trainer

    let_trainer_load_experts()
    if hasattr(Trainer, MARK):
        return
    for function in (
        train,
        save_model,
        _save_checkpoint,
        _save_optimizer_and_scheduler,
        _save_rng_state,
        _load_optimizer_and_scheduler,
    ):
        setattr(Trainer, function.__name__, _for_spread_models(getattr(Trainer, function.__name__), function))
    setattr(Trainer, MARK, True)


def _for_spread_models(original: Callable, function: Callable) -> Callable:
    @functools.wraps(original)
    def method(trainer: "SpreadTrainer", *arguments: object, **keywords: object) -> object:
        if not is_spread(trainer.model):
            return original(trainer, *arguments, **keywords)
        return function(original, trainer, *arguments, **keywords)

    return method


def train(
    original: Original,
    trainer: "SpreadTrainer",
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
    original: Original, trainer: "SpreadTrainer", output_dir: str | None = None, _internal_call: bool = False
) -> None:
    """Gather the model on every rank, and write it on the one that writes."""
    directory = cast(str, trainer.args.output_dir) if output_dir is None else output_dir
    model: nn.Module = trainer.model
    is_writer = trainer.args.should_save
    state = gathered_state(model, keep=is_writer)
    on_first_rank(model, lambda: trainer._save(directory, state_dict=state), is_first=is_writer, where=directory)
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def _save_checkpoint(original: Original, trainer: "SpreadTrainer", model: nn.Module, trial: object) -> None:
    """Take back that an older checkpoint of this step was whole, then save, which ends with saying so again."""
    directory = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
    if trainer.args.should_save:
        (directory / TRAINER_STATE).unlink(missing_ok=True)
        shutil.rmtree(directory / OPTIMIZER, ignore_errors=True)
    original(trainer, model, trial)
    trainer.accelerator.wait_for_everyone()


def _save_optimizer_and_scheduler(original: Original, trainer: "SpreadTrainer", output_dir: str) -> None:
    import torch.distributed.checkpoint as distributed_checkpoint

    distributed_checkpoint.save(_optimizer_state(trainer), checkpoint_id=os.path.join(output_dir, OPTIMIZER))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))


def _save_rng_state(original: Original, trainer: "SpreadTrainer", output_dir: str) -> None:
    """Wait for every rank's state: trainer_state.json is written next."""
    original(trainer, output_dir)
    trainer.accelerator.wait_for_everyone()


def _load_optimizer_and_scheduler(original: Original, trainer: "SpreadTrainer", checkpoint: str | None) -> None:
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


def _optimizer_state(trainer: "SpreadTrainer") -> StateDict:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {"optimizer": get_optimizer_state_dict(trainer.model, _own_optimizer(trainer))}


def _own_optimizer(trainer: "SpreadTrainer") -> torch.optim.Optimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # without Accelerate's around it
