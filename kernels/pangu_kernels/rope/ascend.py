"""Rotary position embedding on the NPU, by aclnnRotaryPositionEmbeddingV2 and aclnnRotaryPositionEmbeddingGrad.

They compute on cosines and sines in the dtype of x: torch_npu casts others with two launches per call, and beside a
bf16 x the tables are rounded to bf16, as published stacks do.
"""

import torch
from torch import Tensor

from pangu_kernels.ascend_support import fusible, warn_unfused
from pangu_kernels.rope import reference

MAX_HEAD_DIM = 894  # even and below 896
MAX_HEADS = 999


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not _fusible(x, cos, sin):
        return reference.forward(x, cos, sin)
    y: Tensor = torch.ops.npu.npu_rotary_mul(x.unsqueeze(0), _table(cos), _table(sin), "half")
    return y.squeeze(0)


def backward(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not _fusible(d_y, cos, sin):
        return reference.backward(d_y, cos, sin)
    batch = d_y.unsqueeze(0)
    # The second argument is the forward's input, read only for gradients of the tables.
    d_x, _, _ = torch.ops.npu.npu_rotary_mul_backward(batch, batch, _table(cos), _table(sin), "half")
    return d_x.squeeze(0)


def _fusible(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    _, heads, head_dim = x.shape
    if head_dim > MAX_HEAD_DIM:
        warn_unfused("rope", f"x has a head dimension of {head_dim}, the fused one takes up to {MAX_HEAD_DIM}")
        return False
    if heads > MAX_HEADS:
        warn_unfused("rope", f"x has {heads} heads, the fused one takes up to {MAX_HEADS}")
        return False
    return fusible("rope", x=x, cos=cos, sin=sin)


def _table(table: Tensor) -> Tensor:
    """`[T, D]` as `[1, T, 1, D]`, beside x as `[1, T, heads, D]`: the layout BSND, which every release takes."""
    return table[None, :, None]
