"""AdamW on the NPU, by aclnnApplyAdamWV2 for each parameter: one pass over its four tensors."""

import torch
from torch import Tensor

from pangu_kernels.adamw import reference
from pangu_kernels.ascend_support import fusible


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
    present = [tensors for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True) if tensors[0].numel()]
    if not all(fusible("adamw", params=tensors[0]) for tensors in present):
        reference.step_(params, grads, exp_avgs, exp_avg_sqs, grad_scale, step, lr, beta1, beta2, eps, weight_decay)
        return
    if not present:
        return
    params, grads, exp_avgs, exp_avg_sqs = map(list, zip(*present, strict=True))
    if grad_scale is not None:  # torch_npu's kernel takes an argument of that name and ignores it
        for grad in grads:
            grad.mul_(grad_scale)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((1,), float(step), device=params[0].device)] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
