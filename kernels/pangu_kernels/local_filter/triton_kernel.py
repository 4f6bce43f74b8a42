# mypy: allow-untyped-defs
"""Two causal convolutions of two taps: Triton pairs every token with the one before it, PyTorch multiplies.

With pairs (x[t-1], x[t]) a convolution is one matmul instead of two, rounded once; with (d_y[t+1], d_y[t]), so is the
gradient of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pangu_kernels.local_filter import reference
from pangu_kernels.triton_support import supports
from pangu_kernels.triton_tiles import columns_from, own_rows, tile_shape


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    if not supports(x, weight1, weight2):
        return reference.forward(x, weight1, bias1, weight2, bias2, cu_seqlens)
    continues = _continues(cu_seqlens, x)
    hidden = torch.addmm(bias1.to(x.dtype), _pair(x, continues), _matrix(weight1, x).T)
    return torch.addmm(bias2.to(x.dtype), _pair(hidden, continues), _matrix(weight2, x).T), hidden


def backward(
    d_y: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not supports(d_y, x, hidden, weight1, weight2):
        return reference.backward(d_y, x, hidden, weight1, weight2, cu_seqlens)
    continues = _continues(cu_seqlens, x)
    d_hidden, d_weight2, d_bias2 = _convolve_backward(d_y, hidden, weight2, continues)
    d_x, d_weight1, d_bias1 = _convolve_backward(d_hidden, x, weight1, continues)
    return d_x, d_weight1, d_bias1, d_weight2, d_bias2


def _convolve_backward(d_y: Tensor, x: Tensor, weight: Tensor, continues: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    after_and_now = _pair(d_y, continues, offset=1)
    d_x = after_and_now @ weight.to(x.dtype).permute(2, 0, 1).flatten(0, 1)
    d_matrix = d_y.T @ _pair(x, continues)
    d_weight = d_matrix.unflatten(1, (2, -1)).transpose(1, 2)  # [out, in, 2]
    return d_x, d_weight.to(weight.dtype).contiguous(), d_y.sum(0).to(weight.dtype)


def _matrix(weight: Tensor, x: Tensor) -> Tensor:
    """`[out, in, 2]` as `[out, 2 in]`: what meets the token before, then what meets the token."""
    return weight.to(x.dtype).transpose(1, 2).flatten(1)


def _continues(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """int32 `[T]`: 0 where a document starts."""
    starts = reference.document_starts(cu_seqlens, x)
    return torch.ones(len(x), dtype=torch.int32, device=x.device).index_fill_(0, starts, 0)


def _pair(x: Tensor, continues: Tensor, offset: int = -1) -> Tensor:
    num_rows, size = x.shape
    pairs = x.new_empty((num_rows, 2 * size))
    tile = tile_shape(size)
    programs = triton.cdiv(num_rows, tile["ROWS"])
    pair_kernel[(programs,)](x, continues, pairs, num_rows, size, OFFSET=offset, **tile)
    return pairs


@triton.jit
def pair_kernel(x, continues, pairs, num_rows, size, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """pairs[t] = (x[t + OFFSET], x[t]) with 0 for a neighbour in another document; OFFSET is -1, or 1 for gradients."""
    row, row_exists = own_rows(num_rows, ROWS)
    later = row + (OFFSET + 1) // 2  # of the two tokens: where it starts a document they are strangers
    together = tl.load(continues + later, later < num_rows, 0) > 0
    for start in range(0, size, COLUMNS):
        column, column_exists = columns_from(start, size, COLUMNS)
        pair_at = row * (2 * size) + column
        neighbour = tl.load(x + (row + OFFSET) * size + column, together & column_exists, 0.0)
        own = tl.load(x + row * size + column, row_exists & column_exists, 0.0)
        tl.store(pairs + pair_at, neighbour, row_exists & column_exists)
        tl.store(pairs + pair_at + size, own, row_exists & column_exists)
