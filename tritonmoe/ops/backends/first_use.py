"""Whether a GPU's kernels are right, asked once before backend="auto" takes them: one layer or router, in seconds.

A compiler that hardly knows a card can make code that runs and gives wrong numbers. What was found right is kept in
checked.json beside the measured tiles, by card, versions and dtype; what was wrong is asked in every process.
"""

import contextlib
import json
import logging
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from tritonmoe.ops.backends.kernel_check import Checked
from tritonmoe.ops.backends.ops import Unchecked
from tritonmoe.ops.kernels.launch import TRITON_VERSION
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.left_out import is_refusal
from tritonmoe.runtime.files import locked, read_json, write_whole
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.runtime.version import __version__

__all__ = ["are_right"]

log = logging.getLogger("tritonmoe")
_lock = threading.Lock()
_found: dict[str, bool] = {}
"""What this process knows, by the keys of checked.json."""


def are_right(
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    check: Callable[[], Iterable[Checked]],
    instead: str = "PyTorch's operations",
) -> bool:
    """Return whether the kernels behind `what` compute as plain PyTorch does; run `check` if nobody has.

    The first answer takes as long as the check's kernels take to compile. Ranks that are threads wait for one of them.

    Args:
        what: "experts", say, for the key and the messages. check: makes the comparisons. instead: what is taken
            where kernels are wrong, for the messages.
    Raises:
        Unchecked: nobody has, and a stream of the device is captured into a CUDA graph.
    """
    machine = _machine(device)
    if machine is None:
        return True
    key = f"{what} {str(dtype).removeprefix('torch.')} on {machine}"
    with _lock:
        if key not in _found:
            is_kept = key in _kept()
            if not is_kept and is_captured(device):
                raise Unchecked(key)
            _found[key] = is_kept or _is_checked_right(key, check, instead)
        return _found[key]


def _machine(device: torch.device) -> str | None:
    """Name what decides which code a kernel becomes; None where there is no GPU.

    The driver doesn't: it gets machine code, from the assembler that comes with Triton.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_name(device)
    triton = ".".join(map(str, TRITON_VERSION))
    return f"{card}, triton {triton}, torch {torch.__version__}, tritonmoe {__version__}"


def _file() -> Path:
    return measured_tiles.cache_file().with_name("checked.json")


def _kept() -> list[str]:
    try:
        found = read_json(_file())
    except OSError:  # _keep says why nothing can be kept
        return []
    right = found.get("right") if isinstance(found, dict) else None
    if not isinstance(right, list) or not all(isinstance(key, str) for key in right):
        raise ValueError(
            f'{_file()} has no list "right" of texts, so it is damaged or not a file of tritonmoe: delete the file'
        )
    return right


def _keep(key: str) -> None:
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with locked(_file().with_suffix(".lock")):
            write_whole(_file(), json.dumps({"right": sorted({*_kept(), key})}, indent=1), "result of a check")
    except OSError as error:
        log.warning("the kernels will be checked again in every process, since where that is kept: %s", error)


def _is_checked_right(key: str, check: Callable[[], Iterable[Checked]], instead: str) -> bool:
    log.info("checking kernels once: %s", key)
    try:
        checked = _in_a_thread(check)
    except Exception as error:
        if not _is_of_a_compiler(error):
            raise
        log.warning(
            "Triton can't compile kernels here (%s): %s: %s. Calls with backend='auto' take %s instead, which are "
            "slower; backend='triton' raises this error",
            key,
            type(error).__name__,
            error,
            instead,
        )
        return False
    wrong = [one for one in checked if not one.is_right]
    if not wrong:
        _keep(key)
        return True
    log.warning(
        "the kernels are wrong here (%s): %s. Calls with backend='auto' take %s instead, which are slower; "
        "`tritonmoe check` compares everything, with the tiles",
        key,
        "; ".join(map(str, wrong)),
        instead,
    )
    return False


def _is_of_a_compiler(error: Exception) -> bool:
    """Return whether the error came from Triton's compiler, or the C compiler of its launcher: nothing ran."""
    return is_refusal(error) or isinstance(error, subprocess.CalledProcessError) or "C compiler" in str(error)


def _in_a_thread(check: Callable[[], Iterable[Checked]]) -> list[Checked]:
    """Run where no mode of the caller is on: no autocast, no inference mode, no dispatch mode, no hooks, no transform.

    Settings of the process that refuse what a comparison does are off meanwhile.
    """
    results: list[list[Checked]] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(list(check()))
        except BaseException as error:
            errors.append(error)

    with _lenient_settings():
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def _lenient_settings() -> Iterator[None]:
    """Allow sums in any order, and host reads, which a user may have forbidden for the process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    sync_debug_mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    torch.use_deterministic_algorithms(False)
    if sync_debug_mode:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)
        if sync_debug_mode:
            torch.cuda.set_sync_debug_mode(sync_debug_mode)
