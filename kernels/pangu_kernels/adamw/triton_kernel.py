# mypy: allow-untyped-defs
"""AdamW in Triton: one launch per parameter, one pass over its four tensors, in fp32 whatever they hold."""

import triton
import triton.language as tl
from torch import Tensor

from pangu_kernels.adamw import reference
from pangu_kernels.triton_support import supports
from pangu_kernels.triton_tiles import TILE, load

_MAX_PROGRAMS = 2**15
"""More than any device runs at once, fewer than Ascend's 65,535; larger tensors take several tiles per program."""


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
    # In the precision of Python: in fp32, 1 - beta^step loses most of its digits in the first steps.
    decay, step_size, root = 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if not supports(*tensors):
            one, its_grad, average, square = ([tensor] for tensor in tensors)
            reference.step_(one, its_grad, average, square, grad_scale, step, lr, beta1, beta2, eps, weight_decay)
            continue
        size = tensors[0].numel()
        programs = min(triton.cdiv(size, TILE), _MAX_PROGRAMS)
        step_kernel[(programs,)](
            *tensors, grad_scale, size, decay, step_size, root, 1 - beta1, 1 - beta2, eps, COLUMNS=TILE
        )


@triton.jit
def step_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    grad_scale,
    size,
    decay,
    step_size,
    root,
    new_share,
    new_square_share,
    eps,
    COLUMNS: tl.constexpr,
):
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float32)
    first = tl.program_id(0).to(tl.int64)  # so are the tiles and positions: a tensor may have more than 2^31 elements
    for tile in range(first, tl.cdiv(size, COLUMNS), tl.num_programs(0)):
        at = tile * COLUMNS + tl.arange(0, COLUMNS)
        mask = at < size
        g, m, v = load(grad + at, mask) * scale, load(exp_avg + at, mask), load(exp_avg_sq + at, mask)
        m += new_share * (g - m)
        v += new_square_share * (g * g - v)
        p = load(param + at, mask) * decay - step_size * m / (tl.sqrt(v) / root + eps)
        tl.store(exp_avg + at, m, mask)
        tl.store(exp_avg_sq + at, v, mask)
        tl.store(param + at, p, mask)
