"""Linear layers over a flat token stream.

A sub-layer calls its linear layers through `project_inputs` and `project_output`, which it holds as attributes: tensor
parallelism puts versions of them there that gather and scatter tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pangu_kernels.deferred import Deferred
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from pangu.model.local import local


class Linear(nn.Module):
    """`y = x W^T + b` with fp32 weights and the matmul in x's dtype.

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
        weight = local(self.weight).flatten(0, -2).to(x.dtype)
        bias = None if self.bias is None else local(self.bias).flatten().to(x.dtype)
        if self.deferred is None or not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        y: Tensor = _DeferredLinear.apply(x, weight, bias, get_gradient_edge(weight), self.deferred)
        return y


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, edge: GradientEdge, deferred: Deferred
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.edge, ctx.deferred = edge, deferred
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.deferred.add(ctx.edge, lambda: d_y.t() @ x)
        d_x = d_y @ weight if ctx.needs_input_grad[0] else None
        return d_x, None, d_y.sum(0) if ctx.needs_input_grad[2] else None, None, None


InputProjection = Callable[[Tensor, Sequence[Linear]], list[Tensor]]
OutputProjection = Callable[[Tensor, Linear], Tensor]


def project_inputs(x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """The projections of a sub-layer's input x `[T, H]`, each `[T, prod(out_shape)]`."""
    return [linear(x) for linear in linears]


def project_output(x: Tensor, linear: Linear) -> Tensor:
    """The projection `[T, H]` of what a sub-layer has computed, back to the width of the residual stream."""
    return linear(x)
