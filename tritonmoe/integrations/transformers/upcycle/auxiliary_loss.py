"""The load balance loss of models upcycled in place, of the tokens and layers of one forward, in their own loss."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from tritonmoe.integrations.transformers.accumulated_loss import are_labels_shifted, heeds_num_items, share_of_items
from tritonmoe.integrations.transformers.requirements import CACHES
from tritonmoe.integrations.transformers.upcycle.inplace import UpcycledFFN
from tritonmoe.integrations.transformers.upcycle.token_masks import EnclosingCall
from tritonmoe.layer import MoELayer
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.halves import keep_for_this_half
from tritonmoe.runtime.wrappers import COPIES, inside_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

__all__ = ["aux_loss", "watch_forwards"]

IS_LEFT = "_tritonmoe_aux_loss_is_left"
"""A dict in the __dict__ of a model, which it shares with its replicas in DataParallel."""
BELOW = "_tritonmoe_layers_below"
TIME_MAJOR = ("xlnet", "fsmt")
"""The model types whose rows are (S, B, D)."""

log = logging.getLogger("tritonmoe")


def aux_loss(model: nn.Module) -> Tensor:
    """Return the sum of the load balance losses of a model upcycled in place, for losses that aren't the model's own.

    Valid after a forward, of `model` or of a module inside of it, whose layers' it is: each layer's loss is that of its
    tokens in that forward, in all chunks; padding, by the attention mask of the model that was called, is left out, and
    so is a layer that was skipped. AUX_LOSS_WEIGHT is in it already. The loss that a model gives in training, where it
    has labels, contains it, as that of natively upcycled models does: don't add it there.

    Raises:
        ValueError: the model was not upcycled in place, or its attention mask doesn't say which rows are padding.
        RuntimeError: there was no forward, or one without a graph in training, as reentrant checkpointing makes them:
            the loss would teach the routers nothing.
    """
    layers = _layers_in_force(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer of tritonmoe: it was not upcycled in place")
    for module in model.modules():
        state = module.__dict__.get(IS_LEFT)
        if state is not None and state["is_left"]:
            state["is_left"] = False
    losses = [(layer, layer.aux_loss) for layer in layers]
    found = [(layer, loss) for layer, loss in losses if loss is not None]
    if not found:
        if not any(isinstance(layer, UpcycledFFN) and layer.calls is not None for layer in layers):
            raise RuntimeError("aux_loss() needs a forward of the model before it: call the model first")
        return layers[0].router.weight.new_zeros((), dtype=torch.float32)  # every layer was skipped
    if torch.is_grad_enabled() and any(
        layer.training and layer.router.weight.requires_grad and not loss.requires_grad for layer, loss in found
    ):
        raise RuntimeError(
            "the model's training forward made no graph for its auxiliary loss, as under reentrant activation "
            'checkpointing: enable it with {"use_reentrant": False}, or call aux_loss() under torch.no_grad()'
        )
    device = found[0][1].device
    return torch.stack([loss.to(device) for _, loss in found]).sum()


def _layers_in_force(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers but for those in whose place PEFT's modules_to_save runs another copy."""
    others: list[str] = []
    for name, module in model.named_modules():
        copies = module._modules.get(COPIES)
        if copies is not None:
            inside, prefix = inside_wrapper(module), f"{name}." if name else ""
            by_name = {"original_module": module.get_submodule("original_module")}
            by_name |= {f"{COPIES}.{key}": child for key, child in copies.named_children()}
            others += [f"{prefix}{key}" for key, child in by_name.items() if child is not inside]
    is_other = tuple(f"{name}." for name in others)
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, MoELayer) and not f"{name}.".startswith(is_other)
    ]


def watch_forwards(model: "PreTrainedModel") -> None:
    """Note on the layers of a model upcycled in place the forwards around them, and add its auxiliary loss to its own.

    A forward is the outermost call of a module that is hooked here: the model, a model inside of it, or any module that
    takes an attention mask. It begins anew what each layer below it keeps.
    """
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if isinstance(module, UpcycledFFN) or not _layers_below(module):
            continue
        names = tuple(inspect.signature(module.forward).parameters)
        is_model = isinstance(module, PreTrainedModel)
        takes_mask = "attention_mask" in names
        if not (is_model or takes_mask):
            continue
        is_time_major = is_model and module.config.model_type in TIME_MAJOR
        watched = _Watched(EnclosingCall(path, is_model, takes_mask, is_time_major), names)
        module.register_forward_pre_hook(functools.partial(_enter, watched), with_kwargs=True)
        module.register_forward_hook(functools.partial(_leave, watched), always_call=True)
    names = tuple(inspect.signature(model.forward).parameters)
    hook = functools.partial(_add_aux_loss, names, heeds_num_items(type(model)), are_labels_shifted(model))
    model.register_forward_hook(hook, with_kwargs=True)
    model.__dict__[IS_LEFT] = {"is_left": False, "is_said": False}


class _Watched(NamedTuple):
    """What is known of a module before its calls."""

    call: EnclosingCall
    """A call without mask or cache."""
    names: tuple[str, ...]
    """Of its forward's parameters, in order."""


def _given(name: str, names: Sequence[str], arguments: tuple[object, ...], keywords: Mapping[str, object]) -> object:
    """Return an argument of a call by its name, of those that the forward takes in this order; None for nothing."""
    if name in keywords:
        return keywords[name]
    position = names.index(name) if name in names else len(arguments)
    return arguments[position] if position < len(arguments) else None


def _enter(watched: _Watched, module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
    if is_recomputing():
        return
    mask = _given("attention_mask", watched.names, arguments, keywords)
    if mask is None and watched.call.is_time_major:  # XLNet's own, which is 1 for padding
        padding = _given("input_mask", watched.names, arguments, keywords)
        mask = padding == 0 if isinstance(padding, Tensor) else None
    has_cache = any(_given(name, watched.names, arguments, keywords) is not None for name in CACHES)
    call = watched.call._replace(mask=mask, has_cache=has_cache)
    for layer in _layers_below(module):
        around = _outside(layer, watched)
        if not around:
            layer.calls = ()
        layer.around = (*around, call)
        _keep(layer)


def _leave(watched: _Watched, module: nn.Module, arguments: object, output: object) -> None:
    if is_recomputing():
        return
    for layer in _layers_below(module):
        layer.around = _outside(layer, watched)
        _keep(layer)


def _outside(layer: UpcycledFFN, watched: _Watched) -> tuple[EnclosingCall, ...]:
    """Return the calls around that of this module; one of its own that stands here has been interrupted."""
    paths = [call.path for call in layer.around]
    return layer.around[: paths.index(watched.call.path)] if watched.call.path in paths else layer.around


def _keep(layer: UpcycledFFN) -> None:
    if not torch.compiler.is_compiling():
        keep_for_this_half(layer, "around", "calls")


def _layers_below(module: nn.Module) -> list[UpcycledFFN]:
    """Return the layers inside of a module, walking its tree anew only where a module in it has been replaced."""
    if torch.compiler.is_compiling():
        return _LayersBelow(module).layers
    known: _LayersBelow | None = module.__dict__.get(BELOW)
    if known is None or not known.hold(module):
        known = module.__dict__[BELOW] = _LayersBelow(module)
    return known.layers


class _LayersBelow:
    """The layers in a tree of modules as it was: every parent in it, outside of the layers, with its children."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.layers: list[UpcycledFFN] = []
        self.tree: list[tuple[nn.Module, tuple[nn.Module | None, ...]]] = []
        if module is not None:
            self._walk(module)

    def __reduce__(self) -> tuple[type["_LayersBelow"], tuple[()]]:
        return _LayersBelow, ()  # a copy of the module has other children

    def _walk(self, module: nn.Module) -> None:
        if isinstance(module, UpcycledFFN):
            self.layers.append(module)
        elif module._modules:
            self.tree.append((module, tuple(module._modules.values())))
            for child in module._modules.values():
                if child is not None:
                    self._walk(child)

    def hold(self, module: nn.Module) -> bool:
        is_of_it = bool(self.tree) and self.tree[0][0] is module  # a replica in DataParallel has its original's
        return is_of_it and all(tuple(parent._modules.values()) == children for parent, children in self.tree)


def _add_aux_loss(
    names: tuple[str, ...],
    heeds: bool,
    are_shifted: bool,
    model: nn.Module,
    arguments: tuple[object, ...],
    keywords: Mapping[str, object],
    output: object,
) -> object:
    """Add aux_loss() to the loss in what a model upcycled in place gives in training; a forward hook of such a model.

    Trainer and whoever else takes the model's own loss gets it so, as with transformers' MoE models. A batch that is a
    part of what is accumulated over batches and ranks has its share of it, where its own loss is a share of theirs.
    """
    if not model.training or not torch.is_grad_enabled():
        return output
    given = functools.partial(_given, names=names, arguments=arguments, keywords=keywords)
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or not (loss.dim() == 0 or (heeds and _is_of_replica(loss, given))):
        _warn_of_earlier(model)
        return output
    share = torch.as_tensor(share_of_items(are_shifted, given) if heeds else 1.0, device=loss.device)
    loss = loss + share * aux_loss(model).to(loss.device)
    if isinstance(output, tuple):
        return loss, *output[1:]
    cast("CausalLMOutput", output).loss = loss
    return output


def _is_of_replica(loss: Tensor, given: Callable[[str], object]) -> bool:
    """Return whether a loss is divided by the (1, 1) number that Trainer gives each replica of DataParallel."""
    num_items = given("num_items_in_batch")
    is_divided = isinstance(num_items, Tensor) and num_items.numel() == 1 and num_items.shape == loss.shape
    return is_divided and isinstance(given("labels"), Tensor)


def _warn_of_earlier(model: nn.Module) -> None:
    """Warn once where the last training forward gave no loss of its own and nobody took its auxiliary loss."""
    state = model.__dict__[IS_LEFT]
    if torch.compiler.is_compiling() or state["is_said"]:
        return
    if state["is_left"]:
        state["is_said"] = True
        log.warning(
            "nobody took the auxiliary loss of %s in its last training forward, so nothing balances its experts: give "
            "it labels, so that its own loss contains it (Trainer's label_smoothing_factor and compute_loss_func take "
            "them away), or add tritonmoe.integrations.transformers.aux_loss(model) to yours",
            type(model).__name__,
        )
    state["is_left"] = True
