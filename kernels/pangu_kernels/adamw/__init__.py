"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pangu_kernels.adamw import ascend, cpu, reference
from pangu_kernels.checks import check_operand, check_same_dtype, check_tensor
from pangu_kernels.registration import define, implement
from pangu_kernels.triton_support import triton_or


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """One update, in place, equal to that of `torch.optim.AdamW(fused=True)`.

    The four lists hold, parameter by parameter, tensors of the same shape, dtype and device. `step` counts from 1.
    Gradients are multiplied by `grad_scale` on the way (a number, or a 0-dimensional tensor on their device, so that
    clipping needs neither a pass of its own nor a synchronization); what `grads` hold afterwards is undefined.

    Raises TypeError or ValueError for lists, tensors or numbers that do not fit.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, step, grad_scale)
    if not params:
        return
    if isinstance(grad_scale, Tensor):
        scale: Tensor | None = grad_scale
    else:
        scale = None if grad_scale == 1 else torch.full((), grad_scale, device=params[0].device)
    lists = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs))
    _step(*lists, scale, step, lr, beta1, beta2, eps, weight_decay)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    grad_scale: float | Tensor,
) -> None:
    if step < 1:
        raise ValueError(f"adamw: step counts from 1, got {step}")
    for param in params:
        check_tensor("adamw", "params", param)
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if len(tensors) != len(params):
            raise ValueError(f"adamw: {name} must hold as many tensors as params, {len(params)}, got {len(tensors)}")
        for param, tensor in zip(params, tensors, strict=True):
            check_operand("adamw", name, tensor, param.shape, param)
            check_same_dtype("adamw", name, tensor, param)
    if isinstance(grad_scale, Tensor) and params:
        check_operand("adamw", "grad_scale", grad_scale, (), params[0])


def _fake(*_: object) -> None:
    pass


_step = define(
    "adamw(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor? grad_scale, int step, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    reference=reference.step_,
    fake=_fake,
)
implement("adamw", "cpu", cpu.step_)
implement("adamw", "cuda", triton_or(reference.step_))
implement("adamw", "npu", ascend.step_)
