"""Linear layers over a flat token stream."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """`y = x W^T + b` with fp32 weights and the matmul in x's dtype.

    `out_shape` is one size, or a stack of them: keys and values are `(2, k * d)`, so that a shard of the inner
    dimension holds the same heads of both. The output is always flat, `[T, prod(out_shape)]`.
    """

    def __init__(self, in_features: int, *out_shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_shape, in_features))
        self.bias = nn.Parameter(torch.empty(out_shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(0, -2).to(x.dtype)
        bias = None if self.bias is None else self.bias.flatten().to(x.dtype)
        return F.linear(x, weight, bias)
