# mypy: allow-untyped-defs
"""SwiGLU in Triton: one walk along the rows, with both halves at hand."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pangu_kernels.swiglu import reference
from pangu_kernels.triton_support import supports
from pangu_kernels.triton_tiles import columns_from, load, own_rows, tile_shape


def forward(x: Tensor) -> Tensor:
    if not supports(x):
        return reference.forward(x)
    num_rows, size = x.shape[0], x.shape[1] // 2
    y = x.new_empty((num_rows, size))
    tile = tile_shape(size)
    forward_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](x, y, num_rows, size, **tile)
    return y


def backward(d_y: Tensor, x: Tensor) -> Tensor:
    if not supports(d_y, x):
        return reference.backward(d_y, x)
    num_rows, size = d_y.shape
    d_x = torch.empty_like(x)
    tile = tile_shape(size)
    backward_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](d_y, x, d_x, num_rows, size, **tile)
    return d_x


@triton.jit
def forward_kernel(x, y, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, row_exists = own_rows(num_rows, ROWS)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        mask = row_exists & column_exists
        gate_at = row * (2 * size) + column
        gate, up = load(x + gate_at, mask), load(x + gate_at + size, mask)
        tl.store(y + row * size + column, gate * tl.sigmoid(gate) * up, mask)


@triton.jit
def backward_kernel(d_y, x, d_x, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, row_exists = own_rows(num_rows, ROWS)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        mask = row_exists & column_exists
        gate_at = row * (2 * size) + column
        gate, up = load(x + gate_at, mask), load(x + gate_at + size, mask)
        d_y_tile = load(d_y + row * size + column, mask)
        sigmoid = tl.sigmoid(gate)
        tl.store(d_x + gate_at, d_y_tile * up * sigmoid * (1 + gate * (1 - sigmoid)), mask)
        tl.store(d_x + gate_at + size, d_y_tile * gate * sigmoid, mask)
