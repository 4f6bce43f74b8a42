# mypy: allow-untyped-defs
"""Rotary position embedding in Triton: a program turns the heads of one token and reads its cosines once."""

import triton
import triton.language as tl
from torch import Tensor

from pangu_kernels.rope import reference
from pangu_kernels.triton_support import supports
from pangu_kernels.triton_tiles import load, tile_shape


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not _supports(x, cos, sin):
        return reference.forward(x, cos, sin)
    return _rotate(x, cos, sin, transposed=False)


def backward(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not _supports(d_y, cos, sin):
        return reference.backward(d_y, cos, sin)
    return _rotate(d_y, cos, sin, transposed=True)


def _supports(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """x may be a slice of a larger tensor, its last dimension contiguous; half a head must fit a tile."""
    half = x.shape[2] // 2
    return supports(x[:1, :1], cos, sin) and half <= tile_shape(half)["COLUMNS"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    y = x.new_empty(x.shape)
    num_tokens, heads, head_dim = x.shape
    tile = tile_shape(head_dim // 2)
    rotate_kernel[(num_tokens,)](x, cos, sin, y, heads, head_dim, x.stride(0), x.stride(1), transposed, **tile)
    return y


@triton.jit
def rotate_kernel(
    x,
    cos,
    sin,
    y,
    heads,
    head_dim,
    token_stride,
    head_stride,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile is ROWS heads by one half of each; `_first` and `_second` are the halves."""
    token = tl.program_id(0).to(tl.int64)
    half = head_dim // 2
    column = tl.arange(0, COLUMNS)[None, :]
    column_exists = column < half
    angle_at = token * head_dim + column
    cos_first, cos_second = load(cos + angle_at, column_exists), load(cos + angle_at + half, column_exists)
    sin_first, sin_second = load(sin + angle_at, column_exists), load(sin + angle_at + half, column_exists)
    if TRANSPOSED:
        sin_first, sin_second = -sin_second, -sin_first
    for start in range(0, heads, ROWS):
        head = start + tl.arange(0, ROWS)[:, None]
        mask = (head < heads) & column_exists
        x_at = token * token_stride + head * head_stride + column
        first, second = load(x + x_at, mask), load(x + x_at + half, mask)
        y_at = (token * heads + head) * head_dim + column
        tl.store(y + y_at, first * cos_first - second * sin_first, mask)
        tl.store(y + y_at + half, second * cos_second + first * sin_second, mask)
