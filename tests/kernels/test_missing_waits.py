"""The virtual GPU sees a wait, a barrier or a fence that is missing: one is deleted from what was compiled."""

import re

import torch
from kernel_cases import LAYOUTS, Layer, random_ids

from tritonmoe.backends import reference
from tritonmoe.backends import triton as kernels
from tritonmoe.kernels import launch
from virtual_gpu.faults import Deadlock, MemoryFault

TRY_WAIT = r"\s*mbarrier\.try_wait[^;]*;\s*(?:\.loc[^\n]*\n\s*)*@!complete bra[^;]*;"
DELETED = {
    "sm_80": {"barriers": r"\n\s*bar\.sync[^;]*;", "waits for copies": r"\n\s*cp\.async\.wait_group[^;]*;"},
    "sm_90": {
        "barriers": r"\n\s*bar\.sync[^;]*;",
        "waits for copies": r"\n\s*cp\.async\.wait_group[^;]*;",
        "waits for TMA": TRY_WAIT,
        "waits for wgmma": r"\n\s*wgmma\.wait_group[^;]*;",
        "fences": r"\n\s*fence\.proxy\.async[^;]*;",
    },
    "sm_100": {
        "barriers": r"\n\s*bar\.sync[^;]*;",
        "waits for TMA and tcgen05": TRY_WAIT,
        "fences": r"\n\s*fence\.proxy\.async[^;]*;",
        "waits for stores to tensor memory": r"\n\s*tcgen05\.wait::st[^;]*;",
    },
}
# Before Triton 3.7 nothing is read by TMA there.
WAITS = "waits for TMA" if launch.TRITON_VERSION >= (3, 7) else "waits for copies"
DELETED["sm_120"] = {name: DELETED["sm_90"][name] for name in ("barriers", WAITS)}
DELETED["gfx942"] = {
    "barriers": r"\n\s*s_barrier\b",
    "waits for global memory": r"\n\s*s_waitcnt vmcnt[^\n]*",
    "waits for shared memory": r"\n\s*s_waitcnt lgkmcnt[^\n]*",
}
DELETED["gfx950"] = DELETED["gfx942"]


def test_deleting_a_wait_is_noticed(virtual_gpu, request):
    gpu = request.config.getoption("--virtual-gpu")
    layer = Layer(random_ids(200, 2, 3), 3, LAYOUTS["concatenated"], torch.bfloat16, hidden=272, intermediate=144)
    grouping = reference.group(layer.ids, 3)
    operands = (layer.x, layer.gate_up, grouping, "silu")
    expected = kernels.up(*operands)
    for what, pattern in DELETED[gpu].items():
        if (gpu, what) == ("sm_90", "fences") and launch.TRITON_VERSION < (3, 7, 1):
            continue  # there are none, and nothing is known to go wrong
        deleted = []

        def delete(assembly, pattern=pattern, deleted=deleted):
            text, count = re.subn(pattern, "\n", assembly)
            deleted.append(count)
            return text

        virtual_gpu[:] = [delete]
        try:
            found = kernels.up(*operands)
        except (MemoryFault, Deadlock):
            continue
        finally:
            assert sum(deleted) > 0, f"{what}: there are none in the kernel"
        same = all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
        assert not same, f"{what} can be deleted, and nothing is noticed"
