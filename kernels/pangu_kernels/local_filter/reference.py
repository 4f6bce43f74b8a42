"""Two causal convolutions of two taps as matmuls, by PyTorch operations.

    hidden[t] = weight1[..., 0] x[t-1]      + weight1[..., 1] x[t]      + bias1
    y[t]      = weight2[..., 0] hidden[t-1] + weight2[..., 1] hidden[t] + bias2

At the first token t of a document, x[t-1] and hidden[t-1] are 0.
"""

import torch
from torch import Tensor

from pangu_kernels.checks import document_bounds


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    starts = document_starts(cu_seqlens, x)
    hidden = convolve(x, weight1, bias1, starts)
    return convolve(hidden, weight2, bias2, starts), hidden


def backward(
    d_y: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d_x, d_weight1, d_bias1, d_weight2, d_bias2"""
    starts = document_starts(cu_seqlens, x)
    d_hidden, d_weight2, d_bias2 = convolve_backward(d_y, hidden, weight2, starts)
    d_x, d_weight1, d_bias1 = convolve_backward(d_hidden, x, weight1, starts)
    return d_x, d_weight1, d_bias1, d_weight2, d_bias2


def convolve(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor) -> Tensor:
    """`[T, in]` to `[T, out]` by weight `[out, in, 2]`."""
    before, now = weight.to(x.dtype).unbind(-1)
    y = torch.addmm(bias.to(x.dtype), x, now.T)
    return y.addmm_(delayed(x, starts), before.T)


def convolve_backward(d_y: Tensor, x: Tensor, weight: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_x, d_weight and d_bias by

    d_x[t]   = before^T d_y[t+1] + now^T d_y[t]               (without the first term at a document's end)
    d_before = sum d_y[t] x[t-1]^T    d_now = sum d_y[t] x[t]^T    d_bias = sum d_y[t]
    """
    before, now = weight.to(x.dtype).unbind(-1)
    d_x = d_y @ now
    reaching_back = d_y.index_fill(0, starts, 0)  # a first token's gradient reaches no token before it
    d_x[:-1].addmm_(reaching_back[1:], before)
    d_weight = torch.stack((reaching_back[1:].T @ x[:-1], d_y.T @ x), dim=-1)
    return d_x, d_weight.to(weight.dtype), d_y.sum(0).to(weight.dtype)


def delayed(x: Tensor, starts: Tensor) -> Tensor:
    """Row t holds `x[t-1]`, or 0 where a document starts at t."""
    y = torch.empty_like(x)
    y[1:] = x[:-1]
    return y.index_fill_(0, starts, 0)


def document_starts(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """First rows of the documents that have any, on the device of x."""
    bounds = document_bounds("local_filter", "cu_seqlens", cu_seqlens, len(x))
    return torch.tensor(sorted({start for start in bounds if start < len(x)}), dtype=torch.int64, device=x.device)
