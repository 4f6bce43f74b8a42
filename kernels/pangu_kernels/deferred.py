"""Gradients of weights computed later than those of activations: what zero-bubble pipelines fill their gaps with.

The backward pass of a matmul has two halves of equal cost, and the stage before waits only for the gradient of the
activations (Qi et al. 2023, "Zero Bubble Pipeline Parallelism").
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


class Deferred:
    """Weight gradients that backward passes have left for later."""

    def __init__(self) -> None:
        self._pending: deque[tuple[GradientEdge, Callable[[], Tensor]]] = deque()

    def add(self, edge: GradientEdge, compute: Callable[[], Tensor]) -> None:
        """Leave for later the gradient of the tensor with this edge. `compute` keeps alive what it needs."""
        self._pending.append((edge, compute))

    def take(self) -> Callable[[], None]:
        """What has been added so far; calling the result computes the gradients and accumulates them."""
        pending, self._pending = self._pending, deque()

        def run() -> None:
            while pending:
                edge, compute = pending.popleft()
                torch.autograd.backward(edge, compute())

        return run
