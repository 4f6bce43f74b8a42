"""RMSNorm (Zhang and Sennrich 2019, equation 4)."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.checks import check_operand, check_tensor, describe
from pangu_kernels.precision import accumulation_dtype
from pangu_kernels.registration import define, implement
from pangu_kernels.rms_norm import ascend, cpu, reference
from pangu_kernels.triton_support import triton_or


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    x `[..., H]` and weight `[H]` in fp32, bf16, fp16 or fp64, not necessarily the same; the result is like x. The
    statistics are fp32 (fp64 for fp64).

    Raises TypeError for a dtype that is not floating point, ValueError for a shape, device or stride that does not fit.
    """
    check_tensor("rms_norm", "x", x)
    if not x.dim():
        raise ValueError(f"rms_norm: x must have at least one dimension, got {describe(x)}")
    check_operand("rms_norm", "weight", weight, x.shape[-1:], x)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _forward(x, weight, eps)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        ctx.recompute = {0: _RMSNorm.again}
        return y

    @staticmethod
    def again(ctx: Any) -> Tensor:
        x, weight, _ = ctx.saved_tensors
        return _forward(x, weight, ctx.eps)[0]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(d_y.contiguous(), *ctx.saved_tensors), None


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(x.dtype))


def _fake_backward(d_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


_forward = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    reference=reference.forward,
    fake=_fake_forward,
)
_backward = define(
    "rms_norm_backward(Tensor d_y, Tensor x, Tensor weight, Tensor rstd) -> (Tensor d_x, Tensor d_weight)",
    reference=reference.backward,
    fake=_fake_backward,
)
implement("rms_norm", "cpu", cpu.forward)
implement("rms_norm_backward", "cpu", cpu.backward)
implement("rms_norm", "cuda", triton_or(reference.forward))
implement("rms_norm_backward", "cuda", triton_or(reference.backward))
implement("rms_norm", "npu", ascend.forward)
implement("rms_norm_backward", "npu", ascend.backward)
