"""Auxiliary losses under Trainer, which divides the tokens' loss alone by the items of all batches of a step.

It gives a model `num_items_in_batch`: the targets of all accumulated batches, and of all ranks. The tokens' loss is the
sum over this batch's targets divided by that number; Trainer sums these losses. What a model adds to one whole, as
transformers' own models add their auxiliary loss, is multiplied by the number of batches and of ranks.
"""

import ast
import inspect
import logging
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonmoe.integrations.transformers.requirements import check_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["are_labels_shifted", "heeds_num_items", "share_of_items", "watch_auxiliary_losses"]

logger = logging.getLogger(__name__)

SHIFTED_SINCE = (5, 10)
"""The release of transformers whose Trainer leaves out the first label of a row, which no causal model looks at."""
STATE = "_tritonmoe_watches_aux_loss"
"""A _State in the __dict__ of a watched model, which it shares with its replicas in DataParallel."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def share_of_items(are_shifted: bool, given: Callable[[str], object]) -> Tensor | float:
    """Return the share of `num_items_in_batch` that is of this batch, as Trainer counts it; 1 where it is not given.

    The shares of all batches and ranks of a step sum to 1.

    Args:
        are_shifted: are_labels_shifted() of the model.
        given: gives an argument of the model's forward by its name, None where there is none.
    """
    num_items, labels = given("num_items_in_batch"), given("labels")
    shifted = given("shift_labels")
    if num_items is None or not isinstance(labels, Tensor):
        return 1.0
    if isinstance(shifted, Tensor):
        labels = shifted
    elif are_shifted:
        labels = labels[..., 1:]
    share: Tensor = (labels != -100).sum() / torch.as_tensor(num_items, device=labels.device)
    return share


def are_labels_shifted(model: "PreTrainedModel") -> bool:
    """Return whether Trainer leaves out the first label of a row of this model when it counts."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if check_transformers() < SHIFTED_SINCE or getattr(model.config, "is_encoder_decoder", False):
        return False
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss


def heeds_num_items(model_class: type) -> bool:
    """Return whether a class's forward hands `num_items_in_batch` on to its loss function, by its source.

    A forward that computes a loss by itself, as the heads of BERT do, gives the plain mean of its batch; so one whose
    source isn't there is taken for.
    """
    for parent in model_class.__mro__:
        if "forward" not in parent.__dict__:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(parent.__dict__["forward"]))))
        except (OSError, TypeError, SyntaxError):
            return False
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        of_loss = [call for call in calls if getattr(call.func, "attr", None) == "loss_function"]
        if of_loss:
            return all(any(word.arg in (None, "num_items_in_batch") for word in call.keywords) for call in of_loss)
        if not any(getattr(call.func, "id", None) == "super" for call in calls):
            return False
    return False


@dataclass
class _State:
    attribute: str | None
    """Of the model, which holds its coefficient; None where it looks into its config at each call."""
    first: float | None
    """What the config asked for when the model was switched."""
    num_calls: int = 0


def watch_auxiliary_losses(model: nn.Module) -> None:
    """Add hooks to transformers' own models in `model` that warn once where Trainer multiplies their auxiliary loss."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and STATE not in module.__dict__:
            module.__dict__[STATE] = _State(*_coefficient(module))
            module.register_forward_hook(_warn_of_multiplied, with_kwargs=True)


def _warn_of_multiplied(model: "PreTrainedModel", _: object, keywords: Mapping[str, object], output: object) -> None:
    if not model.training or keywords.get("num_items_in_batch") is None or torch.compiler.is_compiling():
        return
    loss, aux_loss = getattr(output, "loss", None), getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor) or not isinstance(aux_loss, Tensor):
        return
    state = model.__dict__[STATE]
    state.num_calls += 1
    if state.num_calls & (state.num_calls - 1):  # a look at the share waits for the device: at calls 1, 2, 4, ...
        return
    if state.attribute is None:
        name, asked, in_force = "model.config.text_config.router_aux_loss_coef", state.first, _coefficient(model)[1]
    else:
        name, asked, in_force = f"model.{state.attribute}", _coefficient(model)[1], getattr(model, state.attribute)
    share = float(share_of_items(are_labels_shifted(model), keywords.get))
    if not 0 < share < 1 or not in_force or in_force != asked or not aux_loss.requires_grad:
        return  # its user has divided it, or nothing gets a gradient of it
    state.num_calls = 2**62  # said
    logger.warning(
        "Trainer sums the losses of about %d batches (gradient_accumulation_steps times ranks) in a step, and %s adds "
        "its auxiliary loss whole to each: transformers divides only the tokens' loss by num_items_in_batch. The "
        "routers get that many times the gradient which router_aux_loss_coef = %s asks for. Divide %s by that number, "
        "or set model.accepts_loss_kwargs = False before making the Trainer, which then averages the batches' losses",
        max(round(1 / share), 2),
        type(model).__name__,
        asked,
        name,
    )


def _coefficient(model: "PreTrainedModel") -> tuple[str | None, float | None]:
    """Return the attribute of a model that holds its coefficient, and what its config asks for."""
    text = model.config.get_text_config()
    attribute = next((name for name in COEFFICIENTS if name in model.__dict__), None)
    return attribute, getattr(text, attribute or COEFFICIENTS[0], None)
