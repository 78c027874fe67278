"""OffloadedExperts: which weights of a module stay in a file or in host memory; put there, noted once on the module."""

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, SupportsIndex

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import PerWeight
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.runtime.expert_blocks import copies_late, has_late_device
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.runtime.living import live_instances, refuse_what_lives
from tritonmoe.runtime.pinned_memory import PinnedMemory, pin_weights
from tritonmoe.runtime.stand_in import StandIn, make_stand_in
from tritonmoe.runtime.streamed import (
    ExpertReader,
    StreamedWeight,
    make_handle,
    words_of_waits,
)
from tritonmoe.runtime.weight_files import WeightFile, write_weights

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
PINNED = "pinned host memory"
FREE_SHARE = 0.02
"""Of a disk, that is left free."""


@dataclass(frozen=True, eq=False)
class OffloadedExperts:
    """The weights of one module of experts that stay in a file, or in pinned host memory."""

    name: str
    place: str
    """Where they stay, in words."""
    weights_by_key: Mapping[str, StreamedWeight]
    """By PerWeight's names."""
    stand_ins: Mapping[str, StandIn]
    """What the module has in their places, by its own names."""
    offload: "Offload"
    is_transposed: bool

    def __deepcopy__(self, _: object) -> "OffloadedExperts":
        return self  # copies of a model read the same file

    def __reduce_ex__(self, _: SupportsIndex) -> str:
        raise ValueError(
            f"the experts of {self.name} stay in {self.place}, and pickle (torch.save of a whole module, a spawned "
            "process) would keep no values of them: save state_dict(), which has all but these, and call "
            "offload_experts() again where the model is built anew"
        )

    def _check_rows(self, x: Tensor) -> None:
        """Raise ValueError or TypeError unless rows x can be multiplied by these experts."""
        is_late, weight = copies_late(x.device), self.weights_by_key["gate_up_proj"]
        if not is_late and (x.device.type != "cpu" or isinstance(weight.source, PinnedMemory)):
            where = "a GPU (CUDA, ROCm)" if isinstance(weight.source, PinnedMemory) else "a CPU or a GPU (CUDA, ROCm)"
            raise ValueError(
                f"the experts of {self.name} stay in {self.place}, from where they are computed on {where}, but their "
                f"rows are on {x.device}: move the model and its inputs there"
            )
        if is_late and is_captured(x.device):
            raise ValueError(
                f"the experts of {self.name} stay in {self.place}, and a CUDA graph can't hold copies of experts that "
                "tokens choose: call the model outside of torch.cuda.graph"
            )
        is_autocast = torch.is_autocast_enabled(x.device.type)
        if "gate_up_scales" not in self.weights_by_key and x.dtype != weight.dtype and not is_autocast:
            raise TypeError(
                f"the experts of {self.name} stay in {self.place} as {weight.dtype}, and their rows are {x.dtype}: "
                "cast the model before offload_experts(), not after it"
            )

    def _check_names(self, module: nn.Module) -> None:
        """Raise ValueError where a module has got other weights under the names of those in the file."""
        for name, stand_in in self.stand_ins.items():
            if module.__dict__.get(name) is not stand_in:
                raise ValueError(
                    f"{name} of {self.name} was set since offload_experts(), and its calls would still read the weight "
                    f"in {self.place}: set it before that call, or build the model anew"
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
        handles = self.offload.handles(self.name, torch.device("cpu") if x is None else x.device)
        return PerWeight(
            handles["gate_up_proj"],
            gate_up_bias,
            handles["down_proj"],
            down_bias,
            gate_up_scales=handles.get("gate_up_scales"),
            down_scales=handles.get("down_scales"),
        )


def offloaded_of(module: nn.Module) -> OffloadedExperts | None:
    """Return which weights of a module of experts stay elsewhere; None where all of them are in memory."""
    found = module.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, OffloadedExperts) else None


def runs_outside_graphs(module: nn.Module) -> bool:
    """Return whether a module's experts stay elsewhere, where compiled graphs can't read them.

    Raises:
        ValueError: the graph would be exported.
    """
    record = offloaded_of(module)
    if record is not None and torch.compiler.is_exporting():
        raise ValueError(
            f"the experts of {record.name} stay in {record.place}, and an exported program would have no values of "
            "them: export the model before offload_experts()"
        )
    if record is not None:
        torch._dynamo.graph_break(
            msg=f"the experts of {record.name} stay in {record.place}, where no compiled graph reads: leave "
            "fullgraph=True out, and the graph is left where they are computed"
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


class Offload:
    """What offload_experts() has done, and what reading has cost since."""

    def __init__(self, place: str, weights: Mapping[str, Mapping[str, StreamedWeight]], resident_bytes: int) -> None:
        """weights: by the names of modules, and PerWeight's. resident_bytes: on each device whose rows use them."""
        self.place, self._weights, self._resident_bytes = place, weights, resident_bytes
        self._on_device: dict[torch.device, _OnDevice] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, _: object) -> "Offload":
        return self  # a copy of a model that has it reads by the same reader

    def _of_device(self, device: torch.device) -> "_OnDevice":
        with self._lock:
            if device not in self._on_device:
                self._on_device[device] = _OnDevice(self._weights, self._resident_bytes, device)
            return self._on_device[device]

    def handles(self, name: str, device: torch.device) -> Mapping[str, Tensor]:
        """Return what a call with rows on a device has in the places of a module's weights, by PerWeight's names."""
        return self._of_device(device).handles[name]

    def reader(self, device: torch.device | str = "cpu") -> ExpertReader:
        """Return what reads the experts ahead for rows on a device."""
        return self._of_device(torch.empty(0, device=device).device).reader

    def __str__(self) -> str:
        total = sum(weight.nbytes for by_key in self._weights.values() for weight in by_key.values())
        said = f"experts of {len(self._weights)} layers stay in {self.place}, {total / 1e6:,.1f} MB"
        with self._lock:
            readers = [of.reader for of in self._on_device.values()]
        return "\n".join([said, *(line for reader in readers for line in _lines_of(reader))])

    __repr__ = __str__

    def reset(self) -> None:
        """Count from now on."""
        with self._lock:
            for of in self._on_device.values():
                of.reader.figures.__init__()  # type: ignore[misc]  # readers keep the object


class _OnDevice:
    """The experts for rows on one device: what reads them, and their handles."""

    def __init__(
        self, weights: Mapping[str, Mapping[str, StreamedWeight]], resident_bytes: int, device: torch.device
    ) -> None:
        own = {name: {key: weight.for_reader() for key, weight in by_key.items()} for name, by_key in weights.items()}
        self.reader = ExpertReader([one for by_key in own.values() for one in by_key.values()], resident_bytes, device)
        self.handles = {
            name: {key: make_handle(weight, device) for key, weight in by_key.items()} for name, by_key in own.items()
        }


def _lines_of(reader: ExpertReader) -> Iterator[str]:
    """Yield what a reader holds, and what reading has cost."""
    yield (
        f"in the memory of {reader.device} are at most {reader.limit_bytes / 1e6:,.1f} MB: "
        f"{reader.resident_bytes / 1e6:,.1f} of the most used experts, two groups of {reader.group_bytes / 1e6:,.1f}"
    )
    figures = reader.figures
    if not figures.num_passes:
        return
    done = f"{figures.num_passes} forwards and backwards of experts"
    rate = f" ({figures.num_bytes / figures.read_s / 1e9:.2f} GB/s)" if figures.read_s else ""
    wait_s, pass_s = figures.wait_s, figures.pass_s
    if reader.blocks.is_late:
        wait_s, pass_s = figures.device_waits.seconds_so_far(), figures.device_passes.seconds_so_far()
    waits = words_of_waits(wait_s, pass_s)
    yield f"{done} took {pass_s:.3f} s and read {figures.num_bytes / 1e6:,.1f} MB{rate}; they {waits}"


Where = Path | Literal["cpu"]
"""The folder of files, or pinned host memory."""


def offload_modules(found: Mapping[str, ExpertsToOffload], to: Where, resident_bytes: int) -> Offload:
    """Write the experts of modules into files or pinned memory, one a module, and let the modules read them from there.

    Raises:
        OSError, MemoryError: there is no room; then no module is changed.
    """
    named = {name or "the module": experts for name, experts in found.items()}
    stored = _in_files(found, to) if isinstance(to, Path) else _in_pinned_memory(found)
    weights: dict[str, dict[str, StreamedWeight]] = {}
    for (name, experts), (source, offsets, like) in zip(found.items(), stored, strict=True):
        shards = shards_of(experts.module)
        ids = () if shards is None else shards.expert_ids
        weights[name or "the module"] = {
            key: StreamedWeight(f"{name}.{key}".lstrip("."), source, offsets[key], dtype, shape, ids)
            for key, (dtype, shape) in like.items()
        }
    offload = Offload(PINNED if to == "cpu" else str(to), weights, resident_bytes)
    for name, experts in named.items():
        source = next(iter(weights[name].values())).source
        place = str(source.path) if isinstance(source, WeightFile) else PINNED
        device = next(iter(experts.parameters.values())).device
        if isinstance(source, WeightFile) or copies_late(device):
            offload.handles(name, torch.device("cpu") if device.type == "meta" else device)  # for who prints it at once
        _put(experts, OffloadedExperts(name, place, weights[name], {}, offload, experts.is_transposed))
    return offload


Stored = tuple[WeightFile | PinnedMemory, Mapping[str, int], Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
"""Where the weights of a module are: where each begins, and its dtype and shape, by PerWeight's names."""


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {key: (weight.dtype, tuple(weight.shape)) for key, weight in weights.items()}


def _in_files(found: Mapping[str, ExpertsToOffload], to: Path) -> list[Stored]:
    to.mkdir(parents=True, exist_ok=True)
    names = {name: _file_name(name, experts.module) for name, experts in found.items()}
    _check_room(to, found, names)
    stored: list[Stored] = []
    for name, experts in found.items():
        weights = dict(experts.load())
        stored.append((*write_weights(to / names[name], weights), _shapes(weights)))
        del weights  # before the next ones come
    return stored


def _in_pinned_memory(found: Mapping[str, ExpertsToOffload]) -> list[Stored]:
    stored: list[Stored] = []
    for experts in found.values():
        weights = dict(experts.load())
        pinned, offsets = pin_weights(weights)
        stored.append((pinned, offsets, _shapes(weights)))
        _move(experts.parameters.values(), weights, pinned, offsets)
        del weights  # before the next ones come
    return stored


def _move(
    parameters: Iterable[nn.Parameter], weights: Mapping[str, Tensor], pinned: PinnedMemory, offsets: Mapping[str, int]
) -> None:
    """Point parameters on a CPU at their values in pinned memory, so that a model never is there twice."""
    by_address = {weight.data_ptr(): key for key, weight in weights.items() if weight.is_contiguous()}
    for parameter in parameters:
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous():
            key = by_address.get(parameter.data_ptr())
            if key is not None and weights[key].nbytes == parameter.nbytes:
                memory = pinned.bytes[offsets[key] :][: parameter.nbytes]
                parameter.data = memory.view(parameter.dtype).view(parameter.shape)


def _put(experts: ExpertsToOffload, record: OffloadedExperts) -> None:
    """Replace parameters of a module by what stands for them."""
    module, names = experts.module, experts.parameter_names
    why = (
        f"the experts of {record.name} stay in {record.place}, and only tritonmoe reads them there. Do it before "
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
    """Raise ValueError where a state dict has weights that stay elsewhere."""
    record = offloaded_of(module)
    names = () if record is None else [name for name in module.__dict__ if prefix + name in state_dict]
    if record is not None and names:
        raise ValueError(
            f"the state dict has {prefix}{names[0]}, which stays in {record.place} since offload_experts(): load it "
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


def check_to(to: object, resident_bytes: object) -> Where:
    """Return the folder of offload_experts(to=...), or "cpu".

    Raises:
        ValueError, TypeError: it is neither, or resident_bytes is no number of bytes.
    """
    if isinstance(to, str) and to == "cpu" and not has_late_device():
        raise ValueError(
            "offload_experts(to='cpu') keeps experts in host memory for a GPU, and there is none here: on a CPU all "
            "experts are in host memory. Give a folder, on a disk that reads fast, where that is not enough"
        )
    if isinstance(to, str) and to == "cuda":
        raise ValueError("offload_experts(to='cuda') has nothing to do: give 'cpu', or a folder")
    if not isinstance(to, str | Path):
        raise TypeError(f"`to` must be 'cpu' or the path of a folder, got {type(to).__name__}")
    if not isinstance(resident_bytes, int) or isinstance(resident_bytes, bool) or resident_bytes < 0:
        raise ValueError(f"resident_bytes must be an integer of at least 0, got {resident_bytes!r}")
    return "cpu" if to == "cpu" else Path(to)


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
            if parameter.device.type not in ("cpu", "cuda", "meta"):
                raise ValueError(
                    f"{own[id(parameter)]} is on {parameter.device}, and offloaded experts are computed on a CPU or a "
                    "GPU (CUDA, ROCm): move the model first"
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
