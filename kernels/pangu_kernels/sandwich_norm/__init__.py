"""The end of one sub-layer and the beginning of the next: what stands between them in a sandwich-norm block."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.checks import check_operand, check_same_dtype, check_tensor
from pangu_kernels.precision import accumulation_dtype
from pangu_kernels.registration import define, implement
from pangu_kernels.rms_norm import rms_norm
from pangu_kernels.sandwich_norm import ascend, cpu, reference
from pangu_kernels.triton_support import triton_or


def sandwich_norm(
    residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Add a sub-layer's output to the residual stream and normalize for the next one (Pangu Ultra, equation 1).

        new_residual = residual + rms_norm(y, post_weight)      y itself without a post-norm
        normed       = rms_norm(new_residual, pre_weight)       None without a pre-norm

    residual and y `[T, H]` of one dtype, weights `[H]`; both results are like residual. Statistics are fp32 (fp64 for
    fp64).

    Raises TypeError for a dtype that is not floating point, ValueError for a shape, device or stride that does not fit.
    """
    check_tensor("sandwich_norm", "residual", residual, 2)
    check_operand("sandwich_norm", "y", y, residual.shape, residual)
    check_same_dtype("sandwich_norm", "y", y, residual)
    if post_weight is not None:
        check_operand("sandwich_norm", "post_weight", post_weight, residual.shape[1:], residual)
    if pre_weight is not None:
        check_operand("sandwich_norm", "pre_weight", pre_weight, residual.shape[1:], residual)
    if torch.is_grad_enabled():
        return _SandwichNorm.apply(residual, y, post_weight, pre_weight, eps)
    new_residual, normed, _, _ = _forward(residual, y, post_weight, pre_weight, eps)
    return new_residual, None if pre_weight is None else normed


class _SandwichNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        new_residual, normed, post_rstd, pre_rstd = _forward(residual, y, post_weight, pre_weight, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            None if post_weight is None else y,
            None if pre_weight is None else new_residual,
            post_weight,
            pre_weight,
            post_rstd,
            pre_rstd,
        )
        if pre_weight is None:
            return new_residual, None
        ctx.eps = eps
        ctx.recompute = {1: _SandwichNorm.normed_again}
        return new_residual, normed

    @staticmethod
    def normed_again(ctx: Any) -> Tensor:
        _, new_residual, _, pre_weight, _, _ = ctx.saved_tensors
        return rms_norm(new_residual, pre_weight, ctx.eps)

    @staticmethod
    def backward(ctx: Any, d_new_residual: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_new_residual is None and d_normed is None:
            return None, None, None, None, None
        y, new_residual, post_weight, pre_weight, post_rstd, pre_rstd = ctx.saved_tensors
        if d_normed is None:  # nobody used it: as if there were no pre-norm
            new_residual, pre_weight = None, None
        d_residual, d_y, d_post_weight, d_pre_weight = _backward(
            None if d_new_residual is None else d_new_residual.contiguous(),
            None if d_normed is None else d_normed.contiguous(),
            y,
            new_residual,
            post_weight,
            pre_weight,
            post_rstd,
            pre_rstd,
        )
        d_sum = d_new_residual if pre_weight is None else d_residual
        return (
            d_sum,
            d_sum if post_weight is None else d_y,
            None if post_weight is None else d_post_weight,
            None if pre_weight is None else d_pre_weight,
            None,
        )


def _fake_forward(
    residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def rstd(weight: Tensor | None) -> Tensor:
        shape = (0,) if weight is None else (len(residual), 1)
        return residual.new_empty(shape, dtype=accumulation_dtype(residual.dtype))

    normed = residual.new_empty(0) if pre_weight is None else torch.empty_like(residual)
    return torch.empty_like(residual), normed, rstd(post_weight), rstd(pre_weight)


def _fake_backward(
    d_new_residual: Tensor | None,
    d_normed: Tensor | None,
    y: Tensor | None,
    new_residual: Tensor | None,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    post_rstd: Tensor,
    pre_rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (new_residual, y, post_weight, pre_weight)
    return tuple(post_rstd.new_empty(0) if x is None else torch.empty_like(x) for x in like)  # type: ignore[return-value]


_forward = define(
    "sandwich_norm(Tensor residual, Tensor y, Tensor? post_weight, Tensor? pre_weight, float eps)"
    " -> (Tensor new_residual, Tensor normed, Tensor post_rstd, Tensor pre_rstd)",
    reference=reference.forward,
    fake=_fake_forward,
)
_backward = define(
    "sandwich_norm_backward(Tensor? d_new_residual, Tensor? d_normed, Tensor? y, Tensor? new_residual,"
    " Tensor? post_weight, Tensor? pre_weight, Tensor post_rstd, Tensor pre_rstd)"
    " -> (Tensor d_residual, Tensor d_y, Tensor d_post_weight, Tensor d_pre_weight)",
    reference=reference.backward,
    fake=_fake_backward,
)
implement("sandwich_norm", "cpu", cpu.forward)
implement("sandwich_norm_backward", "cpu", cpu.backward)
implement("sandwich_norm", "cuda", triton_or(reference.forward))
implement("sandwich_norm_backward", "cuda", triton_or(reference.backward))
implement("sandwich_norm", "npu", ascend.forward)
implement("sandwich_norm_backward", "npu", ascend.backward)
