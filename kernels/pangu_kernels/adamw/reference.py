"""AdamW by PyTorch operations, in place, one tensor after the other.

With g = grad_scale * grad:

    p = p * (1 - lr * weight_decay)
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
"""

from torch import Tensor


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        scaled = grad if grad_scale is None else grad * grad_scale
        param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(scaled, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
