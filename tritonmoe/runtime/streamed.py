"""StreamedWeight: a weight of experts that stays in a file; ExpertReader: reads its experts ahead of their use.

An operation that multiplies by an expert takes it from here, as it takes the experts of a packed weight from a decoder.
What has a weight's place among the tensors of a call is its handle: a tensor of the weight's shape with one element of
memory for each expert, NaN, by which find_streamed() knows the weight again, whatever view of it arrives.
"""

import contextlib
import ctypes
import heapq
import json
import math
import mmap
import os
import struct
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.errors import OffloadError
from tritonmoe.runtime.cpu_threads import num_workers

__all__ = [
    "ExpertReader",
    "PassLoads",
    "ReadFigures",
    "StreamedWeight",
    "Unit",
    "WeightFile",
    "find_streamed",
    "known_weights",
    "make_handle",
    "waited",
    "words_of_waits",
    "write_weights",
]

ALIGNMENT = 64
"""Bytes; of what a file has before its weights."""
PREDICTED_SHARE = 0.75
"""The pass that followed this one in the last step is read ahead if it used so many of its experts."""
SMALL_SHARE = 0.1
"""Of a pass, that may go by waiting for experts without advice."""
OFTEN = 1.5
"""So many times a pass may read its experts without advice."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""As files of safetensors call them."""


class Unit(NamedTuple):
    """One expert of one weight: what is read at once."""

    weight: "StreamedWeight"
    expert: int


class WeightFile:
    """A file that is open for reading, and must stay as it is."""

    def __init__(self, path: Path, part: Path | None = None) -> None:
        """part: where the file is until it is renamed to `path`."""
        self.path = path
        self._descriptor = os.open(path if part is None else part, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._found()

    def _found(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill the memory with what the file has from `offset` on.

        Raises:
            OSError: it can't be read. ValueError: it is not what it was when it was opened.
        """
        done = 0
        while done < len(memory):
            count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            if count == 0:
                break
            done += count
        if (found := self._found()) != self._state or done < len(memory):
            size, changed_at = self._state
            what = f"it has {found[0]} bytes instead of {size}" if found[0] != size else "it was written to"
            raise ValueError(f"the file has changed since it was opened: {what} (then {changed_at}, now {found[1]} ns)")


class StreamedWeight:
    """A weight (E, ...) of which each expert lies in a file, one behind the other."""

    def __init__(
        self,
        name: str,
        file: WeightFile,
        offset: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        expert_ids: Sequence[int] = (),
    ) -> None:
        """name, expert_ids: as errors call the weight and its experts; all of a weight by default."""
        self.name, self.file, self.offset, self.dtype, self.shape = name, file, offset, dtype, shape
        self.expert_ids = tuple(expert_ids) or tuple(range(shape[0]))
        self.expert_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._reader: ExpertReader | None = None

    @property
    def reader(self) -> "ExpertReader":
        assert self._reader is not None, "an ExpertReader takes the weight first"
        return self._reader

    @property
    def nbytes(self) -> int:
        """The bytes of all experts, in the file."""
        return self.shape[0] * self.expert_bytes

    def expert(self, index: int) -> Tensor:
        """Return one expert, once it is read; its memory is used again when the tensor is gone.

        Raises:
            OffloadError: the file can't be read, or has changed.
        """
        return self.reader.take(Unit(self, index))


known_weights: dict[int, StreamedWeight] = {}
"""By the address of a handle's memory, as long as that is there."""


def make_handle(weight: StreamedWeight) -> Tensor:
    """Return a tensor of a weight's shape whose experts have one element of memory each."""
    num_bytes = weight.shape[0] * weight.dtype.itemsize
    memory = (ctypes.c_char * num_bytes).from_buffer_copy(b"\xff" * num_bytes)  # NaN in all dtypes that have it
    address = ctypes.addressof(memory)
    known_weights[address] = weight
    weakref.finalize(memory, known_weights.pop, address).atexit = False
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=weight.dtype).as_strided(
            weight.shape, (1, *(0 for _ in weight.shape[1:]))
        )


def find_streamed(tensor: Tensor) -> tuple[StreamedWeight, int] | None:
    """Return the weight whose handle, or a view of some of its experts, a tensor is, and the first of these experts."""
    if not known_weights or type(tensor) is not Tensor or tensor.dim() < 2 or tensor.stride(-1) != 0 or tensor.is_meta:
        return None
    weight = known_weights.get(tensor.untyped_storage().data_ptr())
    return None if weight is None else (weight, int(tensor.storage_offset()))


@dataclass
class ReadFigures:
    """What an ExpertReader has done so far."""

    num_bytes: int = 0
    """Read from files."""
    read_s: float = 0.0
    """Seconds in reads, added up over threads."""
    wait_s: float = 0.0
    """Seconds in which a product waited for its expert."""
    pass_s: float = 0.0
    """Seconds in forwards and backwards of experts that are read, waits included."""
    num_passes: int = 0


class _Waited(threading.local):
    seconds = 0.0


waited = _Waited()
"""How long the products of this thread's passes have waited for experts that are read, so far: for who times a step."""


def words_of_waits(wait_s: float, total_s: float) -> str:
    """Return the share of a time that went by waiting for experts and, where that is much, what makes it smaller."""
    share = min(1.0, wait_s / total_s) if total_s else 0.0
    said = f"waited {share:.0%} of it ({wait_s:.3f} s) for experts to be read"
    if share < SMALL_SHARE:
        return said
    return f"{said}: more tokens a step, fewer bits (quantize_experts), or more resident_bytes make it less"


class PassLoads(NamedTuple):
    """What one pass over experts has read of them."""

    wait_s: float
    """Seconds in which products waited for their expert."""
    read_bytes: int
    """Read from files from the beginning of the pass to its end."""
    expert_bytes: int
    """Of the experts that it used, each once."""

    def words(self, total_s: float) -> str:
        """Return the share of a pass of total_s that went by waiting and, where that is much, what makes it smaller."""
        said = words_of_waits(self.wait_s, total_s)
        times = self.read_bytes / max(1, self.expert_bytes)
        if self.wait_s < SMALL_SHARE * total_s or times < OFTEN:
            return said
        return (
            f"{said}; it read its experts {times:.1f} times, for local rows and for each chunk and part of the tokens "
            'again: OverlapConfig(chunk_by="experts", local_first=False) reads them once'
        )


class ExpertReader:
    """Reads the experts of some weights into memory of a fixed size, in the order in which they will be used.

    From pass to pass it keeps the most used experts, resident_bytes of them. Beside these there is memory for two
    groups: one is read while the other is multiplied by, whatever the order in which threads take them. The experts
    that a pass has used last are still there when its backward begins with them.
    """

    def __init__(self, weights: Sequence[StreamedWeight], resident_bytes: int = 0) -> None:
        self.weights = tuple(weights)
        self.resident_bytes = resident_bytes
        by_layer: Counter[str] = Counter()
        for weight in weights:
            weight._reader = self
            by_layer[weight.name.rpartition(".")[0]] += weight.expert_bytes
        workers = num_workers(torch.device("cpu"))
        self.group_bytes = (workers + 1) * max(by_layer.values())
        self.limit_bytes = resident_bytes + 2 * self.group_bytes
        self.figures = ReadFigures()
        self._num_kept = _share_out(self.weights, resident_bytes)
        self._reset()

    def _reset(self) -> None:
        """Begin without any expert in memory, and without a thread, which a fork has left behind."""
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tritonmoe-reader")
        self._is_reading_ahead = False
        self._window: OrderedDict[Unit, Tensor] = OrderedDict()
        """What the two groups have now, from the one that was used longest ago on."""
        self._residents: dict[Unit, Tensor] = {}
        """What stays from pass to pass."""
        self._loading: set[Unit] = set()
        self._failed: dict[Unit, OffloadError] = {}
        self._ahead: list[tuple[int, Unit]] = []
        """A heap: what will be used and is not read yet, for all that is known, with its place in the order."""
        self._uses: dict[Unit, deque[int]] = {}
        """Where each still stands in the order in which the present pass uses them; no deque is empty."""
        self._counts: Counter[Unit] = Counter()
        """In how many passes each was used."""
        self._kept: dict[StreamedWeight, set[int]] = {
            weight: set(range(count)) for weight, count in self._num_kept.items()
        }
        """The experts that stay in memory, once they have been read."""
        self._free: deque[Tensor] = deque()
        """Blocks of memory that came back; finalizers add them, which may run anywhere: no lock."""
        self._allocated = 0
        self._num_waiting, self._waits_since = 0, 0.0
        self._followers: dict[object, tuple[object, list[Unit]]] = {}
        """The pass that last came after a pass, and what it used."""
        self._present: object = None

    # Which experts come next

    def expect(self, key: object, uses: Sequence[Unit]) -> None:
        """Note in which order the pass that begins will use experts, and begin to read them.

        It is a hint: what is used in another order, or without notice, is read when it is used. key: of the pass, by
        which the next step's is known to follow on the same one.
        """
        self._after_fork()
        with self._changed:
            if self._present is not None:
                self._followers[self._present] = key, list(uses)
            self._present = key
            self._expect(uses)
            used = dict.fromkeys(uses)
            self._counts.update(used.keys())
            for weight in dict.fromkeys(unit.weight for unit in used):
                self._choose_kept(weight)
            self._read_ahead_soon()

    def _expect(self, uses: Sequence[Unit]) -> None:
        self._uses = {}
        for place, unit in enumerate(uses):
            self._uses.setdefault(unit, deque()).append(place)
        self._ahead = [(places[0], unit) for unit, places in self._uses.items() if self._found(unit) is None]

    def _found(self, unit: Unit) -> Tensor | None:
        found = self._residents.get(unit)
        return self._window.get(unit) if found is None else found

    def _expect_follower(self) -> None:
        """Expect what followed on this pass in the last step."""
        _, uses = self._followers.get(self._present, (None, []))
        units = dict.fromkeys(uses)
        num_experts = sum(weight.shape[0] for weight in {unit.weight for unit in units})
        if len(units) >= PREDICTED_SHARE * num_experts:  # else it is a few tokens, whose next experts nobody knows
            self._expect(uses)

    def _is_wanted(self, place: int, unit: Unit) -> bool:
        """Return whether this is the next use of what isn't there: it may have been taken before it was read ahead."""
        is_next = unit in self._uses and self._uses[unit][0] == place
        return is_next and unit not in self._loading and self._found(unit) is None

    def _choose_kept(self, weight: StreamedWeight) -> None:
        """Keep the experts of a weight that were used most; of those that were used as often the ones that are kept."""
        count, kept = self._num_kept[weight], self._kept[weight]
        if 0 < count < weight.shape[0]:
            order = sorted(range(weight.shape[0]), key=lambda e: (-self._counts[Unit(weight, e)], e not in kept, e))
            self._kept[weight] = now = set(order[:count])
            for source, target, experts in (
                (self._residents, self._window, kept - now),
                (self._window, self._residents, now - kept),
            ):
                units = [Unit(weight, expert) for expert in experts]
                target.update({unit: source.pop(unit) for unit in units if unit in source})

    # Memory

    def _evict(self, before: int | None) -> bool:
        """Drop an expert that is not used any more, or else the one whose use comes last.

        before: not one that is used before this place; None for any, where memory is needed at once.
        """
        latest = -1
        found: Unit | None = None
        for unit in self._window:
            if unit not in self._uses:
                del self._window[unit]
                return True
            if (place := self._uses[unit][0]) > latest:
                latest, found = place, unit
        if found is None or (before is not None and latest <= before):
            return False
        del self._window[found]
        heapq.heappush(self._ahead, (latest, found))
        return True

    def _take_block(self, num_bytes: int, before: int | None = None) -> Tensor | None:
        """Return memory; None where there is none, and it isn't needed at once. before: as in _evict()."""
        while True:
            waiting = [self._free.popleft() for _ in range(len(self._free))]
            for place, block in enumerate(waiting):
                if block.nbytes == num_bytes:
                    self._free.extend(waiting[:place] + waiting[place + 1 :])
                    return block
            if self._allocated + num_bytes <= self.limit_bytes:
                self._free.extend(waiting)
                break
            if waiting:
                self._allocated -= waiting.pop().nbytes
                self._free.extend(waiting)
            elif not self._evict(before):
                if before is not None:
                    return None
                break  # everything is in use this moment
        # Memory of its own, which goes back to the system: among the activations of a step it would lie between gaps.
        try:
            mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"there is no memory for an expert of {num_bytes} bytes: {error}") from error
        self._allocated += num_bytes
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def _in_block(self, unit: Unit, block: Tensor) -> tuple[memoryview, Tensor]:
        """Return the memory of an expert, to read into, and as the tensor that it will be."""
        weight = unit.weight
        memory = (ctypes.c_char * weight.expert_bytes).from_address(block.data_ptr())
        weakref.finalize(memory, self._free.append, block).atexit = False
        with torch.inference_mode(False):
            return memoryview(memory).cast("B"), torch.frombuffer(memory, dtype=weight.dtype).view(weight.shape[1:])

    # Reading

    def take(self, unit: Unit) -> Tensor:
        """Return an expert: at once if it was read, else when it is."""
        self._after_fork()
        with self._changed:
            while True:
                if (found := self._found(unit)) is not None:
                    if unit in self._window:
                        self._window.move_to_end(unit)
                    self._used(unit)
                    return found
                if (error := self._failed.pop(unit, None)) is not None:
                    raise error
                if unit not in self._loading:
                    break
                self._wait_begins()
                try:
                    self._changed.wait()
                finally:
                    self._wait_ends()
            block = self._take_block(unit.weight.expert_bytes)
            self._loading.add(unit)
            self._wait_begins()
        try:
            assert block is not None
            found = self._read(unit, block)
        finally:
            with self._changed:
                self._wait_ends()
        with self._changed:
            self._used(unit)
        return found

    def _used(self, unit: Unit) -> None:
        """Go on reading ahead, now that an expert was used; one that is still waited for must not be dropped."""
        if unit in self._uses:
            self._uses[unit].popleft()
            if not self._uses[unit]:
                del self._uses[unit]
        if not self._uses:
            self._expect_follower()
        self._read_ahead_soon()

    def _wait_begins(self) -> None:
        if self._num_waiting == 0:
            self._waits_since = time.perf_counter()
        self._num_waiting += 1

    def _wait_ends(self) -> None:
        self._num_waiting -= 1
        if self._num_waiting == 0:
            self.figures.wait_s += time.perf_counter() - self._waits_since

    def _read_ahead_soon(self) -> None:
        if self._ahead and not self._is_reading_ahead:
            self._is_reading_ahead = True
            self._executor.submit(_read_ahead, weakref.ref(self))

    def read_next(self) -> bool:
        """Read the next expert ahead; return False where there is none, or no memory until one is used."""
        with self._changed:
            while self._ahead and not self._is_wanted(*self._ahead[0]):
                heapq.heappop(self._ahead)
            block = None
            if self._ahead:
                place, unit = self._ahead[0]
                with contextlib.suppress(MemoryError):  # who uses the expert raises it, if there is none then either
                    block = self._take_block(unit.weight.expert_bytes, place)
            if block is None:
                self._is_reading_ahead = False
                return False
            heapq.heappop(self._ahead)
            self._loading.add(unit)
        try:
            self._read(unit, block)
        except OffloadError as error:
            with self._changed:
                self._failed[unit] = error
        return True

    def _read(self, unit: Unit, block: Tensor) -> Tensor:
        """Read an expert, which is in `_loading` until it is there, or the error is."""
        weight, expert = unit
        started = time.perf_counter()
        try:
            memory, tensor = self._in_block(unit, block)
            try:
                weight.file.read(memory, weight.offset + expert * weight.expert_bytes)
            except (OSError, ValueError) as error:
                raise OffloadError(
                    f"expert {weight.expert_ids[expert]} of {weight.name} could not be read from {weight.file.path}: "
                    f"{error}. Nothing of this call is kept: give up the step (zero_grad), write the file again with "
                    "offload_experts() of the whole model, and go on from the last checkpoint"
                ) from error
            with self._changed:
                (self._residents if expert in self._kept[weight] else self._window)[unit] = tensor
                self.figures.num_bytes += weight.expert_bytes
                self.figures.read_s += time.perf_counter() - started
            return tensor
        finally:
            with self._changed:
                self._loading.discard(unit)
                self._changed.notify_all()

    def _after_fork(self) -> None:
        if self._process != os.getpid():
            self._reset()


def _read_ahead(reference: "weakref.ref[ExpertReader]") -> None:
    """Read ahead as long as somebody has the reader, and it has memory."""
    while (reader := reference()) is not None and reader.read_next():
        del reader


def _share_out(weights: Sequence[StreamedWeight], num_bytes: int) -> dict[StreamedWeight, int]:
    """Return how many experts of each weight stay in so much memory: as many of one as of another."""
    counts = dict.fromkeys(weights, 0)
    for round_number in range(max(weight.shape[0] for weight in weights)):
        for weight in weights:
            if round_number < weight.shape[0] and weight.expert_bytes <= num_bytes:
                counts[weight] += 1
                num_bytes -= weight.expert_bytes
    return counts


def write_weights(path: Path, weights: dict[str, Tensor]) -> tuple[WeightFile, dict[str, int]]:
    """Write tensors as a file of safetensors, one expert at a time, beside its place first; return it, and offsets.

    It is opened before it has its name, which another process may give to a file of its own at the same time.

    Raises:
        OSError: it could not be written; then nothing is left of it.
    """
    header: dict[str, object] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name, weight in weights.items():
        offsets[name] = end
        end += weight.numel() * weight.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offsets[name], end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for weight in weights.values():
                for expert in weight.detach():
                    whole = expert.cpu().contiguous()
                    file.write((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()))
            file.flush()
            os.fsync(file.fileno())
        written = WeightFile(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return written, {name: 8 + len(encoded) + offset for name, offset in offsets.items()}
