"""RMSNorm on the CPU: compiled for contiguous fp32, the reference for the rest."""

import torch
from torch import Tensor

from pangu_kernels.compiled import BLOCKS, kernel, threads
from pangu_kernels.rms_norm import reference


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    run = kernel("rms_norm", "ppppiifi", x, weight)
    if run is None:
        return reference.forward(x, weight, eps)
    size = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    run(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rstd.data_ptr(), rstd.numel(), size, eps, threads(x))
    return y, rstd


def backward(d_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    run = kernel("rms_norm_backward", "ppppppiiii", d_y, x, weight, rstd)
    if run is None:
        return reference.backward(d_y, x, weight, rstd)
    size = x.shape[-1]
    d_x, d_weights = torch.empty_like(x), x.new_zeros((BLOCKS, size))
    run(
        d_y.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        d_x.data_ptr(),
        d_weights.data_ptr(),
        rstd.numel(),
        size,
        BLOCKS,
        threads(x),
    )
    return d_x, d_weights.sum(0)
