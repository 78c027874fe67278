"""CompiledKernels: what Triton compiled of a kernel, once however many threads ask, and found again without its binder.

Triton finds a compiled kernel by what of every argument is compiled in. Its binder takes longer for that than a launch
does, so that small layers would wait for it. The keys here say at least as much: launches that have one key have one
kernel in Triton too.
"""

import atexit
import functools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["cache_refusal", "compiled_kernels", "settle_cache"]

log = logging.getLogger("tritonmoe")
_lock = threading.RLock()
Key = tuple[Any, ...]
HAS_32_BIT_OFFSETS = torch.version.hip is not None
"""Whether Triton reads a tensor of less than 2 GiB through another instruction, as it does on AMD."""


class _MadeOnce(dict[Any, Any]):
    """What Triton keeps of a kernel for each device, made once however many threads ask for it first."""

    def __init__(self, make: Callable[[], Any], made: dict[Any, Any]) -> None:
        super().__init__(made)
        self.make = make

    def __missing__(self, device: Any) -> Any:
        with _lock:
            if device not in self:
                self[device] = self.make()
            return self[device]


class CompiledKernels:
    """What was compiled of one `triton.jit` function.

    Emulated ranks are threads: by itself Triton would compile in each of them what several launch for the first time.
    What is compiled is launched without a lock.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.unspecialised = {place for place, parameter in enumerate(kernel.params) if parameter.do_not_specialize}
        self.found: dict[Key, tuple[Any, ...]] = {}
        """What was compiled: its launcher, function and metadata, and its constexprs in the order of the signature."""
        self.compile_anyway = kernel._do_compile
        kernel._do_compile = self._compile_once
        kernel.device_caches = _MadeOnce(kernel.create_binder, kernel.device_caches)

    def _compile_once(self, key: Any, signature: Any, device: Any, *others: Any) -> Any:
        with _lock:
            compiled = self.kernel.device_caches[device][0].get(key)
            return self.compile_anyway(key, signature, device, *others) if compiled is None else compiled

    def launch(
        self,
        device_index: int | None,
        grid: tuple[int, ...],
        args: Sequence[Any],
        constexprs: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        """Launch on the current device, which has this index.

        Args:
            args: tensors, descriptors, numbers and None. constexprs: what follows them in the signature, by name.
        """
        key = self.key(device_index, args, constexprs, options)
        found = self.found.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **constexprs, **options)
            values = [constexprs[name] for name in self.kernel.arg_names[len(args) :]]
            self.found[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, values
        else:
            compiled, run, function, packed_metadata, values = found
            # As Triton's own `run` does behind its binder; what indexing gives passes all arguments on twice more.
            whole_grid = grid + (1,) * (3 - len(grid))
            stream = driver.active.get_current_stream(device_index)
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            metadata = None
            if getattr(enter, "calls", True) or getattr(leave, "calls", True):
                metadata = compiled.launch_metadata(whole_grid, stream)
            else:  # chains of no hooks, for which Triton would make metadata, and call them
                enter = leave = None
            run(
                *whole_grid,
                stream,
                function,
                packed_metadata,
                metadata,
                enter,
                leave,
                *args,
                *values,
            )

    def key(
        self, device_index: int | None, args: Sequence[Any], constexprs: dict[str, Any], options: dict[str, Any]
    ) -> Key:
        """Return what decides which compiled kernel a launch takes: all that Triton compiles in, and perhaps more."""
        parts = [  # every launch waits for this: no call for most arguments, no loop of statements
            arg
            if arg is None or type(arg) is int  # of which it is no more than 1, a multiple of 16, and the width
            else ((arg.dtype, arg.data_ptr() % 16) if arg.data_ptr() % 16 else arg.dtype)
            if isinstance(arg, Tensor)
            else float
            if type(arg) is float
            else _kind(arg)
            for arg in args
        ]
        for place in self.unspecialised:
            parts[place] = -(2**31) <= args[place] < 2**31
        if HAS_32_BIT_OFFSETS:
            parts += [arg.untyped_storage().size() < 2**31 for arg in args if isinstance(arg, Tensor)]
        return device_index, *constexprs, *constexprs.values(), *options.values(), *parts


def _kind(arg: Any) -> Any:
    """Return what Triton compiles in of a descriptor."""
    assert isinstance(arg, TensorDescriptor), f"an argument of a kernel is a {type(arg).__name__}"
    return TensorDescriptor, arg.base.dtype, *arg.block_shape


def cache_refusal() -> str | None:
    """Return why Triton can't write into its cache of compiled kernels; None where it can."""
    folder = knobs.cache.dir
    if folder.startswith("~"):  # Triton would make a folder of that name wherever the process happens to run
        return f"the user has no home directory, and the cache would be {folder}"
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        return str(error)
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} can't be written"


@functools.cache
def settle_cache() -> None:
    """Make Triton keep what it compiles in a folder of this process, where its own default can't be; warn of that.

    The folder is new, has a name that nobody can guess, and nobody else can read or write it: Triton loads and runs
    what lies there. A folder that TRITON_CACHE_DIR names is left as it is, and Triton raises where it can't write.
    """
    reason = None if "TRITON_CACHE_DIR" in os.environ else cache_refusal()
    if reason is not None:
        folder = tempfile.mkdtemp(prefix="tritonmoe-triton-")
        atexit.register(_remove, folder, os.getpid())
        knobs.cache.dir = folder
        log.warning(
            "kernels are compiled again in every process, since %s. TRITON_CACHE_DIR names another folder", reason
        )


def _remove(folder: str, owner: int) -> None:
    """Remove the folder of this process; a fork of that process leaves it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


_made: dict[int, CompiledKernels] = {}


def compiled_kernels(kernel: Any) -> CompiledKernels:
    """Return what was compiled of a `triton.jit` function; it holds the function, so no other one gets its id."""
    made = _made.get(id(kernel))
    if made is None:
        with _lock:
            made = _made.get(id(kernel))
            if made is None:
                settle_cache()
                made = _made[id(kernel)] = CompiledKernels(kernel)
    return made
