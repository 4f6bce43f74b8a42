"""SwiGLU (Shazeer 2020, equation 6 without the projections)."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.checks import check_tensor
from pangu_kernels.registration import define, implement
from pangu_kernels.swiglu import ascend, cpu, reference
from pangu_kernels.triton_support import triton_or


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up` with gate and up the first and second half of x `[T, 2F]`: `[T, F]` in the dtype of x.

    Raises TypeError for a dtype that is not floating point, ValueError for an odd last dimension or a stride that does
    not fit.
    """
    check_tensor("swiglu", "x", x, 2)
    if x.shape[1] % 2:
        raise ValueError(f"swiglu: the last dimension of x must be even, got {x.shape[1]}")
    if torch.is_grad_enabled():
        return _SwiGLU.apply(x)
    return _forward(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.recompute = {0: _SwiGLU.again}
        return _forward(x)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        return _forward(*ctx.saved_tensors)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        return _backward(d_y.contiguous(), *ctx.saved_tensors)


def _fake_forward(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _fake_backward(d_y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


_forward = define("swiglu(Tensor x) -> Tensor", reference=reference.forward, fake=_fake_forward)
_backward = define("swiglu_backward(Tensor d_y, Tensor x) -> Tensor", reference=reference.backward, fake=_fake_backward)
implement("swiglu", "cpu", cpu.forward)
implement("swiglu_backward", "cpu", cpu.backward)
implement("swiglu", "cuda", triton_or(reference.forward))
implement("swiglu_backward", "cuda", triton_or(reference.backward))
implement("swiglu", "npu", ascend.forward)
implement("swiglu_backward", "npu", ascend.backward)
