"""Collectives over the rows of a matrix: started and waited for apart, and as differentiable functions.

They are PyTorch's functional operators, so that tracing, fake tensors and dispatch modes see them. All ranks of a group
must call them with the same shape and dtype; sums are taken in that dtype.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import wait_tensor

from pangu_kernels.checks import check_tensor, describe


def all_gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x `[n, ...]` of every rank, in rank order: `[size * n, ...]`. Its backward is `reduce_scatter_rows`.

    Raises TypeError for a dtype that is not floating point or no process group, ValueError if x is not contiguous.
    """
    check_tensor("all_gather_rows", "x", x)
    check_group("all_gather_rows", group)
    return _AllGatherRows.apply(x, group) if torch.is_grad_enabled() else wait(start_all_gather(x, group))


def reduce_scatter_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share `[n / size, ...]` of the sum over ranks of x `[n, ...]`. Its backward is `all_gather_rows`.

    Raises TypeError for a dtype that is not floating point or no process group, ValueError if x is not contiguous or
    its rows do not divide.
    """
    check_tensor("reduce_scatter_rows", "x", x)
    check_rows("reduce_scatter_rows", x, group)
    return _ReduceScatterRows.apply(x, group) if torch.is_grad_enabled() else wait(start_reduce_scatter(x, group))


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x itself, which every rank has; its gradient is the sum of the ranks' gradients.

    Raises TypeError for a dtype that is not floating point or no process group, ValueError if x is not contiguous.
    """
    check_tensor("copy_to_group", "x", x)
    check_group("copy_to_group", group)
    return _CopyToGroup.apply(x, group) if torch.is_grad_enabled() else x


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of x, on every rank; its gradient, the same on every rank, is that of each x.

    Raises TypeError for a dtype that is not floating point or no process group, ValueError if x is not contiguous.
    """
    check_tensor("reduce_from_group", "x", x)
    check_group("reduce_from_group", group)
    return _ReduceFromGroup.apply(x, group) if torch.is_grad_enabled() else wait(start_all_reduce(x, group))


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The result of `all_gather_rows` once `wait` has been called on it. x, contiguous, must not change until then."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The result of `reduce_scatter_rows` once `wait` has been called on it. x must not change until then."""
    return torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name)


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of x, in a tensor of its own, once `wait` has been called on it."""
    return torch.ops._c10d_functional.all_reduce(x, "sum", group.group_name)


def wait(result: Tensor) -> Tensor:
    """`result`, which a `start_` function returned, once it is there: blocks the host on a CPU, else the stream."""
    return wait_tensor(result)


def check_group(operator: str, group: dist.ProcessGroup) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{operator}: group must be a ProcessGroup (of a DeviceMesh: its get_group()), got {group!r}")


def check_rows(operator: str, x: Tensor, group: dist.ProcessGroup) -> None:
    check_group(operator, group)
    if len(x) % group.size():
        raise ValueError(
            f"{operator}: the {len(x)} rows of x cannot be dealt over the {group.size()} ranks of the group, "
            f"got {describe(x)}"
        )


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_all_gather(x, group))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        return wait(start_reduce_scatter(d_y.contiguous(), ctx.group)), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_reduce_scatter(x, group))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_gather(d_y.contiguous(), ctx.group)), None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_reduce(d_y.contiguous(), ctx.group)), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return wait(start_all_reduce(x, group))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        return d_y, None
