"""Boxes that TMA stores: what waits, barriers and fences order them."""

import numpy as np
import pytest
from ptx_programs import run_ptx

from virtual_gpu.faults import MemoryFault
from virtual_gpu.nvidia.tensor_map import TensorMap

STORE = """
    st.shared.b32 [%r2], %r1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.eq.s32 %p1, %r1, 0;
    mov.b32 %r4, 0;
    mov.b32 %r5, 62;
    @%p1 cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [kernel_param_1, {%r5}], [%r4];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.sync 0;
    st.shared.b32 [%r2], 7;
"""
"""Threads write their numbers, and one of them stores these to the words from 62 on; then all write sevens."""


def run_store(body):
    """Run a program of 64 threads with a descriptor of 128 words, of which a box is 64; return the words."""
    words = np.full(132, 99, np.uint32)
    words = words[-(words.ctypes.data // 4) % 4 :][:128]  # an address of a multiple of 16 bytes
    box = TensorMap(words.ctypes.data, (128,), (1,), (64,), 4, 0)
    run_ptx(body, words, descriptors=[box])
    return words.tolist()


def test_a_store_ends_where_its_tensor_does_and_has_read_what_is_written_later():
    numbers = list(range(64))
    assert run_store(STORE) == [99] * 62 + numbers + [99] * 2
    assert run_store(STORE.replace("%r5, 62", "%r5, 100")) == [99] * 100 + numbers[:28]
    assert run_store(STORE + "cp.async.bulk.wait_group 0;") == [99] * 62 + numbers + [99] * 2
    # A read may come before the store without its own wait.
    assert run_store(STORE + "ld.global.b32 %r6, [%rd1+252];\nst.global.b32 [%rd1], %r6;")[0] == 99


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fence.proxy.async.shared::cta;", "a bulk store reads shared memory written without a proxy fence since"),
        ("bar.sync 0;", "a bulk store reads shared memory that another warp wrote, with no barrier between"),
        (
            "cp.async.bulk.wait_group.read 0;",
            "shared memory is written that a matrix instruction or a bulk store still",
        ),
        ("cp.async.bulk.commit_group;", "shared memory is written that a matrix instruction or a bulk store still"),
    ],
)
def test_a_store_that_nothing_orders(line, message):
    with pytest.raises(MemoryFault, match=message):
        run_store(STORE.replace(line, "", 1))


def test_only_the_thread_that_stores_waits_for_it():
    """Others have no store to wait for: they need the barrier behind the wait."""
    begin, _, end = STORE.rpartition("bar.sync 0;")
    with pytest.raises(MemoryFault, match="a warp writes shared memory that another read, with no barrier between"):
        run_store(begin + end)


def test_a_program_that_ends_before_its_store_has_read():
    with pytest.raises(MemoryFault, match="the program ends while a bulk store reads its shared memory"):
        run_store(STORE[: STORE.index("cp.async.bulk.wait_group")])
