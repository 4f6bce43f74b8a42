"""In which precision operators compute inside."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and sums over tensors of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in its accumulation dtype; itself where that is its own."""
    return tensor.to(accumulation_dtype(tensor.dtype))
