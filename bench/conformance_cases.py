"""Small products and transpositions, and what a Triton makes of each for a card, run on the virtual GPU.

Operands are chosen so that every sum is exact in fp32: results are equal to float64's to the bit, or wrong.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmoe.ops.aot.compilation import compile_unchecked
from tritonmoe.ops.aot.machine_code import read_amd, read_nvidia
from tritonmoe.ops.kernels.gpus import architecture_named
from tritonmoe.ops.kernels.launch import Launch
from virtual_gpu.faults import Deadlock, MemoryFault
from virtual_gpu.launcher import run_launch

__all__ = ["CASES", "Case", "e4m3_of", "exact_operands", "factors_of", "outcome_of", "random_scales"]

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
CARDS = (*NVIDIA, "gfx942", "gfx950")
FP8_CARDS = CARDS[1:]
TMA_CARDS = ("sm_90", "sm_100", "sm_120")
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
UNSEEN = 12345.0
"""What outputs hold before a kernel: no result has it."""


@dataclass(frozen=True)
class Case:
    """One kernel: its operation, the format of its numbers, how it reads them, tile, warps."""

    operation: str
    """dot, "dot, scaled blocks" (the sum of 128 of the depth times factors), dot_scaled, "dot_scaled of a batch", "two
    dots" (into one sum), trans, or "quantise, trans"."""
    format: str
    layout: str = "depth last"
    tile: tuple[int, int, int] = (128, 64, 128)
    """Rows, columns, depth of a step."""
    warps: int = 8
    stages: int = 2
    scales: str = ""
    """Of dot_scaled: "" for several sizes, else what is among them."""
    cards: tuple[str, ...] = FP8_CARDS
    cost: bool = False
    """Whether only its machine code is read: what spills, and how many instructions its loop has."""

    @property
    def name(self) -> str:
        """Return the case's name, for a line of a table."""
        sizes = self.tile[:2] if "trans" in self.operation else self.tile
        size = f"{'x'.join(map(str, sizes))}, {self.warps} warps"
        parts = [f"{self.operation} of {self.format}", self.layout, self.scales, size]
        return ", ".join(filter(None, parts))


def _products() -> list[Case]:
    pointers, both = ("depth last", "w depth first", "both depth first"), ("TMA, `.T`", "TMA, w depth first")
    cases = []
    for name in ("fp16", "bf16", "e4m3"):
        cards = FP8_CARDS if name == "e4m3" else CARDS
        cases += [Case("dot", name, layout, cards=cards) for layout in pointers]
        cases += [Case("dot", name, layout, (64, 32, 64), 4, cards=cards) for layout in pointers[:2]]
        cases += [Case("dot", name, layout, cards=TMA_CARDS) for layout in both]
        cases += [Case("dot", name, both[0], (64, 64, 64), 4, cards=TMA_CARDS)]
        cases += [Case("two dots", name, tile=(128, 64, 64), warps=4, stages=3, cards=cards)]
        cases += [Case("two dots", name, both[0], (128, 64, 64), 4, 3, cards=TMA_CARDS)]
    cases += [Case("dot, scaled blocks", "e4m3"), Case("dot, scaled blocks", "e4m3", both[0], cards=TMA_CARDS)]
    cases += [Case("dot_scaled", "e4m3", layout) for layout in pointers]
    cases += [Case("dot_scaled", "e4m3", tile=(128, 32, 64), warps=4)]
    cases += [Case("dot_scaled", "e4m3", layout, cards=TMA_CARDS) for layout in both]
    cases += [Case("dot_scaled", "e4m3", scales=special) for special in ("scale byte 0", "scale byte 255")]
    cases += [Case("dot_scaled", "e2m1", packing) for packing in ("packed along depth", "packed along rows")]
    cases += [Case("dot_scaled", "e2m1", "packed along rows", (128, 128, 128))]
    cases += [Case("dot_scaled of a batch", "e4m3", tile=(64, 32, 64), warps=4)]
    cases += [Case("dot", "bf16", "TMA gather, ragged depth", (128, 64, 64), cards=("sm_100",))]
    return cases


def _transpositions() -> list[Case]:
    cases = []
    for name in ("fp16", "bf16", "e4m3"):
        cards = FP8_CARDS if name == "e4m3" else CARDS
        cases += [Case("trans", name, "pointers", cards=cards)]
        cases += [Case("trans", name, "pointers", (64, 32, 32), 4, cards=cards)]
        cases += [Case("trans", name, "TMA", cards=TMA_CARDS)]
    return [
        *cases,
        Case("quantise, trans", "e4m3", "pointers"),
        Case("quantise, trans", "e4m3", "pointers", (32, 32, 32), 1),
    ]


CASES = (
    *_products(),
    *_transpositions(),
    Case("dot, scaled blocks", "e4m3", tile=(128, 128, 128), stages=3, cards=("sm_89",), cost=True),
    Case("dot", "bf16", "both depth first", (256, 256, 64), cards=("gfx942",), cost=True),
)


def _product(
    x, xs, w, ws, out, depth, x_row, x_depth, w_row, w_depth, width,
    OPERATION: tl.constexpr, FORMAT: tl.constexpr, K_PACK: tl.constexpr,
    TMA: tl.constexpr, GATHER: tl.constexpr, W_FIRST: tl.constexpr,
    X_ROWS: tl.constexpr, W_ROWS: tl.constexpr, X_STEP: tl.constexpr, W_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply x (BLOCK_M, depth) by w (BLOCK_N, depth); X_ROWS, X_STEP: a tile of x as it is stored."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x_at = x
    w_at = w
    if not TMA:
        x_at = x + tl.arange(0, X_ROWS)[:, None] * x_row + tl.arange(0, X_STEP)[None, :] * x_depth
        w_at = w + tl.arange(0, W_ROWS)[None, :] * w_row + tl.arange(0, W_STEP)[:, None] * w_depth
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    half = depth // 2 if OPERATION == "two dots" else depth
    for start in range(0, half, BLOCK_K):
        x_start = start // (BLOCK_K // X_STEP)
        w_start = start // (BLOCK_K // W_STEP)
        if TMA:
            if GATHER:
                left = x_at.gather(BLOCK_M - 1 - m, start)
            else:
                left = x_at.load([0, start])
            right = w_at.load([start, 0]) if W_FIRST else w_at.load([0, start]).T
        else:
            left = tl.load(x_at + x_start * x_depth)
            right = tl.load(w_at + w_start * w_depth)
        if OPERATION == "dot_scaled":
            blocks = start // 32 + tl.arange(0, BLOCK_K // 32)
            x_scales = tl.load(xs + m[:, None] * (depth // 32) + blocks[None, :])
            w_scales = tl.load(ws + n[:, None] * (depth // 32) + blocks[None, :])
            sums = tl.dot_scaled(
                left, x_scales, FORMAT, right, w_scales, FORMAT, sums, lhs_k_pack=K_PACK, rhs_k_pack=K_PACK
            )
        elif OPERATION == "dot, scaled blocks":
            place = start // BLOCK_K
            x_factors = tl.load(xs + m * (depth // BLOCK_K) + place)
            w_factors = tl.load(ws + n * (depth // BLOCK_K) + place)
            sums += tl.dot(left, right) * (x_factors[:, None] * w_factors[None, :])
        else:
            sums = tl.dot(left, right, sums)
            if OPERATION == "two dots":
                if TMA:
                    left = x_at.load([0, half + start])
                    right = w_at.load([0, half + start]).T
                else:
                    left = tl.load(x_at + (half + start) * x_depth)
                    right = tl.load(w_at + (half + start) * w_depth)
                sums = tl.dot(left, right, sums)
    tl.store(out + m[:, None] * width + n[None, :], sums)


def _batched(x, xs, w, ws, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Multiply two x (ROWS, DEPTH) by two w (COLUMNS, DEPTH) with scales, in one operation of three axes."""
    b = tl.arange(0, 2)[:, None, None]
    m, n, k, block = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH), tl.arange(0, DEPTH // 32)
    left = tl.load(x + (b * ROWS + m[None, :, None]) * DEPTH + k[None, None, :])
    right = tl.load(w + (b * COLUMNS + n[None, None, :]) * DEPTH + k[None, :, None])
    x_scales = tl.load(xs + (b * ROWS + m[None, :, None]) * (DEPTH // 32) + block[None, None, :])
    w_scales = tl.load(ws + (b * COLUMNS + n[None, :, None]) * (DEPTH // 32) + block[None, None, :])
    sums = tl.dot_scaled(left, x_scales, "e4m3", right, w_scales, "e4m3")
    tl.store(out + (b * ROWS + m[None, :, None]) * COLUMNS + n[None, None, :], sums)


def _transposition(
    x, out, transposed, limit, TMA: tl.constexpr, QUANTISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store x (ROWS, COLUMNS) and its transpose; QUANTISE: rounded to 8 bits, what is too large brought to `limit`."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = row[:, None] * COLUMNS + column[None, :]
    tile = x.load([0, 0]) if TMA else tl.load(x + place)
    if QUANTISE:
        tile = tl.minimum(tile, limit, propagate_nan=tl.PropagateNan.ALL)
        tile = tl.maximum(tile, -limit, propagate_nan=tl.PropagateNan.ALL).to(out.dtype.element_ty)
    tl.store(out + place, tile)
    tl.store(transposed + column[:, None] * ROWS + row[None, :], tl.trans(tile))


PRODUCT, BATCHED, TRANSPOSITION = map(triton.JITFunction, (_product, _batched, _transposition))


def e4m3_of(card: str) -> torch.dtype:
    """Return the e4m3 that a card's products take."""
    return torch.float8_e4m3fnuz if card == "gfx942" else torch.float8_e4m3fn


def _dtype(name: str, card: str) -> torch.dtype:
    return e4m3_of(card) if name == "e4m3" else {"fp16": torch.float16, "bf16": torch.bfloat16}[name]


def _numbers(generator: torch.Generator, *shape: int) -> Tensor:
    size = torch.randint(8, 16, shape, generator=generator) / 8
    size *= 2.0 ** torch.randint(-1, 1, shape, generator=generator)
    return size * (1 - 2 * torch.randint(0, 2, shape, generator=generator))


def _codes(dtype: torch.dtype) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[every.isfinite()]


def _operands(case: Case, card: str, depth: int) -> tuple[Tensor, Tensor]:
    rows, columns, _ = case.tile
    card = "" if case.operation == "dot_scaled" else card  # which takes one e4m3 on every card
    dtype = _dtype(case.format, card)
    if case.scales == "scale byte 0":  # what is exact even where 2^-127 makes it a subnormal number of bf16
        generator = torch.Generator().manual_seed(0)
        x, w = _numbers(generator, rows, depth), _numbers(generator, columns, depth)
        return x.sign().to(dtype), w.to(dtype)
    return exact_operands(rows, columns, depth, dtype, _codes(e4m3_of(card)))


def exact_operands(rows: int, columns: int, depth: int, dtype: torch.dtype, every: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and w whose sums are exact in fp32.

    Of even depths columns choose one number of `every` each, of odd ones they add small numbers. The last row of x
    holds a NaN.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = _numbers(generator, rows, depth), _numbers(generator, columns, depth)
    x[:, ::2] = every[torch.randint(0, len(every), (rows, (depth + 1) // 2), generator=generator)]
    w[:, ::2] = 0
    w[::2] = 0
    chosen = torch.arange(0, columns, 2)
    w[chosen, (37 * chosen * 2) % depth // 2 * 2] = 0.5
    x[-1, depth // 3] = torch.nan
    return x.to(dtype), w.to(dtype)


def _packed(codes: Tensor, dim: int) -> Tensor:
    """Return two numbers of 4 bits a byte, the first one in its low half."""
    low, high = codes.unfold(dim, 2, 2).unbind(-1)
    return (low | high << 4).contiguous()


def random_scales(generator: torch.Generator, *shape: int) -> Tensor:
    """Return bytes of e8m0 that stand for 0.25 to 2."""
    return torch.randint(125, 129, shape, generator=generator, dtype=torch.uint8)


def factors_of(scales: Tensor) -> Tensor:
    """Return what bytes of e8m0 stand for, once for each of the 32 numbers of a block."""
    return torch.where(scales == 255, torch.nan, torch.exp2(scales.double() - 127)).repeat_interleave(32, -1)


def _options(case: Case) -> dict[str, Any]:
    return {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}


def _product_launch(case: Case, card: str) -> tuple[Launch, list[tuple[Tensor, Tensor]]]:
    rows, columns, step = case.tile
    ragged = "ragged" in case.layout
    depth = 2 * step - 16 if ragged else (4 if case.operation == "two dots" else 2) * step
    constants: dict[str, Any] = {"OPERATION": case.operation, "FORMAT": case.format, "K_PACK": True}
    constants |= {
        "X_ROWS": rows,
        "W_ROWS": columns,
        "X_STEP": step,
        "W_STEP": step,
        "TMA": False,
        "GATHER": False,
        "W_FIRST": False,
    }
    constants |= {f"BLOCK_{name}": size for name, size in zip("MNK", case.tile, strict=True)}
    generator = torch.Generator().manual_seed(1)
    if case.format == "e2m1":
        codes = [torch.randint(0, 16, (n, depth), generator=generator, dtype=torch.uint8) for n in (rows, columns)]
        left, right = (FP4_VALUES[(one & 7).long()].double() * (1 - 2.0 * (one >> 3)) for one in codes)
        by_depth = case.layout == "packed along depth"
        x, w = (_packed(one, 1 if by_depth else 0) for one in codes)
        constants["K_PACK"] = by_depth
        for name in ("X_STEP", "W_STEP") if by_depth else ("X_ROWS", "W_ROWS"):
            constants[name] //= 2
        if not by_depth:  # so that packed bytes are contiguous along rows, as of an operand that is stored depth first
            x, w = x.T.contiguous().T, w.T.contiguous().T
    else:
        x, w = _operands(case, card, depth)
        left, right = x.double(), w.double()
        if "both depth first" in case.layout:
            x = x.T.contiguous().T
        if "depth first" in case.layout:
            w = w.T.contiguous().T
    xs = ws = None
    if case.operation == "dot_scaled":
        xs, ws = (random_scales(generator, n, depth // 32) for n in (rows, columns))
        if case.scales == "scale byte 0":
            xs, ws = torch.zeros_like(xs), ws + 126  # at most 254: the product of both is an ordinary number
        if case.scales == "scale byte 255":
            ws[columns - 1, 1] = 255
        left, right = left * factors_of(xs), right * factors_of(ws)
    if case.operation == "dot, scaled blocks":
        xs, ws = (2.0 ** torch.randint(-2, 2, (n, depth // step), generator=generator) for n in (rows, columns))
        left = left * xs.double().repeat_interleave(step, 1)
        right = right * ws.double().repeat_interleave(step, 1)
    strides = (*x.stride(), *w.stride())
    x_source, w_source = x, w
    if case.layout.startswith("TMA"):
        gathers, w_first = "gather" in case.layout, "depth first" in case.layout
        constants |= {"TMA": True, "GATHER": gathers, "W_FIRST": w_first}
        x_source = TensorDescriptor.from_tensor(x, [1 if gathers else rows, step])
        stored = w.T if w_first else w
        w_source = TensorDescriptor.from_tensor(stored, [step, columns] if w_first else [columns, step])
        left = left.flip(0) if gathers else left
    out = torch.full((rows, columns), UNSEEN)
    args = (x_source, xs, w_source, ws, out, depth, *strides, columns)
    return Launch(PRODUCT, (1,), args, constants, _options(case)), [(out, (left @ right.T).float())]


def _batched_launch(case: Case, card: str) -> tuple[Launch, list[tuple[Tensor, Tensor]]]:
    rows, columns, depth = case.tile
    generator = torch.Generator().manual_seed(3)
    x, w = (_numbers(generator, 2, n, depth).to(torch.float8_e4m3fn) for n in (rows, columns))
    xs, ws = (random_scales(generator, 2, n, depth // 32) for n in (rows, columns))
    left, right = (one.double() * factors_of(scales) for one, scales in ((x, xs), (w, ws)))
    out = torch.full((2, rows, columns), UNSEEN)
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
    launch = Launch(BATCHED, (1,), (x, xs, w, ws, out), constants, _options(case))
    return launch, [(out, (left @ right.mT).float())]


def _transposition_launch(case: Case, card: str) -> tuple[Launch, list[tuple[Tensor, Tensor]]]:
    rows, columns, _ = case.tile
    dtype = _dtype(case.format, card)
    generator = torch.Generator().manual_seed(2)
    every, quantise = _codes(e4m3_of(card)), case.operation == "quantise, trans"
    limit = float(every.max())
    x = every[torch.randint(0, len(every), (rows, columns), generator=generator)]
    x[0, 1], x[1, 0] = (torch.nan, 2 * limit) if quantise else (x[0, 1], x[1, 0])
    x = x if quantise else x.to(dtype)
    out, transposed = torch.full((rows, columns), 1.0).to(dtype), torch.full((columns, rows), 1.0).to(dtype)
    wanted = x.clamp(-limit, limit).to(dtype) if quantise else x
    source = TensorDescriptor.from_tensor(x, [rows, columns]) if case.layout == "TMA" else x
    constants = {"TMA": case.layout == "TMA", "QUANTISE": quantise, "ROWS": rows, "COLUMNS": columns}
    launch = Launch(TRANSPOSITION, (1,), (source, out, transposed, limit), constants, _options(case))
    return launch, [(out, wanted), (transposed, wanted.T)]


LAUNCHES = {
    "dot_scaled of a batch": _batched_launch,
    "trans": _transposition_launch,
    "quantise, trans": _transposition_launch,
}
"""By operation; _product_launch makes the others."""


def _matrix_instruction(assembly: str) -> str:
    """Name the matrix instruction of an assembly; empty where there is none."""
    pattern = r"\b(mma\.sync\S+|wgmma\.mma_async\S+|tcgen05\.mma\S+|v_mfma\w+)"
    found = Counter(re.findall(pattern, assembly)).most_common(1)
    return found[0][0] if found else ""


def _cost(launch: Launch, card: str) -> dict[str, Any]:
    assembly = compile_unchecked(launch, architecture_named(card).target).asm
    code = read_nvidia(assembly["cubin"], assembly["ptx"]) if "cubin" in assembly else read_amd(assembly["amdgcn"])
    return {"outcome": "compiles", "registers": code.registers, "spills": code.spills, "loop": code.loop["all"]}


def outcome_of(case: Case, card: str) -> dict[str, Any]:
    """Return what Triton's code of a case does on the card.

    "outcome" is exact, wrong, "not compiled", "not known" (an instruction that the virtual GPU doesn't know) or
    "fault" (an order or an address that it refuses), and "detail" says more. Of a case's cost: compiles, with its
    registers, spills and the instructions of its loop.
    """
    launch, results = LAUNCHES.get(case.operation, _product_launch)(case, card)
    texts: list[str] = []

    def keep(assembly: str) -> str:
        texts.append(assembly)
        return assembly

    try:
        if case.cost:
            return _cost(launch, card)
        run_launch(launch, architecture_named(card).target, keep)
    except (MemoryFault, Deadlock) as error:
        return {"outcome": "fault", "detail": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip()
        return {"outcome": "not known" if texts else "not compiled", "detail": reason.splitlines()[-1][:300]}
    matrix = _matrix_instruction(texts[0])
    found = {"matrix": matrix} if matrix else {}
    pairs = [(out.float().nan_to_num(UNSEEN / 3), wanted.float().nan_to_num(UNSEEN / 3)) for out, wanted in results]
    num_wrong = sum(int((out != wanted).sum()) for out, wanted in pairs)
    if num_wrong:
        num = sum(out.numel() for out, _ in pairs)
        return {"outcome": "wrong", "detail": f"{num_wrong} of {num} numbers differ", **found}
    return {"outcome": "exact", **found}
