"""The sandwich norm on the CPU: compiled for contiguous fp32, the reference for the rest.

A row stays in the cache from the first norm to the second, where separate operations pass over memory a dozen times.
"""

import torch
from torch import Tensor

from pangu_kernels.compiled import BLOCKS, address, kernel, threads
from pangu_kernels.sandwich_norm import reference


def forward(
    residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = kernel("sandwich_norm", "ppppppppiifi", residual, y, post_weight, pre_weight)
    if run is None:
        return reference.forward(residual, y, post_weight, pre_weight, eps)
    tokens, size = residual.shape
    new_residual = torch.empty_like(residual)
    normed = residual.new_empty(0 if pre_weight is None else residual.shape)
    post_rstd = residual.new_empty(0 if post_weight is None else (tokens, 1))
    pre_rstd = residual.new_empty(0 if pre_weight is None else (tokens, 1))
    inputs = map(address, (residual, y, post_weight, pre_weight))
    outputs = map(address, (new_residual, normed, post_rstd, pre_rstd))
    run(*inputs, *outputs, tokens, size, eps, threads(residual))
    return new_residual, normed, post_rstd, pre_rstd


def backward(
    d_new_residual: Tensor | None,
    d_normed: Tensor | None,
    y: Tensor | None,
    new_residual: Tensor | None,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    post_rstd: Tensor,
    pre_rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (d_new_residual, d_normed, y, new_residual, post_weight, pre_weight)
    run = kernel("sandwich_norm_backward", "ppppppppppppiiii", *tensors)
    like = y if new_residual is None else new_residual
    if run is None or like is None:
        return reference.backward(*tensors, post_rstd, pre_rstd)
    tokens, size = like.shape
    d_residual = like.new_empty(0 if pre_weight is None else like.shape)
    d_y = like.new_empty(0 if post_weight is None else like.shape)
    d_post_weights = like.new_zeros((BLOCKS, 0 if post_weight is None else size))
    d_pre_weights = like.new_zeros((BLOCKS, 0 if pre_weight is None else size))
    inputs = map(address, (*tensors, post_rstd, pre_rstd))
    outputs = map(address, (d_residual, d_y, d_post_weights, d_pre_weights))
    run(*inputs, *outputs, tokens, size, BLOCKS, threads(like))
    return d_residual, d_y, d_post_weights.sum(0), d_pre_weights.sum(0)
