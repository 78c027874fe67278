"""OffloadedExperts: which weights of a module of experts stay in a file; put there, noted once on any such module."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import PerWeight
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.runtime.living import live_instances, refuse_what_lives
from tritonmoe.runtime.stand_in import StandIn, make_stand_in
from tritonmoe.runtime.streamed import (
    ExpertReader,
    StreamedWeight,
    make_handle,
    words_of_waits,
    write_weights,
)

__all__ = [
    "ExpertsToOffload",
    "Offload",
    "OffloadedExperts",
    "check_offloadable",
    "check_to",
    "offload_modules",
    "offloaded_of",
    "runs_outside_graphs",
]

ATTRIBUTE = "_tritonmoe_offloaded"
"""Of a module of experts: its OffloadedExperts."""
FREE_SHARE = 0.02
"""Of a disk, that is left free."""


@dataclass(frozen=True, eq=False)
class OffloadedExperts:
    """The weights of one module of experts that stay in a file."""

    name: str
    path: Path
    handles: Mapping[str, Tensor]
    """What a call has in their places, by PerWeight's names."""
    stand_ins: Mapping[str, StandIn]
    """What the module has in their places, by its own names."""
    reader: ExpertReader
    is_transposed: bool

    def __deepcopy__(self, _: object) -> "OffloadedExperts":
        return self  # copies of a model read the same file

    def __reduce_ex__(self, _: SupportsIndex) -> str:
        raise ValueError(
            f"the experts of {self.name} stay in {self.path}, and pickle (torch.save of a whole module, a spawned "
            "process) would keep no values of them: save state_dict(), which has all but these, and call "
            "offload_experts() again where the model is built anew"
        )

    def _check_rows(self, x: Tensor) -> None:
        """Raise ValueError or TypeError unless rows x can be multiplied by these experts."""
        if x.device.type != "cpu":
            raise ValueError(
                f"the experts of {self.name} stay in {self.path} and are computed on a CPU, but their rows are on "
                f"{x.device}: leave the model on the CPU, or, on a GPU, pack its experts (quantize_experts) or spread "
                "them over ranks (parallelize)"
            )
        dtype = self.handles["gate_up_proj"].dtype
        if "gate_up_scales" not in self.handles and x.dtype != dtype and not torch.is_autocast_enabled("cpu"):
            raise TypeError(
                f"the experts of {self.name} stay in {self.path} as {dtype}, and their rows are {x.dtype}: cast the "
                "model before offload_experts(), not after it"
            )

    def _check_names(self, module: nn.Module) -> None:
        """Raise ValueError where a module has got other weights under the names of those in the file."""
        for name, stand_in in self.stand_ins.items():
            if module.__dict__.get(name) is not stand_in:
                raise ValueError(
                    f"{name} of {self.name} was set since offload_experts(), and its calls would still read the weight "
                    f"in {self.path}: set it before that call, or build the model anew"
                )

    def weights(
        self, module: nn.Module, x: Tensor | None, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
    ) -> PerWeight[Tensor]:
        """Return the weights of a call with rows x, where it is known, and with these biases, which are in memory.

        module: whose weights these are.
        """
        self._check_names(module)
        if x is not None:
            self._check_rows(x)
        handles = self.handles
        return PerWeight(
            handles["gate_up_proj"],
            gate_up_bias,
            handles["down_proj"],
            down_bias,
            gate_up_scales=handles.get("gate_up_scales"),
            down_scales=handles.get("down_scales"),
        )


def offloaded_of(module: nn.Module) -> OffloadedExperts | None:
    """Return which weights of a module of experts stay in a file; None where all of them are in memory."""
    found = module.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, OffloadedExperts) else None


def runs_outside_graphs(module: nn.Module) -> bool:
    """Return whether a module's experts stay in files, which compiled graphs can't read.

    Raises:
        ValueError: the graph would be exported.
    """
    record = offloaded_of(module)
    if record is not None and torch.compiler.is_exporting():
        raise ValueError(
            f"the experts of {record.name} stay in {record.path}, and an exported program would have no values of "
            "them: export the model before offload_experts()"
        )
    if record is not None:
        torch._dynamo.graph_break(
            msg=f"the experts of {record.name} stay in a file, which a compiled graph can't read: leave fullgraph=True "
            "out, and the graph is left where they are computed"
        )
    return record is not None


@dataclass(frozen=True)
class ExpertsToOffload:
    """One module of experts, as its calls take its weights."""

    module: nn.Module
    load: Callable[[], Mapping[str, Tensor]]
    """Returns what goes into a file, by PerWeight's names: gate_up_proj, down_proj, and scales where they are packed.
    """
    parameter_names: tuple[str, ...]
    """What they are called in the module."""
    is_transposed: bool = False
    is_elsewhere: bool = False
    """Whether somebody else keeps the values, whose parameters are on the meta device."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that stand-ins will replace, by name."""
        return {name: self.module.get_parameter(name) for name in self.parameter_names}


@dataclass(frozen=True, eq=False)
class Offload:
    """What offload_experts() has done, and what reading has cost since."""

    path: Path
    reader: ExpertReader
    num_layers: int

    def __deepcopy__(self, _: object) -> "Offload":
        return self  # a copy of a model that has it reads by the same reader

    def __str__(self) -> str:
        reader = self.reader
        total = sum(weight.nbytes for weight in reader.weights)
        lines = [
            f"experts of {self.num_layers} layers stay in {self.path}, {total / 1e6:,.1f} MB; in memory are at most "
            f"{reader.limit_bytes / 1e6:,.1f} MB: {reader.resident_bytes / 1e6:,.1f} of the most used experts, and two "
            f"groups of {reader.group_bytes / 1e6:,.1f}"
        ]
        figures = reader.figures
        if figures.num_passes:
            rate = figures.num_bytes / max(figures.read_s, 1e-9) / 1e9
            lines.append(
                f"{figures.num_passes} forwards and backwards of experts took {figures.pass_s:.3f} s and read "
                f"{figures.num_bytes / 1e6:,.1f} MB ({rate:.2f} GB/s); they "
                f"{words_of_waits(figures.wait_s, figures.pass_s)}"
            )
        return "\n".join(lines)

    def reset(self) -> None:
        """Count from now on."""
        self.reader.figures.__init__()  # type: ignore[misc]  # readers keep the object


def offload_modules(found: Mapping[str, ExpertsToOffload], to: Path, resident_bytes: int) -> Offload:
    """Write the experts of modules into files, one a module, and let the modules read them from there.

    Raises:
        OSError: a file could not be written; then no module is changed.
    """
    to.mkdir(parents=True, exist_ok=True)
    names = {name: _file_name(name, experts.module) for name, experts in found.items()}
    _check_room(to, found, names)
    streamed: dict[str, dict[str, StreamedWeight]] = {}
    for name, experts in found.items():
        weights, shards = dict(experts.load()), shards_of(experts.module)
        file, offsets = write_weights(to / names[name], weights)
        ids = () if shards is None else shards.expert_ids
        streamed[name] = {
            key: StreamedWeight(f"{name}.{key}".lstrip("."), file, offsets[key], weight.dtype, tuple(weight.shape), ids)
            for key, weight in weights.items()
        }
        del weights  # before the next ones come
    reader = ExpertReader([weight for by_key in streamed.values() for weight in by_key.values()], resident_bytes)
    for name, experts in found.items():
        handles = {key: make_handle(weight) for key, weight in streamed[name].items()}
        _put(
            experts,
            OffloadedExperts(name or "the module", to / names[name], handles, {}, reader, experts.is_transposed),
        )
    return Offload(to, reader, len(found))


def _put(experts: ExpertsToOffload, record: OffloadedExperts) -> None:
    """Replace parameters of a module by what stands for them."""
    module, names = experts.module, experts.parameter_names
    why = (
        f"the experts of {record.name} stay in {record.path}, and only tritonmoe reads them there. Do it before "
        "offload_experts(), or load the model again"
    )
    stand_ins: dict[str, StandIn] = {}
    for name in names:
        parameter = module._parameters.pop(name)
        assert parameter is not None
        stand_ins[name] = make_stand_in(tuple(parameter.shape), parameter.dtype, why)
    module.__dict__.update(stand_ins)
    shards = shards_of(module)
    if shards is not None:
        shards.names = tuple([name for name in shards.names if name not in names])
    module.__dict__[ATTRIBUTE] = replace(record, stand_ins=stand_ins)
    module.register_load_state_dict_pre_hook(_refuse_loaded)


def _refuse_loaded(module: nn.Module, state_dict: MutableMapping[str, object], prefix: str, *_: object) -> None:
    """Raise ValueError where a state dict has weights that stay in a file."""
    record = offloaded_of(module)
    names = () if record is None else [name for name in module.__dict__ if prefix + name in state_dict]
    if record is not None and names:
        raise ValueError(
            f"the state dict has {prefix}{names[0]}, which stays in {record.path} since offload_experts(): load it "
            "before that call, or leave these names out; a state dict of this model has none of them"
        )


def _file_name(name: str, module: nn.Module) -> str:
    shards = shards_of(module)
    rank = ""
    if shards is not None and shards.transport.size > 1:
        rank = f".rank-{shards.transport.rank}-of-{shards.transport.size}"
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name) or 'experts'}{rank}.safetensors"


def _check_room(to: Path, found: Mapping[str, ExpertsToOffload], names: Mapping[str, str]) -> None:
    """Raise OSError where the files don't fit on the disk."""
    wanted = sum(weight.numel() * weight.itemsize for one in found.values() for weight in one.parameters.values())
    usage = shutil.disk_usage(to)
    there = sum((to / name).stat().st_size for name in names.values() if (to / name).exists())
    if wanted > usage.free + there - FREE_SHARE * usage.total:
        raise OSError(
            f"the experts are {wanted / 1e9:.1f} GB, and {to} has {usage.free / 1e9:.1f} GB free: give a folder on a "
            "larger disk, or pack the experts first (quantize_experts)"
        )


def check_to(to: object, resident_bytes: object) -> Path:
    """Return the folder of offload_experts(to=...).

    Raises:
        ValueError, TypeError: it is none, or resident_bytes is no number of bytes.
    """
    if isinstance(to, str) and to in ("cpu", "cuda"):
        raise ValueError(
            f"offload_experts(to={to!r}) has nothing to do: experts on a CPU are in host memory already, and from a "
            "GPU to host memory they can't be offloaded yet. Give a folder, on a disk that reads fast"
        )
    if not isinstance(to, str | Path):
        raise TypeError(f"`to` must be the path of a folder, got {type(to).__name__}")
    if not isinstance(resident_bytes, int) or isinstance(resident_bytes, bool) or resident_bytes < 0:
        raise ValueError(f"resident_bytes must be an integer of at least 0, got {resident_bytes!r}")
    return Path(to)


def check_offloadable(found: Mapping[str, ExpertsToOffload]) -> None:
    """Raise ValueError where experts can't be offloaded; nothing is changed then."""
    own: dict[int, str] = {}
    for name, experts in found.items():
        for parameter_name, parameter in experts.parameters.items():
            own[id(parameter)] = f"{name}.{parameter_name}".lstrip(".")
            if parameter.dim() < 2:
                raise ValueError(
                    f"{own[id(parameter)]} has the shape {tuple(parameter.shape)}, as FullyShardedDataParallel leaves "
                    "a rank's part of it: call offload_experts() first"
                )
            if hasattr(parameter, "device_mesh") and shards_of(experts.module) is None:
                raise ValueError(
                    f"{own[id(parameter)]} is a DTensor (fully_shard, parallelize_module): call offload_experts() first"
                )
            if parameter.grad is not None:
                raise ValueError(
                    f"{own[id(parameter)]} has a gradient, and offloaded experts are frozen: call zero_grad() first"
                )
            if parameter.is_meta and not experts.is_elsewhere:
                raise ValueError(f"{own[id(parameter)]} is on the meta device, and has no values yet: load it first")
            if parameter.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f"{own[id(parameter)]} is on {parameter.device}, and experts are offloaded from a CPU, which "
                    "computes with them: model.to('cpu') first"
                )
    refuse_what_lives(lambda: _wait_for_them(own))


def _wait_for_them(own: Mapping[int, str]) -> Iterator[str]:
    """Yield why these parameters, by id, can't go: who was made with them and lives."""
    for wrapped in live_instances(nn.parallel.DistributedDataParallel):
        for parameter in getattr(wrapped, "_module_parameters", ()):
            if id(parameter) in own and parameter.requires_grad:
                yield (
                    f"DistributedDataParallel was made with {own[id(parameter)]}, and would wait for its gradient: "
                    "call offload_experts() first"
                )
    for optimizer in live_instances(torch.optim.Optimizer):
        for group in getattr(optimizer, "param_groups", ()):
            for parameter in group["params"]:
                if id(parameter) in own:
                    yield (
                        f"{type(optimizer).__name__} was made with {own[id(parameter)]}, and offloaded experts are "
                        "frozen: call offload_experts() first, and make the optimizer of what is left to train"
                    )
