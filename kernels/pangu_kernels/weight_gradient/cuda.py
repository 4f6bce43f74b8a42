"""The weight's gradient by a matmul of half precision whose result is fp32, which CUDA and Ascend (aclnnMm) have."""

import torch
from torch import Tensor

from pangu_kernels.weight_gradient import reference


def new(d_y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(d_y.t(), x, out_dtype=dtype)
    return reference.new(d_y, x, dtype)


def add_(accumulator: Tensor, d_y: Tensor, x: Tensor) -> None:
    accumulator.add_(new(d_y, x, accumulator.dtype))
