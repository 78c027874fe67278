"""Every PTX instruction that the machine runs, by its whole name: a name with any other modifier is refused.

A line of a table is a pattern of names: parts with points between them, alternatives with bars, and in brackets what
may be left out. min3 and max3 are min and max of three sources (Blackwell). In kinds T stands for the last part of the
name, and W for the integer of twice its width.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = [
    "ARITHMETIC",
    "BARRIERS",
    "CALLS",
    "FENCES",
    "MEMORY",
    "NOTHING",
    "SPECIAL_FORMS",
    "Formula",
    "names_of",
]


@dataclass(frozen=True)
class Formula:
    """An instruction whose operands are the result and its sources, and what it computes in Python."""

    result: str
    sources: tuple[str, ...]
    """The kinds as which the operands are taken."""
    expression: str


def names_of(pattern: str) -> Iterator[str]:
    """Return the names that a pattern stands for: "add.[rn].f32|f64" has four."""
    choices = [["", *part[1:-1].split("|")] if part.startswith("[") else part.split("|") for part in pattern.split(".")]
    for parts in itertools.product(*choices):
        yield ".".join(part for part in parts if part)


_INTEGERS = "s16|u16|s32|u32|s64|u64"
_ARITHMETIC = f"""
add.{_INTEGERS}                         T  T,T    {{0}} + {{1}}
sub.{_INTEGERS}                         T  T,T    {{0}} - {{1}}
add.s16x2|u16x2                         T  T,T    {{0}} + {{1}}
add.[rn].[ftz].f32|f32x2|f16|f16x2      T  T,T    {{0}} + {{1}}
sub.[rn].[ftz].f32|f32x2|f16|f16x2      T  T,T    {{0}} - {{1}}
mul.[rn].[ftz].f32|f32x2|f16|f16x2      T  T,T    {{0}} * {{1}}
add.[rn].f64|bf16|bf16x2                T  T,T    {{0}} + {{1}}
sub.[rn].f64|bf16|bf16x2                T  T,T    {{0}} - {{1}}
mul.[rn].f64|bf16|bf16x2                T  T,T    {{0}} * {{1}}
add.rn.f32.bf16|f16                     f32  T,f32  {{0}} + {{1}}
sub.rn.f32.bf16|f16                     f32  T,f32  {{0}} - {{1}}
mul.lo.{_INTEGERS}                      T  T,T    {{0}} * {{1}}
mul.hi.s16|u16|s32|u32                  T  T,T    upper_half({{0}}, {{1}})
mul.wide.s16|u16|s32|u32                W  T,T    widened({{0}}) * widened({{1}})
mad.lo.{_INTEGERS}                      T  T,T,T  {{0}} * {{1}} + {{2}}
mad.wide.s16|u16|s32|u32                W  T,T,W  widened({{0}}) * widened({{1}}) + {{2}}
fma.rn.[ftz].f32|f32x2|f16|f16x2        T  T,T,T  fused({{0}}, {{1}}, {{2}})
fma.rn.bf16|bf16x2                      T  T,T,T  fused({{0}}, {{1}}, {{2}}, 'bf16')
fma.rn.f32.bf16|f16                     f32  T,T,f32  fused({{0}}, {{1}}, {{2}})
fma.rn.f64                              T  T,T,T  fused64({{0}}, {{1}}, {{2}})
min.{_INTEGERS}                         T  T,T    np.minimum({{0}}, {{1}})
max.{_INTEGERS}                         T  T,T    np.maximum({{0}}, {{1}})
min.s16x2|u16x2                         T  T,T    np.minimum({{0}}, {{1}})
max.s16x2|u16x2                         T  T,T    np.maximum({{0}}, {{1}})
min.[ftz].f32|f16|f16x2                 T  T,T    smaller({{0}}, {{1}})
max.[ftz].f32|f16|f16x2                 T  T,T    larger({{0}}, {{1}})
min.[ftz].NaN.f32|f16|f16x2             T  T,T    with_nan(smaller, {{0}}, {{1}})
max.[ftz].NaN.f32|f16|f16x2             T  T,T    with_nan(larger, {{0}}, {{1}})
min.f64|bf16|bf16x2                     T  T,T    smaller({{0}}, {{1}})
max.f64|bf16|bf16x2                     T  T,T    larger({{0}}, {{1}})
min.NaN.bf16|bf16x2                     T  T,T    with_nan(smaller, {{0}}, {{1}})
max.NaN.bf16|bf16x2                     T  T,T    with_nan(larger, {{0}}, {{1}})
min3.[ftz].f32                          T  T,T,T  smaller(smaller({{0}}, {{1}}), {{2}})
max3.[ftz].f32                          T  T,T,T  larger(larger({{0}}, {{1}}), {{2}})
min3.[ftz].NaN.f32                      T  T,T,T  with_nan(smaller, with_nan(smaller, {{0}}, {{1}}), {{2}})
max3.[ftz].NaN.f32                      T  T,T,T  with_nan(larger, with_nan(larger, {{0}}, {{1}}), {{2}})
div.{_INTEGERS}                         T  T,T    quotient({{0}}, {{1}})
rem.{_INTEGERS}                         T  T,T    remainder({{0}}, {{1}})
div.full|approx|rn.[ftz].f32            T  T,T    {{0}} / {{1}}
div.rn.f64                              T  T,T    {{0}} / {{1}}
neg.s16|s32|s64                         T  T      -{{0}}
abs.s16|s32|s64                         T  T      abs({{0}})
neg.[ftz].f32|f16|f16x2                 T  T      -{{0}}
abs.[ftz].f32|f16|f16x2                 T  T      abs({{0}})
neg.f64|bf16|bf16x2                     T  T      -{{0}}
abs.f64|bf16|bf16x2                     T  T      abs({{0}})
ex2.approx.[ftz].f32                    T  T      np.exp2({{0}})
lg2.approx.[ftz].f32                    T  T      np.log2({{0}})
rcp.approx|rn.[ftz].f32                 T  T      1 / {{0}}
rcp.rn.f64                              T  T      1 / {{0}}
sqrt.approx|rn.[ftz].f32                T  T      np.sqrt({{0}})
sqrt.rn.f64                             T  T      np.sqrt({{0}})
rsqrt.approx.[ftz].f32                  T  T      1 / np.sqrt({{0}})
tanh.approx.f32                         T  T      np.tanh({{0}})
and.b16|b32|b64|pred                    T  T,T    {{0}} & {{1}}
or.b16|b32|b64|pred                     T  T,T    {{0}} | {{1}}
xor.b16|b32|b64|pred                    T  T,T    {{0}} ^ {{1}}
not.b16|b32|b64|pred                    T  T      ~{{0}}
popc.b32                                T  T      population({{0}})
shl.b16|b32|b64                         T  T,u32  shift_left({{0}}, {{1}})
shr.b16|b32|b64|{_INTEGERS}             T  T,u32  shift_right({{0}}, {{1}})
bfe.u32|s32|u64|s64                     T  T,u32,u32  bits_of_field({{0}}, {{1}}, {{2}})
prmt.b32                                T  T,T,T  byte_permutation({{0}}, {{1}}, {{2}})
setp.eq|ne.b16|b32|b64|{_INTEGERS}      pred  T,T  {{0}} {{operator}} {{1}}
setp.lt|le|gt|ge.{_INTEGERS}            pred  T,T  {{0}} {{operator}} {{1}}
setp.lo|ls|hi|hs.u16|u32|u64            pred  T,T  {{0}} {{operator}} {{1}}
setp.eq|lt|le|gt|ge.[ftz].f32|f16       pred  T,T  {{0}} {{operator}} {{1}}
setp.eq|lt|le|gt|ge.f64|bf16            pred  T,T  {{0}} {{operator}} {{1}}
setp.ne.[ftz].f32|f16                   pred  T,T  ({{0}} != {{1}}) & ~unordered({{0}}, {{1}})
setp.ne.f64|bf16                        pred  T,T  ({{0}} != {{1}}) & ~unordered({{0}}, {{1}})
setp.equ|neu|ltu|leu|gtu|geu.[ftz].f32|f16  pred  T,T  ({{0}} {{operator}} {{1}}) | unordered({{0}}, {{1}})
setp.equ|neu|ltu|leu|gtu|geu.f64|bf16       pred  T,T  ({{0}} {{operator}} {{1}}) | unordered({{0}}, {{1}})
setp.num.[ftz].f32|f16                  pred  T,T  ~unordered({{0}}, {{1}})
setp.num.f64|bf16                       pred  T,T  ~unordered({{0}}, {{1}})
setp.nan.[ftz].f32|f16                  pred  T,T  unordered({{0}}, {{1}})
setp.nan.f64|bf16                       pred  T,T  unordered({{0}}, {{1}})
cvt.f32.f16|bf16                        f32  T     {{0}}.astype('f4')
cvt.f64.f32                             f64  T     {{0}}.astype('f8')
cvt.rn.[ftz].f32.f64                    f32  T     {{0}}.astype('f4')
cvt.rn.f16.f32|f64                      f16  T     {{0}}.astype('f2')
cvt.rn.bf16.f32                         bf16  T    {{0}}
cvt.bf16.f16                            bf16  T    {{0}}.astype('f4')
cvt.rn.f16x2.f32                        f16x2  T,T   interleaved({{1}}, {{0}}).astype('f2')
cvt.rn.bf16x2.f32                       bf16x2  T,T  interleaved({{1}}, {{0}})
cvt.rn.satfinite.e4m3x2.f32             e4m3x2  T,T  interleaved({{1}}, {{0}})
cvt.rn.satfinite.e4m3x2.f16x2|bf16x2    e4m3x2  T    {{0}}.astype('f4')
cvt.rn.f16x2.e4m3x2                     f16x2  T     {{0}}.astype('f2')
cvt.rn.bf16x2.e4m3x2                    bf16x2  T    {{0}}
"""
_OPERATORS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_OPERATORS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_ROUNDED = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def _formulas() -> Iterator[tuple[str, Formula]]:
    for line in _ARITHMETIC.strip().splitlines():
        pattern, result, sources, expression = line.split(maxsplit=3)
        for name in names_of(pattern):
            yield name, _formula(name, result, sources, expression)
    kinds = [f"{letter}{width}" for letter in "su" for width in (8, 16, 32, 64)]
    for target, kind in itertools.product(kinds, kinds):
        yield f"cvt.{target}.{kind}", Formula(target, (kind,), f"resized({{0}}, '{target}')")
    for kind, target in itertools.product(kinds, ("f16", "f32", "f64")):
        yield f"cvt.rn.{target}.{kind}", Formula(target, (kind,), f"{{0}}.astype('f{int(target[1:]) // 8}')")
    for mode, kind in itertools.product(_ROUNDED, ("f16", "f32", "f64")):
        rounded = f"{_ROUNDED[mode]}({{0}})"
        yield f"cvt.{mode}.{kind}.{kind}", Formula(kind, (kind,), rounded)
        for target in (one for one in kinds if one[1:] != "8"):
            yield f"cvt.{mode}.{target}.{kind}", Formula(target, (kind,), f"saturated({rounded}, '{target}')")
    for mode in _ROUNDED:
        yield f"cvt.{mode}.ftz.f32.f32", Formula("f32", ("f32",), f"flushed({_ROUNDED[mode]}(flushed({{0}})))")


def _formula(name: str, result: str, sources: str, expression: str) -> Formula:
    parts = name.split(".")
    kind = parts[-1]
    double = f"{kind[0]}{2 * int(kind[1:])}" if "W" in result + sources else ""
    kinds = {"T": kind, "W": double}
    operator = _OPERATORS.get(parts[1].removesuffix("u")) or _OPERATORS.get(parts[1], "")
    values = [f"flushed({{{index}}})" if "ftz" in parts else f"{{{index}}}" for index in range(3)]
    text = expression.format(*values, operator=operator)
    if "ftz" in parts and parts[0] != "setp":
        text = f"flushed({text})"
    return Formula(kinds.get(result, result), tuple(kinds.get(one, one) for one in sources.split(",")), text)


ARITHMETIC: dict[str, Formula] = dict(_formulas())


def _names(table: str) -> frozenset[str]:
    return frozenset(name for line in table.split() for name in names_of(line))


SPECIAL_FORMS = _names(
    """
    mov.b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64|pred cvta.param|global.u64 cvta.to.global.u64
    selp.b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64
    shfl.sync.up|down|bfly|idx.b32 vote.sync.ballot.b32 elect.sync
    redux.sync.add|min|max.s32|u32 redux.sync.and|or|xor.b32 redux.sync.min|max.[NaN].f32
    createpolicy.fractional.L2::evict_last|L2::evict_first.b64
    """
)
"""Instructions on registers that are no formula."""
MEMORY = _names(
    """
    ld.param.b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64
    ld.global.[L1::evict_last|L1::evict_first|L1::no_allocate].[L2::cache_hint].[v2|v4|v8].b8|b16|b32|b64|s32|u32|u64|f32
    ld.shared|shared::cta.[v2|v4].b8|b16|b32|b64|s32|u32|u64|f32
    st.global.[L1::evict_last|L1::evict_first|L1::no_allocate].[L2::cache_hint].[v2|v4|v8].b8|b16|b32|b64|u32|u64|f32
    st.shared|shared::cta.[v2|v4].b8|b16|b32|b64|u32|u64|f32
    """
)
NOTHING = _names("bar.warp.sync tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned")
"""What orders or announces something that this machine does in order anyway."""
BARRIERS = _names("bar.sync barrier.sync.[aligned]")
FENCES = {"fence.proxy.async.shared::cta": "m.shared.fence()", "wgmma.fence.sync.aligned": "m.fence_registers()"}
_TENSOR_COPY = "shared::cta|shared::cluster.global.mbarrier::complete_tx::bytes"
_CALLS = f"""
tensor_copy        cp.async.bulk.tensor.1d|2d|3d|4d|5d.[tile].{_TENSOR_COPY}
tensor_copy        cp.async.bulk.tensor.2d.tile::gather4.{_TENSOR_COPY}
tensor_store       cp.async.bulk.tensor.1d|2d|3d|4d|5d.[tile].global.shared::cta.bulk_group
store_commit       cp.async.bulk.commit_group
store_wait         cp.async.bulk.wait_group.[read]
copy               cp.async.ca|cg.shared.global
copy_commit        cp.async.commit_group
copy_wait          cp.async.wait_group
mbarrier_init      mbarrier.init.shared|shared::cta.b64
mbarrier_inval     mbarrier.inval.shared|shared::cta.b64
mbarrier_arrive    mbarrier.arrive.expect_tx.shared|shared::cta.b64
mbarrier_wait      mbarrier.try_wait.parity.shared|shared::cta.b64
atomic_add         atom.[relaxed].[cta|gpu|sys].shared|shared::cta.add.u32
load_matrix        ldmatrix.sync.aligned.m8n8.x1|x2|x4.[trans].shared|shared::cta.b16
store_matrix       stmatrix.sync.aligned.m8n8.x1|x2|x4.[trans].shared|shared::cta.b16
mma                mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
mma                mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
mma                mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32
mma                mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0
mma                mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0
wgmma              wgmma.mma_async.sync.aligned.{"|".join(f"m64n{n}k16" for n in range(8, 257, 8))}.f32.bf16.bf16
wgmma              wgmma.mma_async.sync.aligned.{"|".join(f"m64n{n}k16" for n in range(8, 257, 8))}.f32.f16.f16
wgmma              wgmma.mma_async.sync.aligned.{"|".join(f"m64n{n}k32" for n in range(8, 257, 8))}.f32.e4m3.e4m3
wgmma_commit       wgmma.commit_group.sync.aligned
wgmma_wait         wgmma.wait_group.sync.aligned
tcgen05_memory     tcgen05.ld|st.sync.aligned.32x32b|16x32bx2.x1|x2|x4|x8|x16|x32|x64|x128.b32
tcgen05_wait       tcgen05.wait::ld|wait::st.sync.aligned
tcgen05_allocate   tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32
tcgen05_allocate   tcgen05.dealloc.cta_group::1.sync.aligned.b32
tcgen05_product    tcgen05.mma.cta_group::1.kind::f16|kind::f8f6f4
tcgen05_product    tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32|scale_vec::1X
tcgen05_commit     tcgen05.commit.cta_group::1.mbarrier::arrive::one.[shared::cluster].b64
"""
CALLS = {
    name: method
    for method, pattern in (line.split() for line in _CALLS.strip().splitlines())
    for name in names_of(re.sub(r"\s", "", pattern))
}
"""What the machine does when it runs: the method, by the instruction's name."""
