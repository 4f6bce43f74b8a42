# mypy: allow-untyped-defs
"""The one shape of most kernels: a program owns a few whole rows of a matrix and walks along them in tiles.

A tile holds 2048 numbers, 8 KB in fp32, however long the rows. Registers of a GPU and the 192 KB unified buffer of an
Ascend vector core hold as many tiles as any kernel here uses, so there is no limit on the size of a row; what a kernel
reads twice, it reads from the cache the second time.
"""

import triton
import triton.language as tl

TILE = 2048
_NARROWEST = 8
"""Columns of a tile at least: a row of a tile takes 32 bytes of the unified buffer even if it is shorter."""


def tile_shape(size: int, rows: int = 1) -> dict[str, int]:
    """The constants of a kernel over rows of `size` numbers: at least `rows` rows together, more if they are short."""
    columns = min(max(triton.next_power_of_2(size), _NARROWEST), TILE // rows)
    return {"ROWS": TILE // columns, "COLUMNS": columns}


@triton.jit
def own_rows(num_rows, ROWS: tl.constexpr):
    """Indices of this program's rows and which of them exist `[ROWS, 1]`; int64, since they are to be multiplied."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row < num_rows


@triton.jit
def columns_from(start, size, COLUMNS: tl.constexpr):
    """Indices of a tile's columns and which of them exist `[1, COLUMNS]`."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    return column, column < size


@triton.jit
def load(pointer, mask):
    """In fp32; 0 where masked."""
    return tl.load(pointer, mask, 0.0).to(tl.float32)
