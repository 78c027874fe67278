"""The virtual GPU sees a wait, a barrier or a fence that is missing: all of a kind are deleted from what was compiled.

`python -m bench.missing_waits` deletes them one at a time.
"""

import torch
from kernel_cases import LAYOUTS, Layer, random_ids

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


def test_deleting_a_wait_is_noticed(virtual_gpu, request):
    gpu = request.config.getoption("--virtual-gpu")
    layer = Layer(random_ids(200, 2, 3), 3, LAYOUTS["concatenated"], torch.bfloat16, hidden=272, intermediate=144)
    grouping = reference.group(layer.ids, 3)
    operands = (layer.x, layer.gate_up, grouping, "silu")
    expected = kernels.up(*operands)
    for kind in ("barrier", *DELETED[gpu]):
        deleted = []

        def delete(assembly, kind=kind, deleted=deleted):
            sites = [site for site in sites_of(assembly) if site.kind == kind]
            deleted.extend(sites)
            return without(sites)(assembly)

        virtual_gpu[:] = [delete]
        try:
            found = kernels.up(*operands)
        except (MemoryFault, Deadlock):
            continue
        finally:
            assert deleted, f"{kind}: there are none in the kernel"
        same = all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
        assert not same, f"{kind}: all can be deleted, and nothing is noticed"
