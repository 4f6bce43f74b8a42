"""Rotary position embedding on the CPU: compiled for fp32, the reference for the rest."""

import torch
from torch import Tensor

from pangu_kernels.compiled import kernel, threads
from pangu_kernels.rope import reference


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = _rotate(x, cos, sin, transposed=False)
    return reference.forward(x, cos, sin) if y is None else y


def backward(d_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d_x = _rotate(d_y, cos, sin, transposed=True)
    return reference.backward(d_y, cos, sin) if d_x is None else d_x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor | None:
    run = kernel("rope", "ppppiiiiiii", cos, sin)
    if run is None or x.dtype != torch.float32 or x.stride(2) != 1:
        return None
    y = x.new_empty(x.shape)
    token_stride, head_stride, _ = x.stride()
    run(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        *x.shape,
        token_stride,
        head_stride,
        transposed,
        threads(x),
    )
    return y
