"""The table of tiles by rules of thumb: what a grouped product takes where nothing was measured.

`choice.grouped_matmul_config` looks a product up here and then applies the few rules that depend on more than the four
columns in front. `tritonmoe tune --show` prints the table.
"""

import dataclasses
import functools
from typing import NamedTuple

import torch

from tritonmoe.ops.kernels.tiles.config import TileConfig

__all__ = ["TABLE", "elements_of", "tile_of"]

TABLE = """\
family        elements  operation    height   block_m  block_n  block_k  num_warps  num_stages  group_m  subtiles  walks
interpreter   e4m3      down         any           32       32       64          4           1        2         1  no
interpreter   e4m3      any          any           32       32       64          4           1        2         2  no
amd           e4m3      up           16,32         32       32      128          4           2        8         1  no
amd           e4m3      any          16,32         32       64      128          4           2        8         1  no
amd           e4m3      up           any          128       64      128          8           2        8         4  no
amd           e4m3      down         any          128      128      128          8           2        8         1  no
amd           e4m3      any          any          128      128      128          8           2        8         4  no
any           e4m3      up           16,32         32       32      128          4           3        8         1  no
any           e4m3      any          16,32         32       64      128          4           3        8         1  no
any           e4m3      up           any          128       64      128          8           3        8         4  no
any           e4m3      down         any          128      128      128          8           3        8         1  no
any           e4m3      any          any          128      128      128          8           3        8         4  no
interpreter   any       down         16            16       32       16          4           1        2         1  no
interpreter   any       any          16            16       32       16          4           1        2         2  no
interpreter   any       down         any           32       32       32          4           1        2         1  no
interpreter   any       any          any           32       32       32          4           1        2         2  no
any           odd_fp32  up           any           64       32       16          8           2        8         2  no
any           odd_fp32  down         any           64       64       16          8           2        8         1  no
any           odd_fp32  any          any           64       64       16          8           2        8         2  no
any           odd_half  up           any           64       32       32          8           2        8         2  no
any           odd_half  down         any           64       64       32          8           2        8         1  no
any           odd_half  any          any           64       64       32          8           2        8         2  no
any           fp32      up           any          128       32       16          8           3        8         2  no
any           fp32      down         any          128       64       16          8           3        8         1  no
any           fp32      any          any          128       64       16          8           3        8         2  no
amd           half      up           16,32         32       32       64          4           2        8         1  no
amd           half      any          16,32         32       64       64          4           2        8         1  no
amd           half      up           any          128       64       64          8           2        8         4  no
amd           half      down         any          128      128       64          8           2        8         1  no
amd           half      any          any          128      128       64          8           2        8         4  no
sm_90,sm_100  half      up           16,32         32       32      128          4           4        8         1  no
sm_90,sm_100  half      any          16,32         32       64      128          4           4        8         1  no
any           half      up           16,32         32       32      128          4           3        8         1  no
any           half      any          16,32         32       64      128          4           3        8         1  no
sm_100        half      up           64            64      128       64          8           3        8         2  no
sm_100        half      down_grad    64            64      128       64          8           3        8         2  no
sm_90         half      up           64            64      128       64          8           3        8         4  no
sm_90         half      down_grad    64            64      128       64          8           3        8         4  no
sm_90,sm_100  half      up_ungated   64            64      256       64          8           3        8         4  no
sm_90,sm_100  half      down         64            64      256       64          8           3        8         1  no
sm_90,sm_100  half      up           any          128      128       64          8           3        8         4  yes
sm_90,sm_100  half      down_grad    any          128      128       64          8           3        8         4  yes
sm_90,sm_100  half      weight_grad  any          128      256       64          8           4        8         4  no
sm_90,sm_100  half      any          any          128      256       64          8           3        8         4  yes
sm_80         half      up           any          128       64       64          8           4        8         4  no
sm_80         half      down         any          128      128       64          8           4        8         1  no
sm_80         half      weight_grad  any          128      128       64          8           5        8         4  no
sm_80         half      any          any          128      128       64          8           4        8         4  no
any           half      up           any          128       64       64          8           3        8         4  no
any           half      down         any          128      128       64          8           3        8         1  no
any           half      weight_grad  any          128      128       64          8           4        8         4  no
any           half      any          any          128      128       64          8           3        8         4  no
"""
"""The first row that fits counts; a cell of the first four columns is "any", or the values that fit it.

family: "interpreter", or `tiles` of the GPU's row in `ops/kernels/gpus.py`.
elements: "e4m3" (codes of an ExpertPrecision: a step is as deep as a block of "fp8_block"), "half" (fp16 and bf16) or
    "fp32"; "odd_" where a row of the weight or of its gradient is no multiple of 8 elements, so that no vector load
    fits it and the address of every element takes registers.
operation: as `choice.grouped_matmul_config` takes it.
height: the rows that a tile may have, see `choice.tile_height`; of block_m no more are used.
walks: TileConfig.persistent. Such a tile has a multiprocessor to itself: no other program multiplies while it stores.
The other columns are fields of TileConfig.

Why these: tiles of 16 or 32 rows are narrow, because reading the weights is all their work, and many multiprocessors
should read. Three stages of the high ones fit the 99 KB of shared memory of sm_86, sm_89 and sm_120, and so do four of
weight_grad: a stage is a buffer where matrix instructions read shared memory, elsewhere one stage has none. The pieces
of the epilogue (subtiles) are as few as spill nothing: four of 64 rows spill 8 bytes a thread on sm_100; down, whose
accumulator is the smallest, stores a tile that doesn't walk at once.
"""
ANY = "any"


class _Row(NamedTuple):
    fits: tuple[tuple[str, ...], ...]
    """For family, elements, operation and height: the values that fit, or ("any",)."""
    tile: TileConfig


def _parse(table: str) -> tuple[_Row, ...]:
    rows = []
    for line in table.splitlines()[1:]:
        cells = line.split()
        persistent = {"yes": True, "no": False}[cells[-1]]
        block_m, block_n, block_k, num_warps, num_stages, group_m, subtiles = map(int, cells[4:-1])
        tile = TileConfig(block_m, block_n, block_k, num_warps, num_stages, group_m, subtiles, persistent)
        rows.append(_Row(tuple(tuple(cell.split(",")) for cell in cells[:4]), tile))
    return tuple(rows)


_ROWS = _parse(TABLE)


def elements_of(dtype: torch.dtype, width: int, depth: int) -> str:
    """Name the elements of a product with `width` columns and sums over `depth` as the table does."""
    if dtype == torch.float8_e4m3fn:
        return "e4m3"
    name = "fp32" if dtype == torch.float32 else "half"
    return f"odd_{name}" if width % 8 or depth % 8 else name


@functools.cache
def tile_of(family: str, elements: str, operation: str, height: int) -> TileConfig:
    """Return the tile of the first row that fits, no higher than `height`."""
    wanted = (family, elements, operation, str(height))
    for row in _ROWS:
        if all(value in fits or fits == (ANY,) for value, fits in zip(wanted, row.fits, strict=True)):
            return dataclasses.replace(row.tile, block_m=min(row.tile.block_m, height))
    raise KeyError(wanted)
