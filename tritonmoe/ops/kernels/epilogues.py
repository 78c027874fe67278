"""What follows the sums of the two products beside the activation: how `up` and `down_grad` store a tile's units."""

import triton
import triton.language as tl

from tritonmoe.ops.kernels.arithmetic import round_to, rounded, split_column_pairs, widened

__all__ = ["down_grad_epilogue", "up_epilogue"]


@triton.jit
def up_epilogue(
    gate,  # (BLOCK_M, SUB_N) fp32
    up_half,  # (BLOCK_M, SUB_N) fp32; ungated: the same as gate
    first_unit,
    expert,
    positions,  # (BLOCK_M,) int64
    valid,  # (BLOCK_M,)
    bias,  # (E, 2F) or None
    addend,  # (N, 2F) or None
    h,  # (N, 2F) or None
    a,  # (N, F) or None
    F,
    stride_bias_expert,
    stride_bias_column,
    stride_addend_row,
    stride_h_row,
    stride_a_row,
    numbers,  # of the activation
    dtype: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUB_N: tl.constexpr,
):
    """Add bias and addend, round and store h, then store the activation of the rounded h."""
    units = first_unit + tl.arange(0, SUB_N)
    unit_mask = units < F
    mask = valid[:, None] & unit_mask[None, :]
    if bias is not None:
        gate_columns = 2 * units if INTERLEAVED else units
        bias_pointers = bias + expert.to(tl.int64) * stride_bias_expert + gate_columns * stride_bias_column
        gate += tl.load(bias_pointers, mask=unit_mask, other=0.0).to(tl.float32)[None, :]
        if GATED:
            bias_pointers += (1 if INTERLEAVED else F) * stride_bias_column
            up_half += tl.load(bias_pointers, mask=unit_mask, other=0.0).to(tl.float32)[None, :]
    columns = 2 * first_unit + tl.arange(0, 2 * SUB_N)  # of gate and up, where they alternate
    if addend is not None:
        addend_rows = addend + positions[:, None] * stride_addend_row
        if INTERLEAVED:
            both = tl.load(addend_rows + columns[None, :], mask=valid[:, None] & (columns < 2 * F)[None, :], other=0.0)
            gate_addend, up_addend = split_column_pairs(both, BLOCK_M, SUB_N, False)
            gate += gate_addend.to(tl.float32)
            up_half += up_addend.to(tl.float32)
        else:
            gate += tl.load(addend_rows + units[None, :], mask=mask, other=0.0).to(tl.float32)
            if GATED:
                up_half += tl.load(addend_rows + F + units[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = round_to(gate, dtype)
    up_half = round_to(up_half, dtype) if GATED else gate
    if h is not None:
        h_rows = h + positions[:, None] * stride_h_row
        if INTERLEAVED:
            both = tl.reshape(tl.join(gate, up_half), (BLOCK_M, 2 * SUB_N))
            tl.store(h_rows + columns[None, :], both, mask=valid[:, None] & (columns < 2 * F)[None, :])
        else:
            tl.store(h_rows + units[None, :], gate, mask=mask)
            if GATED:
                tl.store(h_rows + F + units[None, :], up_half, mask=mask)
    if ACTIVATION is not None:
        a_tile, _, _ = ACTIVATION(widened(gate), widened(up_half), numbers, GATED)
        a_pointers = a + positions[:, None] * stride_a_row + units[None, :]
        tl.store(a_pointers, round_to(a_tile, dtype), mask=mask)


@triton.jit
def down_grad_epilogue(
    g,  # (BLOCK_M, SUB_N) fp32: the gradient of y carried through W2, before the gate weight
    first_unit,
    scale,  # (BLOCK_M,) fp32: gate weights
    positions,  # (BLOCK_M,) int64
    valid,  # (BLOCK_M,)
    addend,  # (N, F), perhaps the same memory as scaled_a, or None
    hidden,  # (N, 2F): h; without ACTIVATION (N, F): a
    dhidden,  # as hidden
    scaled_a,  # (N, F)
    F,
    stride_addend_row,
    stride_hidden_row,
    stride_dhidden_row,
    stride_scaled_a_row,
    numbers,  # of the activation
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUB_N: tl.constexpr,
):
    """Store dh and s*a of SUB_N units; give their part of each pair's <g, a>."""
    dtype: tl.constexpr = scaled_a.dtype.element_ty
    units = first_unit + tl.arange(0, SUB_N)
    mask = valid[:, None] & (units < F)[None, :]
    hidden_rows = hidden + positions[:, None] * stride_hidden_row
    dhidden_rows = dhidden + positions[:, None] * stride_dhidden_row
    if addend is not None:
        addend_pointers = addend + positions[:, None] * stride_addend_row + units[None, :]
        g += tl.load(addend_pointers, mask=mask, other=0.0).to(tl.float32)
    da = scale[:, None] * g
    if ACTIVATION is None:
        a = tl.load(hidden_rows + units[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(g * a, 1)
        tl.store(dhidden_rows + units[None, :], round_to(da, dtype), mask=mask)
    else:
        if GATED:
            if INTERLEAVED:
                columns = 2 * first_unit + tl.arange(0, 2 * SUB_N)
                column_mask = valid[:, None] & (columns < 2 * F)[None, :]
                both = tl.load(hidden_rows + columns[None, :], mask=column_mask, other=0.0)
                gate, up = split_column_pairs(both, BLOCK_M, SUB_N, False)
            else:
                gate = tl.load(hidden_rows + units[None, :], mask=mask, other=0.0)
                up = tl.load(hidden_rows + F + units[None, :], mask=mask, other=0.0)
        else:
            gate = tl.load(hidden_rows + units[None, :], mask=mask, other=0.0)
            up = gate
        exact_a, slope_gate, slope_up = ACTIVATION(widened(gate), widened(up), numbers, GATED)
        a = rounded(exact_a, dtype)
        total = tl.sum(g * a, 1)
        dgate = round_to(slope_gate * da, dtype)
        if GATED:
            dup = round_to(slope_up * da, dtype)
            if INTERLEAVED:
                both = tl.reshape(tl.join(dgate, dup), (BLOCK_M, 2 * SUB_N))
                tl.store(dhidden_rows + columns[None, :], both, mask=column_mask)
            else:
                tl.store(dhidden_rows + units[None, :], dgate, mask=mask)
                tl.store(dhidden_rows + F + units[None, :], dup, mask=mask)
        else:
            tl.store(dhidden_rows + units[None, :], dgate, mask=mask)
    scaled_a_pointers = scaled_a + positions[:, None] * stride_scaled_a_row + units[None, :]
    tl.store(scaled_a_pointers, round_to(scale[:, None] * a, dtype), mask=mask)
    return total
