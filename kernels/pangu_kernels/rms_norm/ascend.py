"""RMSNorm on the NPU, by aclnnRmsNorm and aclnnRmsNormGrad, which take an fp32 gain beside a half precision x too."""

import torch
from torch import Tensor

from pangu_kernels.ascend_support import fusible
from pangu_kernels.rms_norm import reference


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not fusible("rms_norm", x=x, weight=weight):
        return reference.forward(x, weight, eps)
    y, rstd = torch.ops.npu.npu_rms_norm(_rows(x), _gain(weight, x), eps)
    return y.view(x.shape), rstd.view(*x.shape[:-1], 1)


def backward(d_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if not fusible("rms_norm", x=x, weight=weight):
        return reference.backward(d_y, x, weight, rstd)
    d_x, d_gain = torch.ops.npu.npu_rms_norm_backward(_rows(d_y), _rows(x), _gain(weight, x), rstd.view(-1, 1))
    return d_x.view(x.shape), d_gain.to(weight.dtype)  # fp32 from the kernel


def _rows(x: Tensor) -> Tensor:
    """Two dimensions: the kernels take no fewer, and no more than eight."""
    return x.view(-1, x.shape[-1])


def _gain(weight: Tensor, x: Tensor) -> Tensor:
    return weight if weight.dtype in (x.dtype, torch.float32) else weight.float()
