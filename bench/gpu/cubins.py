"""`python -m bench.gpu.cubins`: compile the headline's operations with the Triton that is installed here, into files.

No GPU is needed. `python -m bench.gpu` launches each on a GPU beside what its own Triton compiles (beside_cubins.py).
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bench.gpu.children import ROOT
from bench.gpu.compilation import variant_of
from bench.gpu.setting import DAY, HEADLINE, REHEARSAL, Setting
from tritonmoe.ops import kernels
from tritonmoe.ops.aot import architecture_named, compile_unchecked, record_launches, source_of
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.benchmarks.kept_results import source_hash
from virtual_gpu.nvidia.parser import parse

__all__ = ["FOLDER", "Cubin", "Operation", "files_for", "kernels_hash", "main", "read", "text_of"]

FOLDER = ROOT / "build" / "cubins"
"""Where a day looks for them; git ignores it."""
TARGETS = ("sm_90", "sm_100")
SIZES = {"i32": 4, "i64": 8, "fp32": 4, "pointer": 8, "map": 128}
"""Bytes of a kernel's parameters by kind."""


@dataclass(frozen=True)
class Cubin:
    """One kernel's binary, and what its launch needs."""

    kernel: str
    """The name of the Triton function, and of the binary's entry."""
    image: str
    """The binary in base64."""
    ptx: str
    shared_bytes: int
    num_threads: int
    parameters: list[list[str]]
    """[argument, part, kind] in order: kind as in SIZES, part "shape 1" or "strides 0" of a descriptor; the pointers to
    scratch memory, of which these kernels have none, have no argument."""
    maps: dict[str, Json]
    """What the descriptor of an argument says of its box, as Triton's launchers read it."""
    constants: dict[str, str]
    """Arguments that were compiled in, as text: a launch must have the same."""
    multiples_of_16: list[str]
    """Arguments of which the code knows that they are."""
    options: dict[str, int]


@dataclass(frozen=True)
class Operation:
    """One operation's kernels by one Triton for one GPU."""

    operation: str
    target: str
    triton: str
    kernels_hash: str
    """Of the sources that were compiled."""
    cubins: dict[str, Cubin]
    """By their kernel."""


def kernels_hash() -> str:
    """Return the hash of the sources from which kernels are compiled."""
    return source_hash(Path(kernels.__file__).parent)


def text_of(value: object) -> str:
    """Return an argument that is compiled in as every release writes it; a function by its name."""
    return value.__name__ if isinstance(value, triton.JITFunction) else repr(value)


def read(path: Path) -> Operation:
    """Return what `main` wrote into a file."""
    found = json.loads(path.read_text())
    return Operation(**{**found, "cubins": {name: Cubin(**fields) for name, fields in found["cubins"].items()}})


def files_for(target_name: str) -> dict[str, str]:
    """Return the paths in the repository of a GPU's files in FOLDER, by their names and a hash of their bytes."""
    paths = sorted(FOLDER.glob(f"{target_name} *.json"))
    names = [f"{path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}" for path in paths]
    return {name: str(path.relative_to(ROOT)) for name, path in zip(names, paths, strict=True)}


def compile_operation(setting: Setting, operation: str, num_tokens: int, target_name: str) -> Operation:
    """Compile all kernels of one of the headline's operations, in the table's tiles.

    Raises:
        ValueError: a kernel needs more of its launch than a grid, threads, shared memory and parameters.
    """
    target = architecture_named(target_name).target
    with measured_tiles.using({}):
        launches = record_launches(variant_of(setting, HEADLINE, num_tokens), target)
    of_operation = [item for name, item in launches.items() if " " not in name.removeprefix(f"{operation} ")]
    cubins = [_compiled(item, target) for item in of_operation]
    by_kernel = {cubin.kernel: cubin for cubin in cubins}
    assert len(by_kernel) == len(cubins), f"{operation} launches a kernel in two ways"
    return Operation(operation, target_name, triton.__version__, kernels_hash(), by_kernel)


def _compiled(item: launch.Launch, target: GPUTarget) -> Cubin:
    source, compiled = source_of(item, target), compile_unchecked(item, target)
    metadata, program = compiled.metadata, parse(compiled.asm["ptx"])
    needs = (metadata.num_ctas, metadata.launch_cooperative_grid, metadata.launch_pdl)
    if needs != (1, False, False) or metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(
            f"{program.name} needs clusters, all programs at once, its launch beside another or scratch memory: "
            "leave its operation out, a cubin's launch has a grid, threads, shared memory and parameters alone"
        )
    names = list(source.signature)
    parameters = _parameters(source)
    parameters += [["", "", "pointer"]] * (len(program.parameters) - len(parameters))
    sizes = [parameter.num_bytes for parameter in program.parameters]
    if sizes != [SIZES[kind] for _, _, kind in parameters]:
        raise ValueError(f"{program.name} has parameters of {sizes} bytes, and its signature says {parameters}")
    return Cubin(
        kernel=program.name,
        image=base64.b64encode(compiled.asm["cubin"]).decode(),
        ptx=compiled.asm["ptx"],
        shared_bytes=metadata.shared,
        num_threads=program.num_threads,
        parameters=parameters,
        maps=_maps(source, compiled),
        constants={names[place[0]]: text_of(value) for place, value in source.constants.items()},
        multiples_of_16=[names[place[0]] for place, known in source.attrs.items() if _is_multiple(known)],
        options=item.options,
    )


def _parameters(source: ASTSource) -> list[list[str]]:
    """Return a kernel's parameters in order, as every release of Triton lays them out."""
    found = []
    for name, kind in source.signature.items():
        if kind.startswith("tensordesc"):
            num_axes = kind.count(",") + 1
            found.append([name, "", "map"])
            found += [[name, f"shape {axis}", "i32"] for axis in range(num_axes)]
            found += [[name, f"strides {axis}", "i64"] for axis in range(num_axes)]
        elif kind != "constexpr":
            found.append([name, "", "pointer" if kind.startswith("*") else kind])
    unknown = sorted({kind for _, _, kind in found} - set(SIZES))
    if unknown:
        raise ValueError(f"a parameter must be a tensor, a descriptor or one of {', '.join(SIZES)}, got {unknown}")
    return found


def _maps(source: ASTSource, compiled: CompiledKernel) -> dict[str, Json]:
    described = [name for name, kind in source.signature.items() if kind.startswith("tensordesc")]
    found = dict(zip(described, getattr(compiled.metadata, "tensordesc_meta", None) or (), strict=True))
    for name, meta in found.items():
        if meta["fp4_padded"] or meta.get("is_im2col"):
            raise ValueError(f"{name} is a descriptor of padded fp4 or of patches: only plain tiles are described here")
    return found


def _is_multiple(known: Sequence[Sequence[object]]) -> bool:
    others = [pair for pair in map(list, known) if pair != ["tt.divisibility", 16]]
    if others:
        raise ValueError(f"an argument's code may know that it is a multiple of 16, got {others}")
    return bool(known)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile them and say where they are."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.cubins", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder for the files (default {FOLDER})")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help=f"GPUs (default {' '.join(TARGETS)})")
    parser.add_argument("--rehearse", action="store_true", help="the rehearsal's layer, for sm_90")
    arguments = parser.parse_args(argv)
    setting, targets = (REHEARSAL, TARGETS[:1]) if arguments.rehearse else (DAY, arguments.targets)
    if launch.INTERPRETED:
        print("python -m bench.gpu.cubins: unset TRITON_INTERPRET: kernels are compiled", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for target in targets:
        try:
            is_cuda = architecture_named(target).target.backend == "cuda"
        except ValueError as error:
            print(f"python -m bench.gpu.cubins: {error}", file=sys.stderr)
            return 2
        if not is_cuda:
            print(f"python -m bench.gpu.cubins: {target} runs no cubins: name GPUs of NVIDIA", file=sys.stderr)
            return 2
        for operation in setting.compiled_operations:
            found = compile_operation(setting, operation, setting.headline_tokens, target)
            path = arguments.out / f"{target} {operation} triton {found.triton}.json"
            write_whole(path, json.dumps(asdict(found)), "file of cubins")
            print(f"{path}: {', '.join(_sizes(found.cubins))}", flush=True)
    return 0


def _sizes(cubins: Mapping[str, Cubin]) -> list[str]:
    return [f"{name} {len(base64.b64decode(cubin.image))} bytes" for name, cubin in cubins.items()]


if __name__ == "__main__":
    sys.exit(main())
