"""AdamW on the CPU: compiled for contiguous fp32, the reference for the rest.

One pass over the four tensors, which PyTorch's fused kernel makes too; that one also writes the scaled gradients back.
"""

from torch import Tensor

from pangu_kernels.adamw import reference
from pangu_kernels.compiled import kernel, threads


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
    scale = 1.0 if grad_scale is None else grad_scale.item()
    numbers = (
        scale,
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        (1 - beta2**step) ** -0.5,
        eps,
    )
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        run = kernel("adamw", "ppppiffffffffi", param, grad, exp_avg, exp_avg_sq)
        if run is None:
            tensors = ([param], [grad], [exp_avg], [exp_avg_sq])
            reference.step_(*tensors, grad_scale, step, lr, beta1, beta2, eps, weight_decay)
        else:
            addresses = (tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq))
            run(*addresses, param.numel(), *numbers, threads(param))
