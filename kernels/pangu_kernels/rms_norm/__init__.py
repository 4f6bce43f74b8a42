import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    statistics_dtype = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(statistics_dtype)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd * weight).to(x.dtype)
