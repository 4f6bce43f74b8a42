# mypy: allow-untyped-defs
"""RMSNorm in Triton: two walks along the rows, one for the statistics and one for the results."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pangu_kernels.rms_norm import reference
from pangu_kernels.triton_support import supports
from pangu_kernels.triton_tiles import columns_from, load, own_rows, tile_shape

BACKWARD_ROWS = 8
"""Rows per program in backward: sums over them take 4 bytes a column, beside the 2 to 4 of each row's elements."""


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not supports(x, weight):
        return reference.forward(x, weight, eps)
    size = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    tile = tile_shape(size)
    programs = triton.cdiv(rstd.numel(), tile["ROWS"])
    forward_kernel[(programs,)](x, weight, y, rstd, rstd.numel(), size, eps, **tile)
    return y, rstd


def backward(d_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if not supports(d_y, x, weight, rstd):
        return reference.backward(d_y, x, weight, rstd)
    size = x.shape[-1]
    tile = tile_shape(size, BACKWARD_ROWS)
    programs = triton.cdiv(rstd.numel(), tile["ROWS"])
    d_x, d_weights = torch.empty_like(x), rstd.new_empty((programs, size))
    backward_kernel[(programs,)](d_y, x, weight, rstd, d_x, d_weights, rstd.numel(), size, **tile)
    return d_x, d_weights.sum(0).to(weight.dtype)


@triton.jit
def forward_kernel(x, weight, y, rstd, num_rows, size, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, row_exists = own_rows(num_rows, ROWS)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        x_tile = load(x + row * size + column, row_exists & column_exists)
        squares += x_tile * x_tile
    row_rstd = rstd_of(squares, size, eps)
    tl.store(rstd + row, row_rstd, row_exists)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        mask = row_exists & column_exists
        x_tile = load(x + row * size + column, mask)
        tl.store(y + row * size + column, x_tile * row_rstd * load(weight + column, column_exists), mask)


@triton.jit
def backward_kernel(d_y, x, weight, rstd, d_x, d_weights, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Also the sums of d_weight over this program's rows, d_weights `[programs, size]`: no atomics, always the same."""
    row, row_exists = own_rows(num_rows, ROWS)
    row_rstd = load(rstd + row, row_exists)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        mask = row_exists & column_exists
        normed = load(x + row * size + column, mask) * row_rstd
        d_weight = load(d_y + row * size + column, mask) * normed
        products += d_weight * load(weight + column, column_exists)
        store_row_sum(d_weights, d_weight, column, column_exists, size)
    projection = mean(products, size)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        mask = row_exists & column_exists
        at = row * size + column
        gain = load(weight + column, column_exists)
        gradient = through_norm(load(d_y + at, mask), load(x + at, mask), gain, row_rstd, projection)
        tl.store(d_x + at, gradient, mask)


@triton.jit
def through_norm(d_y, x, gain, rstd, projection):
    """d_x of a tile, with the row's mean of `d_y * gain * x * rstd` as projection."""
    return rstd * (d_y * gain - x * rstd * projection)


@triton.jit
def mean(values, size):
    """Of every row `[ROWS, 1]`."""
    return tl.sum(values, axis=1)[:, None] / size


@triton.jit
def rstd_of(squares, size, eps):
    return tl.rsqrt(mean(squares, size) + eps)


@triton.jit
def store_row_sum(sums, values, column, column_exists, size):
    """The sum over this program's rows into its own row of `sums`."""
    tl.store(sums + tl.program_id(0).to(tl.int64) * size + column, tl.sum(values, axis=0)[None, :], column_exists)
