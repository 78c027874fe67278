"""A few lines of AMDGCN as a kernel of two wavefronts."""

from ptx_programs import view_of

from virtual_gpu.amd.arguments import argument_segment
from virtual_gpu.amd.machine import run_grid
from virtual_gpu.amd.parser import parse
from virtual_gpu.amd.translation import translate
from virtual_gpu.memory import GlobalMemory

NUM_THREADS = 128
PROGRAM = """
	.amdgcn_target "amdgcn-amd-amdhsa--{target}"
kernel:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0
	s_waitcnt lgkmcnt(0)
{code}
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel kernel
		.amdhsa_private_segment_fixed_size 0
		.amdhsa_kernarg_size 16
		.amdhsa_user_sgpr_count 2
		.amdhsa_user_sgpr_dispatch_ptr 0
		.amdhsa_user_sgpr_queue_ptr 0
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_user_sgpr_dispatch_id 0
		.amdhsa_user_sgpr_kernarg_preload_length 0
		.amdhsa_user_sgpr_kernarg_preload_offset 0
		.amdhsa_system_sgpr_workgroup_id_x 1
		.amdhsa_system_sgpr_workgroup_id_y 0
		.amdhsa_system_sgpr_workgroup_id_z 0
	.end_amdhsa_kernel
      - .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .offset:         8
        .size:           8
        .value_kind:     global_buffer
    .max_flat_workgroup_size: 128
"""
"""v1 is four times the thread, s[4:5] the input, s[6:7] the output."""


def run_amd(code, source, output, target="gfx942"):
    """Run lines of code on an input and an output array of 32-bit words; 1024 bytes are shared."""
    translation = translate(parse(PROGRAM.format(code="\n".join(code), target=target)))
    segment = argument_segment(translation.kernel, [source.ctypes.data, output.ctypes.data], (1, 1, 1), 1024)
    views = GlobalMemory([view_of(array) for array in (source, output, segment)])
    run_grid(translation, segment, views, 1024, (1, 1, 1))
