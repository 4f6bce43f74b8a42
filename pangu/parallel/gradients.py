"""Gradients of a distributed model: what is left to sum after backward, and their norm over all ranks."""

import math
from collections.abc import Mapping, Sequence

import pangu_kernels as kernels
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pangu.model.local import local


def sum_over(group: dist.ProcessGroup, gradients: Sequence[Tensor]) -> None:
    """Sum tensors over a group, in place, in one all-reduce per dtype."""
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype and gradient.numel()]
        if alike:
            flat = torch.cat([gradient.flatten() for gradient in alike])
            dist.all_reduce(flat, group=group)
            pieces = flat.split([gradient.numel() for gradient in alike])
            torch._foreach_copy_(alike, [piece.view_as(old) for piece, old in zip(pieces, alike, strict=True)])


def local_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """This rank's shard of every gradient there is."""
    return {name: local(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}


def copies(parameter: Tensor) -> int:
    """On how many ranks of its own mesh every element of a parameter lies."""
    if not isinstance(parameter, DTensor):
        return 1
    placed = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in placed if placement.is_replicate())


def squared_norm(parameters: Mapping[str, nn.Parameter], extra_copies: Mapping[str, int]) -> Tensor:
    """This rank's part of the square of the 2-norm of all gradients together, fp32 `[]`.

    Parts of all ranks add up to the whole: an element that lies on n ranks counts one nth on each. `extra_copies` names
    parameters that lie outside their own mesh as well, such as an embedding that is the head of another stage.
    """
    total: Tensor | None = None
    weights: dict[int, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None and local(parameter.grad).numel():
            weights.setdefault(copies(parameter) * extra_copies.get(name, 1), []).append(local(parameter.grad))
    for count, gradients in sorted(weights.items()):
        part = kernels.squared_norm(gradients) / count
        total = part if total is None else total + part
    if total is None:
        device = next(iter(parameters.values())).device if parameters else "cpu"
        return torch.zeros((), device=device)
    return total
