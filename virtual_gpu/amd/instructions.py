"""What each instruction on registers computes, as Python: kinds of result and sources, and the expression."""

from collections.abc import Callable

__all__ = ["COMPARISONS", "IMMEDIATE", "NOTHING", "SCALAR", "VECTOR"]

NOTHING = ("s_nop", "s_setprio")
"""What only changes when something happens."""
IMMEDIATE = ("s_addk_i32", "s_movk_i32", "s_mulk_i32")
"""What has 16 bits with a sign in the instruction, and but for the move its result as the first source."""


def _comparison(operator: str, negated: bool = False) -> Callable[[str, str], str]:
    return lambda left, right: f"{'~' * negated}({left} {operator} {right})"


_OPERATORS = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS: dict[str, Callable[[str, str], str]] = {
    **{name: _comparison(operator) for name, operator in _OPERATORS.items()},
    **{f"n{name}": _comparison(operator, True) for name, operator in _OPERATORS.items()},
    "ne": _comparison("!="),  # of integers; of floats it is lg, which NaN is not
    "lg": lambda left, right: f"(({left} < {right}) | ({left} > {right}))",
    "nlg": lambda left, right: f"~(({left} < {right}) | ({left} > {right}))",
    "o": lambda left, right: f"~(np.isnan({left}) | np.isnan({right}))",
    "u": lambda left, right: f"(np.isnan({left}) | np.isnan({right}))",
}

_VECTOR = """
v_mov_b32            u4 u4        {0}
v_accvgpr_read_b32   u4 u4        {0}
v_accvgpr_write_b32  u4 u4        {0}
v_accvgpr_mov_b32    u4 u4        {0}
v_mov_b64            u8 u8        {0}
v_add_u32            u4 u4,u4     {0} + {1}
v_sub_u32            u4 u4,u4     {0} - {1}
v_subrev_u32         u4 u4,u4     {1} - {0}
v_mul_lo_u32         u4 u4,u4     {0} * {1}
v_mul_hi_u32         u4 u4,u4     high({0}, {1})
v_mul_u32_u24        u4 u4,u4     ({0} & 0xFFFFFF) * ({1} & 0xFFFFFF)
v_mad_u32_u24        u4 u4,u4,u4  ({0} & 0xFFFFFF) * ({1} & 0xFFFFFF) + {2}
v_mul_i32_i24        i4 i4,i4     (({0} << 8) >> 8) * (({1} << 8) >> 8)
v_mad_i32_i24        i4 i4,i4,i4  (({0} << 8) >> 8) * (({1} << 8) >> 8) + {2}
v_min_i32            i4 i4,i4     np.minimum({0}, {1})
v_max_i32            i4 i4,i4     np.maximum({0}, {1})
v_max_u32            u4 u4,u4     np.maximum({0}, {1})
v_min3_u32           u4 u4,u4,u4  np.minimum(np.minimum({0}, {1}), {2})
v_min3_i32           i4 i4,i4,i4  np.minimum(np.minimum({0}, {1}), {2})
v_max3_u32           u4 u4,u4,u4  np.maximum(np.maximum({0}, {1}), {2})
v_max3_i32           i4 i4,i4,i4  np.maximum(np.maximum({0}, {1}), {2})
v_and_b32            u4 u4,u4     {0} & {1}
v_or_b32             u4 u4,u4     {0} | {1}
v_xor_b32            u4 u4,u4     {0} ^ {1}
v_not_b32            u4 u4        ~{0}
v_lshlrev_b32        u4 u4,u4     {1} << ({0} & 31)
v_lshrrev_b32        u4 u4,u4     {1} >> ({0} & 31)
v_ashrrev_i32        i4 i4,i4     {1} >> ({0} & 31)
v_add_u16            u4 u4,u4     ({0} + {1}) & 0xFFFF
v_sub_u16            u4 u4,u4     ({0} - {1}) & 0xFFFF
v_max_u16            u4 u4,u4     np.maximum({0} & 0xFFFF, {1} & 0xFFFF)
v_lshrrev_b16        u4 u4,u4     ({1} & 0xFFFF) >> ({0} & 15)
v_ashrrev_i16        u4 u4,u4     (({1} << 16).view('i4') >> (16 + ({0} & 15)).astype('i4')).view('u4') & 0xFFFF
v_lshlrev_b16        u4 u4,u4     ({1} << ({0} & 15)) & 0xFFFF
v_lshlrev_b64        u8 u4,u8     {1} << ({0} & 63).astype('u8')
v_lshrrev_b64        u8 u4,u8     {1} >> ({0} & 63).astype('u8')
v_add3_u32           u4 u4,u4,u4  {0} + {1} + {2}
v_lshl_add_u32       u4 u4,u4,u4  ({0} << ({1} & 31)) + {2}
v_add_lshl_u32       u4 u4,u4,u4  ({0} + {1}) << ({2} & 31)
v_lshl_or_b32        u4 u4,u4,u4  ({0} << ({1} & 31)) | {2}
v_and_or_b32         u4 u4,u4,u4  ({0} & {1}) | {2}
v_or3_b32            u4 u4,u4,u4  {0} | {1} | {2}
v_xad_u32            u4 u4,u4,u4  ({0} ^ {1}) + {2}
v_bfi_b32            u4 u4,u4,u4  ({0} & {1}) | (~{0} & {2})
v_bfe_u32            u4 u4,u4,u4  field({0}, {1}, {2})
v_bfe_i32            i4 i4,u4,u4  field({0}, {1}, {2})
v_bfrev_b32          u4 u4        reverse_bits({0})
v_bcnt_u32_b32       u4 u4,u4     count_bits({0}) + {1}
v_alignbit_b32       u4 u4,u4,u4  (pair({1}, {0}) >> ({2} & 31).astype('u8')).astype('u4')
v_perm_b32           u4 u4,u4,u4  permute_bytes({0}, {1}, {2})
v_bitop3_b32         u4 u4,u4,u4  bitwise_table({0}, {1}, {2}, {bitop3})
v_bitop3_b16         u4 u4,u4,u4  bitwise_table({0}, {1}, {2}, {bitop3}) & 0xFFFF
v_lshl_add_u64       u8 u8,u4,u8  ({0} << ({1} & 63).astype('u8')) + {2}
v_add_f32            f4 f4,f4     {0} + {1}
v_sub_f32            f4 f4,f4     {0} - {1}
v_subrev_f32         f4 f4,f4     {1} - {0}
v_mul_f32            f4 f4,f4     {0} * {1}
v_min_f32            f4 f4,f4     smaller({0}, {1})
v_max_f32            f4 f4,f4     larger({0}, {1})
v_max3_f32           f4 f4,f4,f4  larger(larger({0}, {1}), {2})
v_minimum3_f32       f4 f4,f4,f4  with_nan(smaller, with_nan(smaller, {0}, {1}), {2})
v_maximum3_f32       f4 f4,f4,f4  with_nan(larger, with_nan(larger, {0}, {1}), {2})
v_fma_f32            f4 f4,f4,f4  fused({0}, {1}, {2})
v_fmac_f32           f4 f4,f4,f4  fused({0}, {1}, {2})
v_fmaak_f32          f4 f4,f4,f4  fused({0}, {1}, {2})
v_fmamk_f32          f4 f4,f4,f4  fused({0}, {1}, {2})
v_exp_f32            f4 f4        np.exp2({0})
v_log_f32            f4 f4        np.log2({0})
v_sqrt_f32           f4 f4        np.sqrt({0})
v_rcp_f32            f4 f4        1 / {0}
v_rcp_iflag_f32      f4 f4        1 / {0}
v_rndne_f32          f4 f4        np.rint({0})
v_ldexp_f32          f4 f4,i4     np.ldexp({0}, {1})
v_div_fixup_f32      f4 f4,f4,f4  divide_fixup({0}, {1}, {2})
v_div_fmas_f32       f4 f4,f4,f4  divide_scaled_up({0}, {1}, {2}, mask_of_bits(SB[106]))
v_add_f64            f8 f8,f8     {0} + {1}
v_cvt_f64_f32        f8 f4        {0}.astype('f8')
v_cvt_f32_u32        f4 u4        {0}.astype('f4')
v_cvt_u32_f32        u4 f4        to_integer({0}, 'u4')
v_cvt_i32_f32        i4 f4        to_integer({0}, 'i4')
v_cvt_f32_f16        f4 h         {0}
v_cvt_f16_f32        u4 f4        {0}.astype('f2').view('u2').astype('u4')
v_cvt_pk_bf16_f32    u4 f4,f4     round_pair({0}, {1}, 'bf16')
v_cvt_pk_f16_f32     u4 f4,f4     round_pair({0}, {1}, 'f16')
v_cvt_pk_fp8_f32     u4 f4,f4     fp8_pair({0}, {1}, {fp8})
v_cvt_pk_f32_fp8     u8 u4        floats_of_fp8({0}, {fp8})
v_cvt_f32_fp8        f4 u4        from_fp8({0} & 0xFF, {fp8})
v_cvt_scalef32_pk_fp8_f32   u4 f4,f4,f4  fp8_pair({0}, {1}, {fp8}, {2})
v_cvt_scalef32_pk_fp8_bf16  u4 u4,f4     fp8_pair(({0} << 16).view('f4'), ({0} & 0xFFFF0000).view('f4'), {fp8}, {1})
v_cvt_scalef32_pk_f32_fp8   u8 u4,f4     floats_of_fp8({0}, {fp8}, {1})
v_cvt_scalef32_pk_bf16_fp8  u4 u4,f4     bf16_of_fp8({0}, {fp8}, {1})
v_pk_add_u16         u4 u4,u4     add_halves({0}, {1})
v_pk_max_u16         u4 u4,u4     largest_halves({0}, {1})
v_pack_b32_f16       u4 u4,u4     ({0} & 0xFFFF) | ({1} << 16)
"""
VECTOR = {
    name: (kind, tuple(sources.split(",")), expression)
    for name, kind, sources, expression in (line.split(maxsplit=3) for line in _VECTOR.strip().splitlines())
}
"""By name: the result's kind, those of the sources ("h": a float16 half), and the expression."""

_SCALAR = """
s_mov_b32            u4 u4        {0}
s_movk_i32           u4 u4        {0}
s_mov_b64            u8 u8        {0}
s_add_i32            i4 i4,i4     {0} + {1}                       ? overflows({0}.astype('i8') + {1})
s_addk_i32           i4 i4,i4     {0} + {1}                       ? overflows({0}.astype('i8') + {1})
s_sub_i32            i4 i4,i4     {0} - {1}                       ? overflows({0}.astype('i8') - {1})
s_add_u32            u4 u4,u4     {0} + {1}                       ? carries({0}, {1})
s_sub_u32            u4 u4,u4     {0} - {1}                       ? {0} < {1}
s_subb_u32           u4 u4,u4     {0} - {1} - SCC                 ? {0} < {1}.astype('u8') + SCC
s_addc_u32           u4 u4,u4     {0} + {1} + SCC                 ? carries({0}, {1}, SCC)
s_mul_i32            u4 u4,u4     {0} * {1}
s_mulk_i32           i4 i4,i4     {0} * {1}
s_mul_hi_u32         u4 u4,u4     high({0}, {1})
s_mul_hi_i32         i4 i4,i4     (({0}.astype('i8') * {1}) >> 32).astype('i4')
s_abs_i32            i4 i4        abs({0})                        ? T != 0
s_min_i32            i4 i4,i4     np.minimum({0}, {1})            ? {0} < {1}
s_max_i32            i4 i4,i4     np.maximum({0}, {1})            ? {0} > {1}
s_and_b32            u4 u4,u4     {0} & {1}                       ? T != 0
s_or_b32             u4 u4,u4     {0} | {1}                       ? T != 0
s_xor_b32            u4 u4,u4     {0} ^ {1}                       ? T != 0
s_lshl_b32           u4 u4,u4     {0} << ({1} & 31)               ? T != 0
s_lshr_b32           u4 u4,u4     {0} >> ({1} & 31)               ? T != 0
s_ashr_i32           i4 i4,i4     {0} >> ({1} & 31)               ? T != 0
s_bfe_u32            u4 u4,u4     field({0}, {1}, {1} >> 16)      ? T != 0
s_bfe_i32            i4 i4,u4     field({0}, {1}, {1} >> 16)      ? T != 0
s_brev_b32           u4 u4        reverse_bits({0})
s_sext_i32_i16       i4 i2        {0}
s_lshl1_add_u32      u4 u4,u4     ({0} << 1) + {1}                ? ({0}.astype('u8') << 1) + {1} != T
s_lshl2_add_u32      u4 u4,u4     ({0} << 2) + {1}                ? ({0}.astype('u8') << 2) + {1} != T
s_lshl3_add_u32      u4 u4,u4     ({0} << 3) + {1}                ? ({0}.astype('u8') << 3) + {1} != T
s_lshl4_add_u32      u4 u4,u4     ({0} << 4) + {1}                ? ({0}.astype('u8') << 4) + {1} != T
s_cselect_b32        u4 u4,u4     np.where(SCC, {0}, {1})
s_cselect_b64        u8 u8,u8     np.where(SCC, {0}, {1})
s_bitcmp0_b32        -  u4,u4     0                               ? ({0} >> ({1} & 31)) & 1 == 0
s_bitcmp1_b32        -  u4,u4     0                               ? ({0} >> ({1} & 31)) & 1 == 1
s_and_b64            u8 u8,u8     {0} & {1}                       ? T != 0
s_or_b64             u8 u8,u8     {0} | {1}                       ? T != 0
s_xor_b64            u8 u8,u8     {0} ^ {1}                       ? T != 0
s_andn2_b64          u8 u8,u8     {0} & ~{1}                      ? T != 0
s_orn2_b64           u8 u8,u8     {0} | ~{1}                      ? T != 0
s_not_b64            u8 u8        ~{0}                            ? T != 0
s_lshl_b64           u8 u8,u4     {0} << ({1} & 63).astype('u8')  ? T != 0
s_and_saveexec_b64   u8 u8,u8     {0} & {1}                       ? T != 0
s_or_saveexec_b64    u8 u8,u8     {0} | {1}                       ? T != 0
s_andn2_saveexec_b64 u8 u8,u8     {0} & ~{1}                      ? T != 0
"""


def _scalar(line: str) -> tuple[str, tuple[str, tuple[str, ...], str, str]]:
    name, kind, sources, rest = line.split(maxsplit=3)
    expression, _, condition = rest.partition("?")
    return name, ("" if kind == "-" else kind, tuple(sources.split(",")), expression.strip(), condition.strip())


SCALAR = dict(map(_scalar, _SCALAR.strip().splitlines()))
"""By name: the result's kind (none: only SCC), those of the sources, the expression, and SCC's (none: kept)."""
