"""Residual addition between two RMSNorms by PyTorch operations.

    new_residual = residual + rms_norm(y, post_weight)          (+ y without a post-norm)
    normed       = rms_norm(new_residual, pre_weight)           (nothing without a pre-norm)

What an absent norm would return is an empty tensor, since operators return tensors only.
"""

from collections.abc import Callable

from torch import Tensor

from pangu_kernels.precision import accumulation_dtype
from pangu_kernels.rms_norm import reference as rms_norm

NormBackward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward(
    residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if post_weight is None:
        new_residual, post_rstd = residual + y, _no_rstd(residual)
    else:
        post_normed, post_rstd = rms_norm.forward(y, post_weight, eps)
        new_residual = post_normed.add_(residual)
    if pre_weight is None:
        return new_residual, residual.new_empty(0), post_rstd, _no_rstd(residual)
    normed, pre_rstd = rms_norm.forward(new_residual, pre_weight, eps)
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
    norm_backward: NormBackward = rms_norm.backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_residual, d_y, d_post_weight and d_pre_weight; a device with a kernel for one norm's passes it.

    d_residual is d_new_residual plus what comes through the pre-norm: empty without one, since it is d_new_residual
    then. d_y is d_residual through the post-norm: empty without one, since it is d_residual then.
    """
    d_sum, d_residual, d_pre_weight = d_new_residual, post_rstd.new_empty(0), pre_rstd.new_empty(0)
    d_y, d_post_weight = post_rstd.new_empty(0), post_rstd.new_empty(0)
    if pre_weight is not None:
        assert d_normed is not None
        assert new_residual is not None
        d_residual, d_pre_weight = norm_backward(d_normed, new_residual, pre_weight, pre_rstd)
        d_sum = d_residual if d_new_residual is None else d_residual.add_(d_new_residual)
    if post_weight is not None:
        assert d_sum is not None
        assert y is not None
        d_y, d_post_weight = norm_backward(d_sum, y, post_weight, post_rstd)
    return d_residual, d_y, d_post_weight, d_pre_weight


def _no_rstd(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=accumulation_dtype(x.dtype))
