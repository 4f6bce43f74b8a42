"""The sandwich norm on the NPU: aclnnRmsNorm for the post-norm, aclnnAddRmsNorm for addition and pre-norm in one.

aclnnAddRmsNorm wants its gain in the dtype of the residual stream: beside a bf16 one, an fp32 gain is rounded to bf16.
CANN has no gradient of it in one piece: backward is aclnnRmsNormGrad twice and an addition in place.
"""

import torch
from torch import Tensor

from pangu_kernels.ascend_support import fusible
from pangu_kernels.rms_norm import ascend as rms_norm
from pangu_kernels.sandwich_norm import reference


def forward(
    residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not fusible("sandwich_norm", residual=residual, post_weight=post_weight, pre_weight=pre_weight):
        return reference.forward(residual, y, post_weight, pre_weight, eps)
    no_rstd = residual.new_empty(0, dtype=torch.float32)
    y, post_rstd = (y, no_rstd) if post_weight is None else rms_norm.forward(y, post_weight, eps)
    if pre_weight is None:
        return residual + y, residual.new_empty(0), post_rstd, no_rstd
    gain = pre_weight.to(residual.dtype)
    normed, pre_rstd, new_residual = torch.ops.npu.npu_add_rms_norm(residual, y, gain, eps)
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
    return reference.backward(
        d_new_residual, d_normed, y, new_residual, post_weight, pre_weight, post_rstd, pre_rstd, rms_norm.backward
    )
