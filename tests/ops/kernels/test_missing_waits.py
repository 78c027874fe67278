"""The virtual GPU sees waits, barriers and fences that are missing: all of a kind are deleted from compiled code."""

from functools import partial

import torch
from kernel_cases import LAYOUTS, Layer, random_ids

from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.kernels import launch
from virtual_gpu.deletions import sites_of, without
from virtual_gpu.faults import Deadlock, MemoryFault

# Before Triton 3.7 nothing is read by TMA on sm_120. Before 3.7.1 sm_90 has no fences; nothing is known to go wrong.
READS = "wait for an mbarrier" if launch.TRITON_VERSION >= (3, 7) else "wait for copies"
HOPPER = ("wait for copies", "wait for an mbarrier", "wait for wgmma", "fence of registers")
AMD = ("wait for global memory", "wait for shared memory")
DELETED = {
    "sm_80": ("wait for copies",),
    "sm_90": (*HOPPER, *(("proxy fence",) if launch.TRITON_VERSION >= (3, 7, 1) else ())),
    "sm_100": ("wait for an mbarrier", "proxy fence", "wait for tensor memory"),
    "sm_120": (READS,),
    "gfx942": AMD,
    "gfx950": AMD,
}


STORE_BY_TMA = ("sm_90", "sm_100") if launch.TRITON_VERSION >= (3, 7, 1) else ()
"""The results of `down`, while the next tile begins."""


def unnoticed(run, kinds, virtual_gpu):
    """Return the kinds all of which can be deleted from the kernels of a call, and no byte of its results changes."""
    expected, found = run(), []
    for kind in kinds:
        deleted = []

        def delete(assembly, kind=kind, deleted=deleted):
            sites = [site for site in sites_of(assembly) if site.kind == kind]
            deleted.extend(sites)
            return without(sites)(assembly)

        virtual_gpu[:] = [delete]
        try:
            results = run()
        except (MemoryFault, Deadlock):
            continue
        finally:
            virtual_gpu.clear()
            assert deleted, f"{kind}: there are none in the kernel"
        if all(torch.equal(one, two) for one, two in zip(expected, results, strict=True)):
            found.append(kind)
    return found


def test_deleting_a_wait_is_noticed(virtual_gpu, request):
    gpu = request.config.getoption("--virtual-gpu")
    layer = Layer(random_ids(200, 2, 3), 3, LAYOUTS["concatenated"], torch.bfloat16, hidden=272, intermediate=144)
    grouping = reference.group(layer.ids, 3)
    kinds = "barrier", *DELETED[gpu]
    assert unnoticed(lambda: kernels.up(layer.x, layer.gate_up, grouping, "silu"), kinds, virtual_gpu) == []
    if gpu in STORE_BY_TMA:
        a = torch.randn(grouping.num_pairs, 144).bfloat16()
        options = KernelOptions(num_sms=1)  # one program has all tiles
        run = partial(kernels.down, a, layer.down, grouping, options=options)
        assert unnoticed(lambda: [run()], ("wait for bulk stores",), virtual_gpu) == []
