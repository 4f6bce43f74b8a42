"""RMSNorm and the sandwich of two around every sub-layer. Gains are read here and nowhere else."""

import pangu_kernels
import torch
from torch import Tensor, nn

from pangu.model.local import local


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    @property
    def gain(self) -> Tensor:
        return local(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return pangu_kernels.rms_norm(x, self.gain, self.eps)


def sandwich_norm(residual: Tensor, y: Tensor, post_norm: RMSNorm | None, pre_norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """Close one sub-layer and open the next: `h = residual + post_norm(y)` and `pre_norm(h)`, both `[T, H]`.

    The post-norm acts on the sub-layer's output before the addition (Pangu Ultra, equation 1 and figure 1); without
    it this is pre-norm.
    """
    post_gain = None if post_norm is None else post_norm.gain
    h, x = pangu_kernels.sandwich_norm(residual, y, post_gain, pre_norm.gain, pre_norm.eps)
    assert x is not None  # for type checkers: there is a pre-norm
    return h, x


def add_post_norm(residual: Tensor, y: Tensor, post_norm: RMSNorm | None) -> Tensor:
    """`residual + post_norm(y)`, where no norm follows inside the block."""
    if post_norm is None:
        return residual + y
    h, _ = pangu_kernels.sandwich_norm(residual, y, post_norm.gain, None, post_norm.eps)
    return h
