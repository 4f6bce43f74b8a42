"""Linear layers over a flat token stream.

A sub-layer calls its linear layers through `project_inputs` and `project_output`, which it holds as attributes: tensor
parallelism puts versions of them there that gather and scatter tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pangu_kernels.deferred import Deferred
from pangu_kernels.weight_gradient import Destination
from torch import Tensor, nn
from torch.nn import functional as F

from pangu.model.local import local

_HALF = (torch.bfloat16, torch.float16)


class Linear(nn.Module):
    """`y = x W^T + b` with fp32 weights and the matmul in x's dtype; gradients of weights are accumulated in fp32.

    `out_shape` is one size, or a stack of them: keys and values are `(2, k * d)`, so that a shard of the inner
    dimension holds the same heads of both. The output is always flat, `[T, prod(out_shape)]`.
    `deferred`, if there is one, gets the computation of the weight's gradient instead of the backward pass.
    """

    def __init__(self, in_features: int, *out_shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_shape, in_features))
        self.bias = nn.Parameter(torch.empty(out_shape)) if bias else None
        self.deferred: Deferred | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias).flatten()
        return project(x, local(self.weight), bias, self.deferred)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, deferred: Deferred | None = None) -> Tensor:
    """What `Linear` does to x `[T, H]`, with these parameters: weight `[..., H]` and bias flat, or this process's parts
    of them."""
    if torch.is_grad_enabled() and (x.dtype in _HALF or deferred is not None):
        destination = Destination(weight, deferred)
        if destination.dtype != x.dtype or deferred is not None:
            y: Tensor = _Linear.apply(x, weight, bias, destination)
            return y
    return _project(x, weight, bias)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.flatten(0, -2).to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Linear(torch.autograd.Function):
    """Accumulates the gradients of weight and bias in a dtype that may be wider than x's.

    Of the weight what is kept for backward is the parameter itself: in x's dtype there would be a copy per micro-batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, destination: Destination) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.destination = destination
        return _project(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_y = d_y.contiguous()  # autograd expands the gradient of a sum
        d_x = d_y @ weight.flatten(0, -2).to(d_y.dtype) if ctx.needs_input_grad[0] else None
        d_weight = ctx.destination.gradient(d_y, x) if ctx.needs_input_grad[1] else None
        d_bias = d_y.sum(0, dtype=ctx.destination.dtype) if ctx.needs_input_grad[2] else None
        return d_x, None if d_weight is None else d_weight.view(weight.shape), d_bias, None


InputProjection = Callable[[Tensor, Sequence[Linear]], list[Tensor]]
OutputProjection = Callable[[Tensor, Linear], Tensor]


def project_inputs(x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """The projections of a sub-layer's input x `[T, H]`, each `[T, prod(out_shape)]`."""
    return [linear(x) for linear in linears]


def project_output(x: Tensor, linear: Linear) -> Tensor:
    """The projection `[T, H]` of what a sub-layer has computed, back to the width of the residual stream."""
    return linear(x)
