"""Every weight of a model of transformers, packed or not, by the name it has without wrappers, and what adapts it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.config.formats import format_of, weight_shape
from tritonmoe.experts.quantized_weight import QuantizedWeight
from tritonmoe.integrations.weight_sync.merged_rows import active_adapters, add_the_same, check_adapter, local_part
from tritonmoe.placement.expert_shards import sharded_modules, shards_of
from tritonmoe.placement.offloaded import offloaded_of
from tritonmoe.placement.placed_rows import ExpertsOfRank
from tritonmoe.placement.watched_collectives import full_tensor
from tritonmoe.runtime.wrappers import inside_wrapper, refuse_computed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Weight", "check_as_it_is", "check_plain", "model_inside", "model_weights"]


DECODED = "tm.export_weights(model, dequantize=True) gives it in bf16, adapters merged"


class PackedWeight(NamedTuple):
    """A weight of an experts module that is packed."""

    experts: nn.Module
    name: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the module's own parameters that hold it; none where a parametrization does."""
        names = (self.name, *(f"{self.name}{suffix}" for suffix in ("_blocks", "_scales", "_scale_inv")))
        return tuple(name for name in names if name in self.experts._parameters)

    @property
    def values(self) -> Tensor:
        """The parameter that has its values: of the experts of all ranks, where they are spread."""
        if self.parts:
            return self.experts.get_parameter(self.parts[0])
        return self.experts.get_submodule(f"parametrizations.{self.name}").get_parameter("original")

    @property
    def like(self) -> Tensor:
        """On the meta device, what it is once it is decoded."""
        values, scales, is_swapped = self._read(local_part)
        num_experts = len(self.values) if self.parts else len(values)
        _, rows, columns = weight_shape(values, scales)
        sizes = (columns, rows) if is_swapped else (rows, columns)
        return torch.empty(1, dtype=torch.bfloat16, device="meta").expand(num_experts, *sizes)

    def decoder(self, what: str, *, is_local: bool) -> Callable[[int, int], Tensor]:
        """Return what decodes so many experts, from one on, to the form of the module's class.

        Args:
            what: says in which call, to whoever waits long.
            is_local: of this rank's experts; else of all, and every rank calls.
        """
        values, scales, is_swapped = self._read(local_part if is_local else lambda tensor: full_tensor(tensor, what))

        def decode(first: int, number: int) -> Tensor:
            own = slice(first, first + number)
            rows = QuantizedWeight(format_of(values, scales).name, values[own], scales[own]).decode()
            return rows.mT if is_swapped else rows

        return decode

    def _read(self, whole: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, bool]:
        """Return values, scales, and whether the last two axes of the class's own weight are the other way round."""
        from tritonmoe.integrations.transformers.packed.packed_experts import read_packed

        experts = self.experts
        values, scales, is_transposed = read_packed(experts, self.name, lambda key: whole(experts.get_parameter(key)))
        return values.detach(), scales.detach(), is_transposed != bool(getattr(experts, "is_transposed", False))


def _packed_weights(module: nn.Module) -> list[PackedWeight]:
    """Return the packed weights of a module of experts; none of another."""
    from tritonmoe.integrations.transformers.packed.packed_experts import is_packed_weight, up_name

    return [PackedWeight(module, name) for name in (up_name(module), "down_proj") if is_packed_weight(module, name)]


def check_as_it_is(model: "PreTrainedModel", name: str, weight: PackedWeight, adapted_by: Sequence[nn.Module]) -> None:
    """Raise ValueError unless a checkpoint of this model has these bytes, and no adapter is to be added to them."""
    from tritonmoe.integrations.transformers.packed.packed_experts import PACKED
    from tritonmoe.integrations.transformers.requirements import quantisation_method

    method, layout = quantisation_method(model), getattr(weight.experts, PACKED, None)
    if not weight.parts:
        raise ValueError(
            f"{name} is packed by bitsandbytes, whose form of experts in one tensor no engine reads: {DECODED}"
        )
    if method is None or (layout is not None and layout.weight_format != method):
        kind = "packed" if layout is None else layout.weight_format
        raise ValueError(
            f"{name} is {kind}, and the checkpoint of this model is {method or 'not quantised'}: quantize_experts() "
            f"has packed it here, and no engine knows. {DECODED}; or send adapters beside the model that the engine has"
        )
    if any(active_adapters(wrapper) for wrapper in adapted_by):
        raise ValueError(
            f"{name} is packed, and an active adapter can't be merged into its bytes: {DECODED}, for an engine whose "
            "model is not quantised; for one whose model is, export inside model.disable_adapter(), once, and send the "
            "adapter beside it"
        )


class Weight(NamedTuple):
    """A parameter or a saved buffer."""

    tensor: Tensor
    adapted_by: tuple[nn.Module, ...] = ()
    """PEFT's wrappers of it, innermost first."""
    experts_of_rank: ExpertsOfRank | None = None
    """The expert in each slot of each rank, where rebalancing has put its rows in another order than the model's."""
    packed: PackedWeight | None = None
    """What the tensor is a part of, or holds the values of."""
    is_decoded: bool = False
    """Whether it stands for a packed weight that comes decoded, and not for its own bytes."""

    @property
    def like(self) -> Tensor:
        """A tensor of the shape and dtype in which the weight comes."""
        return self.packed.like if self.packed is not None and self.is_decoded else self.tensor


def model_inside(model: nn.Module) -> "PreTrainedModel":
    """Return the model of transformers inside DistributedDataParallel, torch.compile and PEFT's wrapper.

    Raises:
        TypeError: there is none. ImportError: transformers is missing or too old.
        ValueError: FullyShardedDataParallel or DeepSpeed hold the weights, in forms of their own; experts are spread
            over ranks that torch doesn't know.
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
    for name, _, shards in sharded_modules(inside):
        if shards.sharding.members is None:
            raise ValueError(
                f"{name} has this rank's experts alone, under names of all experts: the others are on ranks that are "
                "not torch.distributed's (emulated ranks, MPI), from which nothing is gathered. load_weights() takes a "
                "layer that is whole (transport=None); export_weights() takes no layer of tritonmoe, but models of "
                "transformers, spread over processes by parallelize(model, dist.group.WORLD)"
            )
    return inside


def model_weights(model: "PreTrainedModel", *, dequantize: bool = False) -> dict[str, Weight]:
    """Return the weights that save_pretrained would write, by the model's own names, tied ones once.

    FSDP2's parameters are sharded again first, as by state_dict().

    Args:
        dequantize: let packed weights of experts come decoded, under the names of plain ones.
    Raises:
        ValueError: a weight is made of others by something that is not known here.
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for child in model.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
    ignored = set(model._keys_to_ignore_on_save or ())
    found = {name: weight for name, weight in _weights_in(model, "", (), dequantize) if name not in ignored}
    # Of one number for each weight, tied ones share it as they share theirs.
    stand_ins = {id(weight.tensor): torch.zeros(1, device="cpu") for weight in found.values()}
    kept = {name: stand_ins[id(weight.tensor)] for name, weight in found.items()}
    try:
        remove_tied_weights_from_state_dict(kept, model)
    except RuntimeError as error:  # known ties are removed by then
        first: dict[int, str] = {}
        shared = ((first.setdefault(id(number), name), name) for name, number in kept.items())
        one, other = next(names for names in shared if names[0] != names[1])
        raise ValueError(
            f"{one} and {other} share their numbers, and the model's configuration does not tie them, as PEFT's "
            "layer_replication does: a weight of a checkpoint must have numbers of its own. Replace one of the two "
            "layers by copy.deepcopy() of itself, or send adapters alone, beside the base model"
        ) from error
    _check_tied(model, found)
    own = {id(found[name].tensor): found[name] for name in kept}
    # Where the configuration ties no weights, those that share their numbers may have adapters of their own.
    return {
        name: weight
        for name, weight in found.items()
        if name in kept or not add_the_same(weight.adapted_by, own[id(weight.tensor)].adapted_by)
    }


def _check_tied(model: "PreTrainedModel", found: dict[str, Weight]) -> None:
    """Raise ValueError where weights that the model's configuration ties have become two."""
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if name not in found or source not in found:
            continue
        one, other = found[name], found[source]
        is_one = one.tensor is other.tensor or torch.equal(local_part(one.tensor), local_part(other.tensor))
        if not is_one or not add_the_same(one.adapted_by, other.adapted_by):
            raise ValueError(
                f"{name} and {source} are tied by the model's configuration (tie_word_embeddings=True), and here they "
                "are two weights, by adapters or copies of one of them: an engine that reads this configuration takes "
                "the second for both. Before training, load the model with tie_word_embeddings=False, copy the second "
                "weight into the first, save_pretrained(), and start training and engine from there; or let PEFT tie "
                'the adapters too, with LoraConfig(target_modules=["embed_tokens", ...], ensure_weight_tying=True)'
            )


def _weights_in(
    module: nn.Module, prefix: str, adapted_by: tuple[nn.Module, ...], dequantize: bool
) -> Iterator[tuple[str, Weight]]:
    name = prefix.rstrip(".")
    if (inside := inside_wrapper(module)) is not None:
        if "base_layer" in module._modules:
            check_adapter(name, module)
            adapted_by = (module, *adapted_by)
        yield from _weights_in(inside, prefix, adapted_by, dequantize)
        return
    if "original_module" in module._modules:
        raise ValueError(
            f"{name} is a {type(module).__name__} of PEFT, whose weights can't be merged one by one: export a copy of "
            "the model after merge_and_unload()"
        )
    if (offloaded := offloaded_of(module)) is not None:
        raise ValueError(
            f"the experts of {name} stay in {offloaded.place} since offload_experts(), and are neither exported nor "
            "loaded: send the adapters (PEFT's save_pretrained), or load the model again without offload_experts()"
        )
    packed = _packed_weights(module)
    refuse_computed(name, module, _computed(module) if not packed else (), "its weights are exported or loaded")
    yield from (
        (prefix + own_name, weight) for own_name, weight in _own_weights(module, packed, adapted_by, dequantize)
    )
    for child_name, child in module._modules.items():
        if child is not None and not (packed and child_name == "parametrizations"):
            yield from _weights_in(child, f"{prefix}{child_name}.", (), dequantize)


def _computed(module: nn.Module) -> list[str]:
    """Return the names of weights that a parametrization computes, or a hook (pruning, the older weight_norm)."""
    hooked = [name.removesuffix(end) for name in module._parameters for end in ("_orig", "_g") if name.endswith(end)]
    own: Any = module._modules.get("parametrizations", ())
    return [*own, *(name for name in hooked if isinstance(module.__dict__.get(name), Tensor))]


def _own_weights(
    module: nn.Module, packed: list[PackedWeight], adapted_by: tuple[nn.Module, ...], dequantize: bool
) -> Iterator[tuple[str, Weight]]:
    """Yield the weights of a module itself: of packed ones their bytes or, with `dequantize`, one weight each."""
    shards = shards_of(module)

    def weight(own_name: str, tensor: Tensor, one: PackedWeight | None, is_decoded: bool) -> Weight:
        order = shards.order if shards is not None and own_name in shards.names else None
        # PEFT's wrappers of parameters adapt one each, those of layers the weight
        adapted = own_name if one is None else one.name
        by = tuple(wrapper for wrapper in adapted_by if getattr(wrapper, "parameter_name", "weight") == adapted)
        return Weight(tensor, by, order, one, is_decoded)

    own: list[tuple[str, Tensor | None]] = [
        *module._parameters.items(),
        *((n, buffer) for n, buffer in module._buffers.items() if n not in module._non_persistent_buffers_set),
    ]
    part_of = {name: one for one in packed for name in one.parts}
    for own_name, tensor in own:
        if tensor is not None and not (dequantize and own_name in part_of):
            yield own_name, weight(own_name, tensor, part_of.get(own_name), is_decoded=False)
    for one in packed:
        if dequantize or not one.parts:
            yield one.name, weight(one.parts[0] if one.parts else one.name, one.values, one, is_decoded=dequantize)


def check_plain(weights: dict[str, Weight], *, or_packed: bool = False) -> None:
    """Raise ValueError unless each weight holds the numbers that it stands for, or is one of packed experts."""
    from tritonmoe.integrations.transformers.requirements import quantised_kind

    for name, weight in weights.items():
        is_allowed = or_packed and weight.packed is not None
        kind = quantised_kind(weight.tensor) if isinstance(weight.tensor, nn.Parameter) and not is_allowed else None
        if kind is not None:
            packed = ", or with experts alone packed (tmt.register(packed=True))" if or_packed else ""
            raise ValueError(
                f"{name} is quantised ({kind}), and its numbers are not in it: load the model in bf16 "
                f"(Mxfp4Config(dequantize=True), say){packed}, or send the files that it was loaded from, and adapters "
                "alone"
            )
        if weight.tensor.is_meta:
            raise ValueError(f"{name} has no values yet (meta device), or is offloaded by Accelerate: load it first")
