"""AdamW on the CPU by PyTorch's fused kernel: one pass over the four tensors."""

import torch
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
    # The kernel divides by its scale, and writes the scaled gradient back: a fifth slower, so not for a scale of 1.
    # For 58M parameters: 37 ms, 45 ms with a scale, 48 ms when the gradients are scaled before.
    inverse_scale = None if grad_scale is None or grad_scale.item() == 1 else grad_scale.float().reciprocal()
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.tensor(float(step))] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=inverse_scale,
    )
