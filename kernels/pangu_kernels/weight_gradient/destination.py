"""Where the gradient of a weight is going, so that a matmul can add to what is there already."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pangu_kernels.deferred import Deferred
from pangu_kernels.weight_gradient.operators import add_weight_gradient, weight_gradient

_HALF = (torch.bfloat16, torch.float16)
_VIEWS = frozenset(("ViewBackward0", "_ToTorchTensorBackward"))


class Destination:
    """The `grad` of the parameter that a weight is, or is a view of (reshaped, or the local part of a DTensor).

    Autograd adds a gradient to `grad` in a pass of its own, from a tensor as large as the weight. From the second
    micro-batch of a step on, when there is something to add to, `gradient` saves both for activations in half precision
    and gradients in fp32. DistributedDataParallel, which waits for that pass, cannot be used with it.

    With `deferred` it leaves the gradient there instead, to be computed later.
    """

    def __init__(self, weight: Tensor, deferred: Deferred | None = None) -> None:
        self._parameter = _leaf(weight)
        self._shape = weight.shape
        self._leave: Callable[[Callable[[], Tensor]], None] | None = None
        if deferred is not None and weight.requires_grad:
            self._leave = partial(deferred.add, get_gradient_edge(weight))
        self.dtype: torch.dtype = getattr(self._parameter, "grad_dtype", None) or weight.dtype
        """In which gradients of the parameter are accumulated."""

    def gradient(self, d_y: Tensor, x: Tensor) -> Tensor | None:
        """`d_y^T x` in `dtype`, to be returned from a backward pass; None when it has been added to `grad` or left."""
        if self.dtype == x.dtype and self._leave is None:
            return d_y.t() @ x
        d_y = d_y if d_y.stride(-1) == 1 else d_y.contiguous()  # autograd expands the gradient of a sum
        if self._leave is not None:
            self._leave(lambda: weight_gradient(d_y, x, self.dtype).view(self._shape))
            return None
        if x.dtype in _HALF and self.dtype == torch.float32:
            grad = self._grad()
            if grad is not None and grad.is_contiguous():
                add_weight_gradient(grad.view(d_y.shape[1], x.shape[1]), d_y, x)
                return None
        return weight_gradient(d_y, x, self.dtype)

    def _grad(self) -> Tensor | None:
        """This process's part of `grad`, if autograd is about to add to it and nothing else would happen then."""
        parameter: Any = self._parameter
        if parameter is None or parameter.grad is None or torch.is_grad_enabled():
            return None
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks or not _will_accumulate(parameter):
            return None
        grad = parameter.grad
        return grad.to_local() if hasattr(grad, "to_local") else grad


def _leaf(weight: Tensor) -> Tensor | None:
    if torch.compiler.is_compiling() or not weight.requires_grad:
        return None
    if weight.is_leaf:
        return weight
    node: Any = weight.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _will_accumulate(parameter: Tensor) -> bool:
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # torch.autograd.grad: gradients are returned
        return False
