# mypy: allow-untyped-defs
"""The sandwich norm in Triton: one kernel forward, one backward; each norm takes one more walk along the rows.

Sums that a walk needs of the one before are recomputed, not read back: what another thread has written is not yet
visible inside a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pangu_kernels.rms_norm.triton_kernel import BACKWARD_ROWS, mean, rstd_of, store_row_sum, through_norm
from pangu_kernels.sandwich_norm import reference
from pangu_kernels.triton_support import supports
from pangu_kernels.triton_tiles import columns_from, load, own_rows, tile_shape


def forward(
    residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not supports(residual, y, post_weight, pre_weight):
        return reference.forward(residual, y, post_weight, pre_weight, eps)
    num_rows, size = residual.shape
    new_residual = torch.empty_like(residual)
    normed = residual.new_empty(0 if pre_weight is None else residual.shape)
    post_rstd = residual.new_empty(0 if post_weight is None else (num_rows, 1), dtype=torch.float32)
    pre_rstd = residual.new_empty(0 if pre_weight is None else (num_rows, 1), dtype=torch.float32)
    tile = tile_shape(size)
    programs = triton.cdiv(num_rows, tile["ROWS"])
    inputs, outputs = (residual, y, post_weight, pre_weight), (new_residual, normed, post_rstd, pre_rstd)
    forward_kernel[(programs,)](*inputs, *outputs, num_rows, size, eps, **tile)
    return new_residual, normed, post_rstd, pre_rstd


def backward(
    d_new_residual: Tensor | None,
    d_normed: Tensor | None,
    y: Tensor | None,
    new_residual: Tensor | None,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    post_rstd: Tensor,
    pre_rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (d_new_residual, d_normed, y, new_residual, post_weight, pre_weight, post_rstd, pre_rstd)
    like = y if new_residual is None else new_residual
    if like is None or not supports(like, *inputs[:6]):
        return reference.backward(*inputs)
    num_rows, size = like.shape
    tile = tile_shape(size, BACKWARD_ROWS)
    programs = triton.cdiv(num_rows, tile["ROWS"])
    d_residual = pre_rstd.new_empty(0) if pre_weight is None else torch.empty_like(like)
    d_y = post_rstd.new_empty(0) if post_weight is None else torch.empty_like(like)
    d_post_weights = post_rstd.new_empty((programs, 0 if post_weight is None else size))
    d_pre_weights = pre_rstd.new_empty((programs, 0 if pre_weight is None else size))
    outputs = (d_residual, d_y, d_post_weights, d_pre_weights)
    backward_kernel[(programs,)](*inputs, *outputs, num_rows, size, **tile)
    return d_residual, d_y, _sum(d_post_weights, post_weight), _sum(d_pre_weights, pre_weight)


def _sum(d_weights: Tensor, weight: Tensor | None) -> Tensor:
    return d_weights.new_empty(0) if weight is None else d_weights.sum(0).to(weight.dtype)


@triton.jit
def forward_kernel(
    residual,
    y,
    post_weight,  # None without a post-norm: what concerns it is not compiled then; likewise for the pre-norm
    pre_weight,
    new_residual,
    normed,
    post_rstd,
    pre_rstd,
    num_rows,
    size,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, row_exists = own_rows(num_rows, ROWS)
    row_post_rstd = tl.full((ROWS, 1), 1.0, tl.float32)
    if post_weight is not None:
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, size, COLUMNS):
            column, column_exists = columns_from(start, size, COLUMNS)
            y_tile = load(y + row * size + column, row_exists & column_exists)
            squares += y_tile * y_tile
        row_post_rstd = rstd_of(squares, size, eps)
        tl.store(post_rstd + row, row_post_rstd, row_exists)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        at, mask = row * size + column, row_exists & column_exists
        total = _residual_plus(residual + at, y + at, mask, post_weight, column, column_exists, row_post_rstd)
        tl.store(new_residual + at, total, mask)
        squares += total.to(tl.float32) * total.to(tl.float32)
    if pre_weight is not None:
        row_pre_rstd = rstd_of(squares, size, eps)
        tl.store(pre_rstd + row, row_pre_rstd, row_exists)
        for start in range(0, size, COLUMNS):
            column, column_exists = columns_from(start, size, COLUMNS)
            at, mask = row * size + column, row_exists & column_exists
            total = _residual_plus(residual + at, y + at, mask, post_weight, column, column_exists, row_post_rstd)
            gain = load(pre_weight + column, column_exists)
            tl.store(normed + at, total.to(tl.float32) * row_pre_rstd * gain, mask)


@triton.jit
def _residual_plus(residual, y, mask, post_weight, column, column_exists, row_post_rstd):
    """A tile of new_residual in its own dtype: backward knows no more digits of it, so the pre-norm gets no more."""
    addend = load(y, mask)
    if post_weight is not None:
        addend = addend * row_post_rstd * load(post_weight + column, column_exists)
    return (load(residual, mask) + addend).to(residual.dtype.element_ty)


@triton.jit
def backward_kernel(
    d_new_residual,
    d_normed,
    y,
    new_residual,
    post_weight,
    pre_weight,
    post_rstd,
    pre_rstd,
    d_residual,
    d_y,
    d_post_weights,
    d_pre_weights,
    num_rows,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_post_weights and d_pre_weights `[programs, size]` are sums over each program's rows."""
    row, row_exists = own_rows(num_rows, ROWS)
    row_pre_rstd = tl.zeros((ROWS, 1), tl.float32)
    pre_projection = tl.zeros((ROWS, 1), tl.float32)
    if pre_weight is not None:
        row_pre_rstd = load(pre_rstd + row, row_exists)
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, size, COLUMNS):
            column, column_exists = columns_from(start, size, COLUMNS)
            at, mask = row * size + column, row_exists & column_exists
            d_weight = load(d_normed + at, mask) * load(new_residual + at, mask) * row_pre_rstd
            products += d_weight * load(pre_weight + column, column_exists)
            store_row_sum(d_pre_weights, d_weight, column, column_exists, size)
        pre_projection = mean(products, size)
    if post_weight is not None:
        row_post_rstd = load(post_rstd + row, row_exists)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        at, mask = row * size + column, row_exists & column_exists
        d_total = _d_new_residual(
            d_new_residual, d_normed, new_residual, pre_weight, at, mask, column, row_pre_rstd, pre_projection, size
        )
        if pre_weight is not None:
            tl.store(d_residual + at, d_total, mask)
        if post_weight is not None:
            d_weight = d_total * load(y + at, mask) * row_post_rstd
            products += d_weight * load(post_weight + column, column_exists)
            store_row_sum(d_post_weights, d_weight, column, column_exists, size)
    if post_weight is not None:
        post_projection = mean(products, size)
        for start in range(0, size, COLUMNS):
            column, column_exists = columns_from(start, size, COLUMNS)
            at, mask = row * size + column, row_exists & column_exists
            d_total = _d_new_residual(
                d_new_residual, d_normed, new_residual, pre_weight, at, mask, column, row_pre_rstd, pre_projection, size
            )
            gain = load(post_weight + column, column_exists)
            tl.store(d_y + at, through_norm(d_total, load(y + at, mask), gain, row_post_rstd, post_projection), mask)


@triton.jit
def _d_new_residual(direct, d_normed, new_residual, pre_weight, at, mask, column, row_pre_rstd, pre_projection, size):
    """A tile of the whole gradient of new_residual: what came to it directly and what comes through the pre-norm."""
    total = tl.zeros(mask.shape, tl.float32)
    if direct is not None:
        total += load(direct + at, mask)
    if pre_weight is not None:
        gain = load(pre_weight + column, column < size)
        d_tile, tile = load(d_normed + at, mask), load(new_residual + at, mask)
        total += through_norm(d_tile, tile, gain, row_pre_rstd, pre_projection)
    return total
