"""Every weight of a model of transformers, under the name it would have without wrappers, and what adapts it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.integrations.weight_sync.merged_rows import check_adapter
from tritonmoe.runtime.wrappers import inside_wrapper
from tritonmoe.sharding.marks import MARK, ShardedNames
from tritonmoe.sharding.placed_rows import ExpertsOfRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Weight", "check_plain", "model_inside", "model_weights"]


class Weight(NamedTuple):
    """A parameter or a saved buffer."""

    tensor: Tensor
    adapted_by: tuple[nn.Module, ...] = ()
    """PEFT's wrappers of it, innermost first."""
    experts_of_rank: ExpertsOfRank | None = None
    """The expert in each slot of each rank, where rebalancing has put its rows in another order than the model's."""


def model_inside(model: nn.Module) -> "PreTrainedModel":
    """Return the model of transformers inside DistributedDataParallel, torch.compile and PEFT's wrapper.

    Raises:
        TypeError: there is none. ImportError: transformers is missing or too old.
        ValueError: FullyShardedDataParallel or DeepSpeed hold the weights, in forms of their own.
    """
    from tritonmoe.integrations.transformers.requirements import check_model, check_transformers

    check_transformers()
    check_model(model)
    from transformers import PreTrainedModel

    inside = model
    while not isinstance(inside, PreTrainedModel):
        kind = type(inside).__name__
        if kind == "DistributedDataParallel":
            inside = inside.get_submodule("module")
        elif kind == "OptimizedModule":
            inside = inside.get_submodule("_orig_mod")
        elif any(base.__name__ == "PeftModel" for base in type(inside).__mro__):
            if getattr(inside, "active_peft_config", None) is not None and inside.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
                raise ValueError(
                    "prompt learning of PEFT changes no weight, and an engine that gets this model's weights would "
                    "generate without it: send its adapter beside the base model, as the engine takes it"
                )
            inside = inside.get_base_model()  # type: ignore[operator]
        else:
            raise TypeError(
                f"{kind} is no model of transformers, nor PEFT's, torch.compile's or DistributedDataParallel's around "
                "one, so its weights have no names of a transformers checkpoint: send its state_dict() instead"
            )
    for child in model.modules():
        if type(child).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) keeps weights in flat parameters: shard with fully_shard() instead, "
                "after parallelize()"
            )
    if any(hasattr(parameter, "ds_id") for parameter in inside.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 keeps weights in partitions of its own: spread the experts with parallelize() and shard "
            "the rest with fully_shard()"
        )
    return inside


def model_weights(model: "PreTrainedModel") -> dict[str, Weight]:
    """Return the weights that save_pretrained would write, by the model's own names, tied ones once.

    FSDP2's parameters are sharded again first, as by state_dict().

    Raises:
        ValueError: a weight is made of others by something that is not known here.
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for child in model.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
    ignored = set(model._keys_to_ignore_on_save or ())
    found = {name: weight for name, weight in _weights_in(model, "", ()) if name not in ignored}
    # Of one number for each weight, tied ones share it as they share theirs.
    stand_ins = {id(weight.tensor): torch.zeros(1, device="cpu") for weight in found.values()}
    kept = remove_tied_weights_from_state_dict({n: stand_ins[id(w.tensor)] for n, w in found.items()}, model)
    return {name: found[name] for name in kept}


def _weights_in(module: nn.Module, prefix: str, adapted_by: tuple[nn.Module, ...]) -> Iterator[tuple[str, Weight]]:
    name = prefix.rstrip(".")
    if (inside := inside_wrapper(module)) is not None:
        if "base_layer" in module._modules:
            check_adapter(name, module)
            adapted_by = (module, *adapted_by)
        yield from _weights_in(inside, prefix, adapted_by)
        return
    if "original_module" in module._modules:
        raise ValueError(
            f"{name} is a {type(module).__name__} of PEFT, whose weights can't be merged one by one: export a copy of "
            "the model after merge_and_unload()"
        )
    if "parametrizations" in module._modules:
        raise ValueError(
            f"weights of {name} are computed from other parameters (a parametrization), which no checkpoint has: call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    own: list[tuple[str, Tensor | None]] = [
        *module._parameters.items(),
        *((n, buffer) for n, buffer in module._buffers.items() if n not in module._non_persistent_buffers_set),
    ]
    marked: ShardedNames | None = module.__dict__.get(MARK)
    for own_name, tensor in own:
        if tensor is not None:
            order = marked.experts_of_rank if marked is not None and own_name in marked.names else None
            # PEFT's wrappers of parameters adapt one each, those of layers the weight
            by = tuple(one for one in adapted_by if getattr(one, "parameter_name", "weight") == own_name)
            yield prefix + own_name, Weight(tensor, by, order)
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _weights_in(child, f"{prefix}{child_name}.", ())


def check_plain(weights: dict[str, Weight]) -> None:
    """Raise ValueError unless each weight holds the numbers that it stands for."""
    from tritonmoe.integrations.transformers.requirements import quantised_kind

    for name, weight in weights.items():
        if isinstance(weight.tensor, nn.Parameter) and (kind := quantised_kind(weight.tensor)) is not None:
            raise ValueError(
                f"{name} is quantised ({kind}), and the form that an engine expects depends on the format and on the "
                "engine: load the model in bf16 (Mxfp4Config(dequantize=True), say), or send the files that it was "
                "loaded from and export adapters alone"
            )
        if weight.tensor.is_meta:
            raise ValueError(f"{name} has no values yet (meta device), or is offloaded by Accelerate: load it first")
