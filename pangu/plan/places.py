"""Where a step is: in which pass of which micro-batch, and in which module, forward and backward."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._pytree import tree_iter

from pangu.model import Transformer

BETWEEN = "between passes"


@dataclass(eq=False, slots=True)
class Place:
    """A stretch of a step: a forward or a backward pass of a stage, or what lies between two of them."""

    kind: str = BETWEEN
    stage: int | None = None
    micro_batch: int | None = None

    def __str__(self) -> str:
        return self.kind if self.stage is None else f"{self.kind}, stage {self.stage}, micro-batch {self.micro_batch}"


class Places:
    """Follows a step by hooks on modules and on the nodes of autograd's graph that their outputs come from.

    In backward a module is entered with the gradient of its output, and left with that of its input.
    """

    def __init__(self) -> None:
        self.now = Place()
        self._names: dict[nn.Module, str] = {}
        self._stages: dict[nn.Module, int] = {}
        self._entered: list[str] = []
        self._backward_module = ""
        self._graph_task = -1
        self._forwards: Counter[int] = Counter()

    def restart(self) -> None:
        """The next micro-batch of every stage is its first."""
        self.now = Place()
        self._forwards.clear()
        self._backward_module = ""

    def __str__(self) -> str:
        return f"{self.now}, {self.module}" if self.module else str(self.now)

    @property
    def module(self) -> str:
        """Name of the module at work, empty outside of the model."""
        if self._entered:
            return self._entered[-1]
        return self._backward_module if self.now.kind == "backward" else ""

    @property
    def pass_kind(self) -> str:
        """forward, backward or recompute; what lies between passes belongs to the backward before it."""
        if self.now.kind == "backward" and self._entered:
            return "recompute"
        return "forward" if self.now.kind == "forward" else "backward"

    def follow_autograd(self) -> None:
        """Notice that a backward pass has begun or ended; to be called before every operator."""
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            self._graph_task = task
            self.now = Place(BETWEEN if task == -1 else "backward")

    @contextmanager
    def watching(self, parts: Iterable[tuple[int, Transformer]]) -> Iterator[None]:
        """Inside, know the modules of `parts`, by their stages."""
        for stage, part in parts:
            self._stages[part] = stage
            self._names |= {module: name for name, module in part.named_modules()}
        handles = (
            module_hooks.register_module_forward_pre_hook(self._enter),
            module_hooks.register_module_forward_hook(self._leave),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        name = self._names.get(module)
        if name is None:
            return
        self.follow_autograd()
        if module in self._stages and self._graph_task == -1:
            stage = self._stages[module]
            self.now = Place("forward", stage, self._forwards[stage])
            self._forwards[stage] += 1
        outside = self._entered[-1] if self._entered else ""
        for tensor in tree_iter(inputs):
            if isinstance(tensor, Tensor):
                self._go_to(outside, tensor)
        self._entered.append(name)

    def _leave(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if module not in self._names:
            return
        name = self._entered.pop()
        for tensor in tree_iter(outputs):
            if isinstance(tensor, Tensor):
                self._go_to(name, tensor)
                if module in self._stages and tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(partial(self._begin_backward, self.now))
        if module in self._stages and self.now.kind == "forward":
            self.now = Place()

    def _go_to(self, name: str, tensor: Tensor) -> None:
        """In backward, be in `name` from the gradient of `tensor` on, unless a module inside has said so first."""
        node: Any = tensor.grad_fn  # whose `metadata` torch's annotations take for a method
        if node is not None and "pangu module" not in node.metadata:
            node.metadata["pangu module"] = name
            node.register_prehook(partial(self._set, name))

    def _set(self, name: str, gradients: Any) -> None:
        self._backward_module = name

    def _begin_backward(self, forward: Place, gradients: Any) -> None:
        if self.now.kind == "backward":
            self.now.stage, self.now.micro_batch = forward.stage, forward.micro_batch
