"""Weights of experts in files: what is read when, what stays in memory, how much memory that is, and what can fail."""

import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from late_device import LateDevice
from torch import Tensor

from tritonmoe.errors import OffloadError
from tritonmoe.runtime.pinned_memory import pin_weights
from tritonmoe.runtime.streamed import (
    ExpertReader,
    StreamedWeight,
    Unit,
    find_streamed,
    make_handle,
)
from tritonmoe.runtime.weight_files import write_weights

NUM_EXPERTS, SIZE = 12, 4096


class Reading:
    """A file of one weight, and what is read of it."""

    def __init__(self, path: Path, resident: int = 0) -> None:
        self.values = torch.arange(NUM_EXPERTS * SIZE, dtype=torch.float32).view(NUM_EXPERTS, SIZE // 64, 64)
        self.path = path / "layer.safetensors"
        file, offsets = write_weights(self.path, {"up": self.values})
        offset = offsets["up"]
        self.weight = StreamedWeight("layer.up", file, offset, torch.float32, tuple(self.values.shape))
        self.reader = ExpertReader([self.weight], resident * self.weight.expert_bytes)
        self.order: list[int] = []
        read = file.read

        def note(memory: memoryview, offset_here: int) -> None:
            self.order.append((offset_here - offset) // self.weight.expert_bytes)
            read(memory, offset_here)

        file.read = note  # type: ignore[method-assign]

    def take(self, expert: int) -> Tensor:
        return self.reader.take(Unit(self.weight, expert)).tensor

    def run(self, experts: list[int], key: object = "forward") -> None:
        """Run a pass that uses these experts, and compare what it takes."""
        self.reader.expect(key, [Unit(self.weight, expert) for expert in experts])
        for expert in experts:
            assert torch.equal(self.take(expert), self.values[expert])

    def settle(self) -> None:
        """Wait until nothing more is read ahead."""
        self.reader._executor.submit(lambda: None).result()


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(tmp_path)


def test_a_file_is_one_of_safetensors(reading: Reading) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    assert torch.equal(safetensors.load_file(reading.path)["up"], reading.values)


@pytest.mark.parametrize("is_expected", [False, True])
def test_where_the_system_has_no_memory_each_use_says_so(
    is_expected: bool, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr("tritonmoe.runtime.expert_blocks.mmap.mmap", refuse)
        if is_expected:
            reading.reader.expect("forward", [Unit(reading.weight, 3)])
            reading.settle()
        for _ in range(2):  # the second one doesn't wait for the first
            with pytest.raises(MemoryError, match="no memory for an expert of 16384 bytes"):
                reading.take(3)
    assert torch.equal(reading.take(3), reading.values[3])
    reading.run([*range(NUM_EXPERTS)])


def test_memory_is_bounded_whatever_is_used(reading: Reading) -> None:
    reader = reading.reader
    for experts in ([*range(NUM_EXPERTS)], [*reversed(range(NUM_EXPERTS))], [3, 3, 3, 1, 1], [5]):
        reading.run(experts)
        assert reader._allocated <= reader.limit_bytes
    reading.settle()
    assert reader.limit_bytes < reading.weight.nbytes


def test_a_pass_reads_an_expert_once_and_ahead(reading: Reading) -> None:
    reading.reader.expect("forward", [Unit(reading.weight, expert) for expert in (4, 4, 7, 1)])
    reading.settle()
    assert reading.order == [4, 7, 1]
    for expert in (4, 4, 7, 1):
        reading.take(expert)
    assert reading.order[:3] == [4, 7, 1]
    assert reading.reader.figures.wait_s < 0.5


def test_what_was_taken_sooner_is_not_read_ahead_again(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is faster than the thread that reads ahead, and needs memory; with two uses the second one is read."""
    monkeypatch.setattr(reading.reader, "_read_ahead_soon", lambda: None)
    uses = [*range(NUM_EXPERTS - 1), 0, NUM_EXPERTS - 1]
    reading.reader.expect("forward", [Unit(reading.weight, expert) for expert in uses])
    for expert in uses[:-2]:
        reading.take(expert)
    assert reading.order == uses[:-2]
    while reading.reader.read_next():
        pass
    assert reading.order[-1] == NUM_EXPERTS - 1
    assert set(reading.order[len(uses) - 2 : -1]) <= {0}


def test_what_is_waited_for_is_not_dropped(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if reading ahead wants memory before the thread that waits is awake."""
    reader, unit, goes_on = reading.reader, Unit(reading.weight, 0), threading.Event()
    read, notify = reading.weight.source.read, reader._changed.notify_all
    dropped: list[bool] = []

    def read_slowly(memory: memoryview, offset: int) -> None:
        goes_on.wait(10)
        read(memory, offset)

    def notify_late() -> None:
        dropped.append(reader._evict(before=1))
        notify()

    reading.weight.source.read = read_slowly  # type: ignore[method-assign]
    monkeypatch.setattr(reader._changed, "notify_all", notify_late)
    reader.expect("forward", [unit])
    while unit not in reader._loading:
        time.sleep(0.01)
    waiting = threading.Thread(target=reading.take, args=(0,))
    waiting.start()
    while not reader._num_waiting:
        time.sleep(0.01)
    goes_on.set()
    waiting.join(10)
    assert not any(dropped)
    assert reading.order == [0]


def test_a_backward_begins_with_what_the_forward_used_last(reading: Reading) -> None:
    everything = [*range(NUM_EXPERTS)]
    reading.run(everything)
    reading.settle()
    num_read = len(reading.order)
    reading.reader.expect("backward", [Unit(reading.weight, expert) for expert in reversed(everything)])
    reading.settle()
    held = {unit.expert for unit in reading.reader._window}
    assert NUM_EXPERTS - 1 in held
    assert NUM_EXPERTS - 1 not in reading.order[num_read:]


def test_the_pass_that_follows_is_read_ahead(reading: Reading) -> None:
    everything = [*range(NUM_EXPERTS)]
    for _ in range(2):
        reading.run(everything, "forward")
        reading.run(everything[::-1], "backward")
    reading.settle()
    held = [unit.expert for unit in reading.reader._window]
    assert {0, 1, 2} <= set(held), "the next step's forward begins with them"


def test_the_most_used_experts_stay(tmp_path: Path) -> None:
    reading = Reading(tmp_path, resident=3)
    for _ in range(3):
        reading.run([9, 10, 11])
    reading.run([*range(NUM_EXPERTS)])
    reading.run([*range(8)])
    reading.settle()
    before = len(reading.order)
    reading.run([9, 10, 11])
    assert len(reading.order) == before


def test_threads_take_what_they_like(reading: Reading) -> None:
    failures: list[object] = []

    def take(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for expert in torch.randint(0, NUM_EXPERTS, (60,), generator=generator).tolist():
                assert torch.equal(reading.take(expert), reading.values[expert])
        except BaseException as error:
            failures.append(error)

    reading.reader.expect("forward", [Unit(reading.weight, expert) for expert in range(NUM_EXPERTS)])
    threads = [threading.Thread(target=take, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("is_pinned", [False, True])
def test_streams_take_what_they_like(is_pinned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads with a stream each, on a device whose copies are late, in any order and beside any notice."""
    threads_before, device = torch.get_num_threads(), LateDevice()
    with monkeypatch.context() as patched:
        device.install(patched)
        take_on_streams(device, None if is_pinned else tmp_path / "file")
        assert device.is_given_back()
        device.check()
        assert device.num_checked == 4 * 4 * 15
    torch.set_num_threads(threads_before)


def take_on_streams(device: LateDevice, path: Path | None) -> None:
    values = {"layer.up": torch.randn(NUM_EXPERTS, 8, 64), "layer.down": torch.randn(NUM_EXPERTS, 4, 64)}
    source, offsets = pin_weights(values) if path is None else write_weights(path, values)
    weights = [StreamedWeight(n, source, offsets[n], one.dtype, tuple(one.shape)) for n, one in values.items()]
    reader = ExpertReader(weights, 2 * weights[0].expert_bytes)
    failures: list[Unit] = []

    def take(seed: int) -> None:
        draw = random.Random(seed)
        with device.computing():
            for _ in range(4):
                uses = [Unit(draw.choice(weights), draw.randrange(NUM_EXPERTS)) for _ in range(15)]
                if draw.random() < 0.7:
                    reader.expect(seed, uses)
                for unit in uses:
                    with reader.take(unit) as taken:
                        if not torch.equal(taken, values[unit.weight.name][unit.expert]):
                            failures.append(unit)

    threads = [threading.Thread(target=take, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader._executor.submit(lambda: None).result()
    assert not failures
    assert reader._allocated <= reader.limit_bytes


@pytest.mark.parametrize("how", ["cut", "written", "unreadable"])
def test_an_error_names_the_expert(reading: Reading, how: str) -> None:
    reading.run([0])
    if how == "cut":
        os.truncate(reading.path, reading.path.stat().st_size - 1)
    elif how == "written":
        with reading.path.open("r+b") as file:
            file.seek(reading.path.stat().st_size - 4)
            file.write(b"\0\0\0\0")
        os.utime(reading.path, ns=(1, 1))
    else:
        os.dup2(os.open(reading.path.parent, os.O_RDONLY), reading.weight.source._descriptor)
    with pytest.raises(OffloadError, match=r"expert 11 of layer\.up could not be read from .*layer\.safetensors"):
        reading.take(11)
    reading.reader.expect("forward", [Unit(reading.weight, 10)])  # read ahead, by the other thread
    reading.settle()
    with pytest.raises(OffloadError, match=r"expert 10 of layer\.up"):
        reading.take(10)


def test_a_handle_is_known_by_its_views(reading: Reading) -> None:
    handle = make_handle(reading.weight, torch.device("cpu"))
    assert handle.shape == reading.values.shape
    assert handle.isnan().all()
    assert find_streamed(handle[3:7]) == (reading.weight, 3)
    assert find_streamed(handle.view_as(handle).detach()) == (reading.weight, 0)
    assert find_streamed(handle.clone()) is None
    assert find_streamed(reading.values) is None
    assert find_streamed(torch.ones(2, 1).expand(2, 3)) is None


def test_processes_that_write_under_one_name_read_what_each_has_written(reading: Reading) -> None:
    """Stages of a pipeline, say, whose layers have the same names."""
    other, _ = write_weights(reading.path, {"up": -reading.values})
    reading.run([*range(NUM_EXPERTS)])
    memory = bytearray(4)
    other.read(memoryview(memory), reading.weight.offset + 4)
    assert torch.frombuffer(memory, dtype=torch.float32).item() == -1.0


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_weights(tmp_path / "one", {"up": torch.ones(2, 3)})
    assert not list(tmp_path.iterdir())
