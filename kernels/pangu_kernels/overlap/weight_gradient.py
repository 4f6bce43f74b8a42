"""The gradient of a linear layer's weight, without a detour through the lower precision of the activations."""

import torch
from torch import Tensor


def weight_gradient(d_y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`d_y^T x` `[N, K]` in `dtype`, of d_y `[T, N]` and x `[T, K]`."""
    if torch.promote_types(dtype, x.dtype) == x.dtype:
        return (d_y.t() @ x).to(dtype)
    if x.device.type in ("cuda", "npu") and dtype == torch.float32:
        return torch.mm(d_y.t(), x, out_dtype=dtype)
    return d_y.t().to(dtype) @ x.to(dtype)
