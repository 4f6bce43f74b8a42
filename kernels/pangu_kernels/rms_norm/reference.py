"""RMSNorm by PyTorch operations, with the statistics in fp32 (fp64 for fp64):

rstd = 1 / sqrt(mean(x^2) + eps)
y    = x * rstd * weight
"""

import torch
from torch import Tensor

from pangu_kernels.precision import widen


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide_x = widen(x)
    # A norm reads x once and writes nothing of its size; squaring and averaging would take two passes.
    norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
    return (wide_x * rstd).mul_(weight).to(x.dtype), rstd


def backward(d_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """d_x and d_weight by

    d_x      = rstd * (weight * d_y - x * rstd^2 * mean(weight * d_y * x))
    d_weight = sum over tokens of d_y * x * rstd
    """
    wide_x, wide_d_y = widen(x), widen(d_y)
    wide_weight = weight.to(wide_x.dtype)
    product = wide_d_y * wide_x  # both sums over d_y * x are matrix-vector products with it
    d_weight = rstd.flatten() @ product.flatten(0, -2)
    projection = (product @ wide_weight).unsqueeze(-1) * rstd.pow(3) / x.shape[-1]  # [..., 1]
    d_x = (wide_d_y * wide_weight).mul_(rstd).addcmul_(wide_x, projection, value=-1)
    return d_x.to(x.dtype), d_weight.to(weight.dtype)
