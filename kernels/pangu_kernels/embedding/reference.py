"""Rows of an embedding table by PyTorch's own operations, which every accelerator has fused."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pangu_kernels.precision import widen


def forward(tokens: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(tokens, weight)


def backward(d_y: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    """`[num_rows, H]`: the sum of the rows of d_y `[T, H]` that have the same token, zero where there is none."""
    d_weight: Tensor = torch.ops.aten.embedding_dense_backward(widen(d_y), tokens, num_rows, -1, False)
    return d_weight.to(d_y.dtype)
