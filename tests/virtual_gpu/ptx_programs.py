"""A few lines of PTX as a kernel of two warps."""

from virtual_gpu.memory import GlobalMemory, View
from virtual_gpu.nvidia.machine import run_grid
from virtual_gpu.nvidia.parser import parse
from virtual_gpu.nvidia.translation import translate

THREADS = 64
HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0{descriptors}
)
.reqntid {threads}
{{
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 2;
	mul.wide.u32 	%rd2, %r1, 8;
	add.s64 	%rd3, %rd1, %rd2;
"""
"""%rd1: the array; %r1: the thread; %r2: its word in shared memory; %rd3: its 64-bit word of the array."""


def view_of(array):
    """Return a view of a whole array."""
    return View(array.ctypes.data, (array.nbytes,), (1,), 1)


def run_ptx(body, memory, shared_bytes=4 * THREADS, threads=THREADS, descriptors=()):
    """Run threads on an array, which they may change; descriptors of it are parameters from kernel_param_1 on."""
    lines = "\n".join(f"\t{line.strip()}" for line in body.strip().splitlines())
    others = (f",\n\t.param .align 64 .b8 kernel_param_{number + 1}[128]" for number in range(len(descriptors)))
    head = HEAD.format(threads=threads, descriptors="".join(others))
    code = translate(parse(f"{head}{lines}\n\tret;\n}}\n"))
    spans = GlobalMemory([view_of(memory)])
    run_grid(code, [memory.ctypes.data, *descriptors], spans, shared_bytes, (1, 1, 1), True)
