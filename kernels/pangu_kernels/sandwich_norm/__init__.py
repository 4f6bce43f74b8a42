from torch import Tensor

from pangu_kernels.rms_norm import rms_norm


def sandwich_norm(
    residual: Tensor, y: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    new_residual = residual + (y if post_weight is None else rms_norm(y, post_weight, eps))
    return new_residual, None if pre_weight is None else rms_norm(new_residual, pre_weight, eps)
