"""The weight's gradient by PyTorch operations, in the wider of the two dtypes."""

import torch
from torch import Tensor


def new(d_y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, x.dtype)
    return (d_y.t().to(wide) @ x.to(wide)).to(dtype)


def add_(accumulator: Tensor, d_y: Tensor, x: Tensor) -> None:
    accumulator.addmm_(d_y.t().to(accumulator.dtype), x.to(accumulator.dtype))
