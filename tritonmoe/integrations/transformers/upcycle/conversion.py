"""A dense model becomes a Mixture-of-Experts model that starts as its equal, and the proof that it does."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tritonmoe.integrations.transformers.requirements import check_model, check_transformers
from tritonmoe.integrations.transformers.trainer_checkpoints import IS_UPCYCLED, patch_trainer
from tritonmoe.integrations.transformers.upcycle.checkpoint_model import find_model_class
from tritonmoe.integrations.transformers.upcycle.expert_init import Init, UpcycleSettings
from tritonmoe.integrations.transformers.upcycle.ffn_blocks import LayerChoice, find_blocks, select_blocks
from tritonmoe.integrations.transformers.upcycle.inplace import InplaceConversion
from tritonmoe.integrations.transformers.upcycle.native import NATIVE_TARGETS, NativeConversion
from tritonmoe.layer import MoELayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["UpcycleReport", "make_conversion", "upcycle", "verify_upcycle"]

log = logging.getLogger("tritonmoe")


def upcycle(
    model: "PreTrainedModel",
    num_experts: int,
    top_k: int,
    granularity: int = 1,
    init: Init = "copy",
    shared_expert: bool = False,
    target: str = "auto",
    layers: LayerChoice = "all",
    seed: int = 0,
) -> "PreTrainedModel":
    """Return a Mixture-of-Experts model made from a dense model of transformers; the dense one stays as it is.

    With init="copy" the new model computes what the dense one does, up to rounding, whatever the router chooses:
    verify_upcycle() shows it. Training makes experts differ, since each sees other tokens.

    Args:
        model: a PreTrainedModel, on one device, not quantised.
        num_experts: E. top_k: K, the experts that a token reaches, which must be a multiple of granularity.
        granularity: G; an expert is 1 / G of the feed-forward block, so that with K = G a token costs what it did.
        init: "copy"; "noise" adds N(0, 0.02) to each weight, in standard deviations of its matrix; "drop" draws half of
            each expert's units anew (Drop-Upcycling, https://arxiv.org/abs/2502.19261). The last two are not exact.
        shared_expert: add an expert that every token reaches; it and the routed ones start with half of the output.
        target: "auto" takes the MoE architecture of transformers where there is one, and "inplace" else; or that
            architecture's model_type, such as "mixtral"; or "inplace".
        layers: "all", positions of the blocks to convert, or a function of (position, path).
        seed: draws routers, noise and re-drawn units; the same seed gives the same bits.
    Returns:
        A model of the target's class, which saves and loads as any other; in place, a copy of `model` with MoE layers
        inside, whose save_pretrained goes with load_upcycled(), and whose own loss in training contains aux_loss().
    Raises:
        ValueError: there is nothing to replace, or the result could not equal the dense model; nothing is changed.
        ImportError: transformers is missing or older than 5.7.
    """
    check_transformers()
    check_model(model)
    settings = UpcycleSettings(
        num_experts=num_experts,
        top_k=top_k,
        granularity=granularity,
        init=init,
        shared_expert=shared_expert,
        seed=seed,
    )
    _check_one_device(model)
    conversion = make_conversion(model, settings, target=target, layers=layers)
    converted = cast("PreTrainedModel", conversion.convert(model))
    patch_trainer()
    if isinstance(conversion, InplaceConversion):
        from tritonmoe.integrations.transformers.upcycle.saved import remember_conversion

        remember_conversion(converted, conversion)
        if find_model_class(type(model).__name__) is not type(model):
            log.warning(
                "%s is no class of transformers' own: load what save_pretrained of this model writes by "
                "load_upcycled(directory, model_class=...)",
                type(model).__qualname__,
            )
    else:
        converted.__dict__[IS_UPCYCLED] = True
    return converted


def _check_one_device(model: "PreTrainedModel") -> None:
    """Raise ValueError unless all parameters are whole and on one device."""
    places = {str(parameter.device) for parameter in model.parameters()}
    places |= {"ranks" for parameter in model.parameters() if hasattr(parameter, "to_local")}
    if len(places) > 1 or "meta" in places:
        raise ValueError(
            f"the model is spread over {', '.join(sorted(places))}: load it on one device, or use "
            "upcycle_checkpoint() or `tritonmoe upcycle`, which work on files"
        )


def make_conversion(
    dense: "PreTrainedModel", settings: UpcycleSettings, *, target: str, layers: LayerChoice
) -> NativeConversion | InplaceConversion:
    """Check all that needs no weight's value, log what the user should know, and return the conversion."""
    blocks = find_blocks(dense)
    chosen = select_blocks(blocks, layers)
    model_type: str = dense.config.model_type
    native = NATIVE_TARGETS.get(model_type)
    if target not in ("auto", "inplace") and (native is None or native.model_type != target):
        can = f"{native.model_type!r} or 'inplace'" if native else "'inplace'"
        raise ValueError(f"{model_type} can't become {target!r}: for it, target is 'auto', {can}")
    conversion: NativeConversion | InplaceConversion
    if native is not None and target != "inplace":
        conversion = NativeConversion(dense, settings, blocks, chosen)
        if not conversion.has_aux_loss:
            log.warning(
                "%s has no auxiliary loss in transformers: nothing will balance its experts in training unless you add "
                "one (tritonmoe.routing.load_balance_loss), or use target='inplace'",
                native.model_type,
            )
    else:
        conversion = InplaceConversion(dense, settings, chosen)
    if settings.init != "copy":
        log.warning("init=%r is not exact: the new model starts near the dense one, not equal to it", settings.init)
    if settings.top_k == 1:
        log.warning(
            "with top_k=1 a renormalised weight is always 1, so the router learns from the auxiliary loss alone: "
            "use top_k >= 2"
        )
    return conversion


@dataclass(frozen=True)
class UpcycleReport:
    """How far an upcycled model is from its dense model on one batch, and what it costs."""

    max_error: float
    """Largest absolute difference between their outputs."""
    max_output: float
    """Largest absolute value of the dense output."""
    dense_parameters: int
    parameters: int
    active_parameters: int
    """What one token touches: K of the E experts, and everything else."""

    @property
    def relative_error(self) -> float:
        return self.max_error / self.max_output if self.max_output else self.max_error

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.3e} ({self.relative_error:.1e} of the largest output, {self.max_output:.4g}); "
            f"parameters {self.dense_parameters:,} -> {self.parameters:,}, active {self.active_parameters:,}"
        )


@torch.no_grad()
def verify_upcycle(
    dense: "PreTrainedModel", moe: "PreTrainedModel", batch: Tensor | dict[str, Tensor]
) -> UpcycleReport:
    """Run both models on one batch, without dropout, print how far they are apart, and give the report.

    Args:
        batch: the model's main input (token ids, pixel values, ...), or keyword arguments for both models.
    """
    arguments = batch if isinstance(batch, dict) else {dense.main_input_name: batch}
    outputs = []
    for model in (dense, moe):
        was_training = model.training
        outputs.append(_main_output(model.eval()(**arguments)).double())
        model.train(was_training)
    report = UpcycleReport(
        max_error=(outputs[0] - outputs[1]).abs().max().item(),
        max_output=outputs[0].abs().max().item(),
        dense_parameters=sum(p.numel() for p in dense.parameters()),
        parameters=sum(p.numel() for p in moe.parameters()),
        active_parameters=_active_parameters(moe),
    )
    print(report)
    return report


def _main_output(output: object) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if found is not None:
            return found
    raise ValueError(f"{type(output).__name__} has neither logits nor last_hidden_state to compare")


def _active_parameters(model: "PreTrainedModel") -> int:
    """Count parameters, of the experts only K / E."""
    active = sum(p.numel() for p in model.parameters())
    layers = {path: module.config.top_k for path, module in model.named_modules() if isinstance(module, MoELayer)}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name == "experts":
            top_k = layers.get(parent) or model.config.num_experts_per_tok
            for parameter in module.parameters():
                active -= parameter.numel() * (parameter.shape[0] - top_k) // parameter.shape[0]
    return active
