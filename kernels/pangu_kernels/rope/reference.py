"""Rotary position embedding by PyTorch operations, computed in fp32 at least.

With (a, b) the halves of a head and likewise of cos and sin:

    (a', b') = (a * cos_a - b * sin_a,  b * cos_b + a * sin_b)
"""

import torch
from torch import Tensor

from pangu_kernels.precision import accumulation_dtype


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    half = x.shape[-1] // 2
    wide_x, wide_cos, wide_sin = x.to(dtype), cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.mul(wide_x, wide_cos, out=y)
    y[..., :half].addcmul_(wide_x[..., half:], wide_sin[..., :half], value=-1)
    y[..., half:].addcmul_(wide_x[..., :half], wide_sin[..., half:])
    return y.to(x.dtype)


def backward(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transposed rotation: the sines change sign and halves."""
    first, second = sin.chunk(2, dim=-1)
    return forward(d_y, cos, torch.cat((-second, -first), dim=-1))
