"""Linear layers of tensor and sequence parallelism: a matmul and its collective at the same time.

Rows (tokens) are sharded outside the layers, columns of activations inside (Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models"): the first layer of a pair gathers rows, the second scatters
their sums. Modes, which agree forward and backward but for the order of sums:

reference   the collective, then the matmul, or the reverse
chunked     in `num_chunks` pieces, one communicated while another is multiplied; any backend of c10d
fused       Ascend: MC2; CUDA: symmetric memory (never run: no GPU was available; the calls' shapes are tested)
auto        see `modes.choose`
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pangu_kernels.checks import check_operand, check_tensor
from pangu_kernels.deferred import Deferred
from pangu_kernels.overlap import chunked, reference
from pangu_kernels.overlap.collectives import (
    all_gather_rows,
    check_group,
    check_rows,
    copy_to_group,
    reduce_from_group,
    reduce_scatter_rows,
    start_all_gather,
    start_reduce_scatter,
    wait,
)
from pangu_kernels.overlap.modes import FUSED, choose
from pangu_kernels.weight_gradient import Destination

__all__ = [
    "all_gather_matmul",
    "all_gather_rows",
    "copy_to_group",
    "matmul_reduce_scatter",
    "reduce_from_group",
    "reduce_scatter_rows",
]


def all_gather_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    group: dist.ProcessGroup,
    *,
    mode: str = "auto",
    num_chunks: int = 4,
    keep_gathered: bool = False,
    deferred: Deferred | None = None,
) -> list[Tensor]:
    """`gather(x) weight^T` `[T, N_i]` for every weight, after one gather of x over the ranks of `group`.

    x `[T / size, K]`, this rank's rows, as many on every rank; weights `[N_i, K]`, this rank's, in any floating dtype:
    cast to that of x for the matmul, with gradients in their own, accumulated in fp32 if that is fp32.

    Backward scatters the sum of x's gradient while it computes those of the weights. For these it gathers x again,
    behind the matmul before: what is gathered is not kept between forward and backward, unless `keep_gathered`. With
    `deferred` it leaves the gradients of the weights there; they keep alive what was gathered.

    Raises TypeError for what is no floating-point tensor or no process group; ValueError for shapes, devices or strides
    that do not fit, a num_chunks that does not divide the rows in mode "chunked", and limits exceeded in mode "fused".
    """
    operator = "all_gather_matmul"
    check_tensor(operator, "x", x, 2)
    if not weights:
        raise ValueError(f"{operator}: weights must hold at least one tensor")
    for index, weight in enumerate(weights):
        _check_weight(operator, f"weights[{index}]", weight, x)
    check_group(operator, group)
    rows, depth = x.shape
    piece_bytes = rows * depth * x.element_size() // max(1, num_chunks)
    mode = choose(operator, mode, x, [depth], piece_bytes, rows, group, num_chunks)
    if torch.is_grad_enabled():
        return list(_AllGatherMatmul.apply(x, group, mode, num_chunks, keep_gathered, deferred, *weights))
    matrices = [weight.to(x.dtype).t() for weight in weights]
    return _all_gather_matmul(x, matrices, group, mode, num_chunks, False)[0]


def matmul_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup,
    *,
    mode: str = "auto",
    num_chunks: int = 4,
    deferred: Deferred | None = None,
) -> Tensor:
    """This rank's rows `[T / size, N]` of the sum over ranks of `x weight^T`.

    x `[T, K]`, all rows and this rank's columns; weight `[N, K]`, this rank's columns, in any floating dtype: cast to
    that of x for the matmul, with gradients in its own, accumulated in fp32 if that is fp32. The sum over ranks is
    taken in the dtype of x. Backward gathers the output's gradient once for both gradients. With `deferred` it leaves
    that of the weight there, which keeps the gathered gradient alive.

    Raises TypeError for what is no floating-point tensor or no process group; ValueError for shapes, devices or strides
    that do not fit, rows that do not divide, a num_chunks that does not divide a rank's rows in mode "chunked", and
    limits exceeded in mode "fused".
    """
    operator = "matmul_reduce_scatter"
    check_tensor(operator, "x", x, 2)
    _check_weight(operator, "weight", weight, x)
    check_rows(operator, x, group)
    rows, (width, depth) = len(x) // group.size(), weight.shape
    piece_bytes = rows * width * x.element_size() // max(1, num_chunks)
    mode = choose(operator, mode, x, [depth, width], piece_bytes, rows, group, num_chunks)
    if torch.is_grad_enabled():
        return _MatmulReduceScatter.apply(x, weight, group, mode, num_chunks, deferred)
    return _matmul_reduce_scatter(x, weight.to(x.dtype).t(), group, mode, num_chunks)


def _check_weight(operator: str, name: str, weight: Tensor, x: Tensor) -> None:
    check_tensor(operator, name, weight, 2, contiguous=False)
    check_operand(operator, name, weight, (len(weight), x.shape[1]), x, contiguous=False)


class _AllGatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup,
        mode: str,
        num_chunks: int,
        keep_gathered: bool,
        deferred: Deferred | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        weights_need_grad = any(ctx.needs_input_grad[6:])
        matrices = [weight.to(x.dtype).t() for weight in weights]
        keep_gathered = keep_gathered and weights_need_grad
        products, gathered = _all_gather_matmul(x, matrices, group, mode, num_chunks, keep_gathered)
        ctx.save_for_backward(gathered if keep_gathered else x if weights_need_grad else None, *weights)
        ctx.group, ctx.overlapped, ctx.is_gathered = group, mode != "reference", keep_gathered
        ctx.destinations = [Destination(weight, deferred) for weight in weights]
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *d_ys: Tensor) -> tuple[Tensor | None, ...]:
        """Each collective behind a matmul of its own: the gather behind d_x, the scatter behind the weights."""
        x, *weights = ctx.saved_tensors
        needs_gather = x is not None and not ctx.is_gathered
        gathered = start_all_gather(x, ctx.group) if needs_gather else x
        if not ctx.overlapped and needs_gather:
            gathered = wait(gathered)
        d_x = None
        if ctx.needs_input_grad[0]:
            partial = d_ys[0] @ weights[0].to(d_ys[0].dtype)
            for d_y, weight in zip(d_ys[1:], weights[1:], strict=True):
                partial.addmm_(d_y, weight.to(d_y.dtype))
            d_x = start_reduce_scatter(partial, ctx.group)
            if not ctx.overlapped:
                d_x = wait(d_x)
        if needs_gather:
            gathered = wait(gathered)
        d_weights = [
            destination.gradient(d_y, gathered) if needs_grad else None
            for d_y, destination, needs_grad in zip(d_ys, ctx.destinations, ctx.needs_input_grad[6:], strict=True)
        ]
        return None if d_x is None else wait(d_x), None, None, None, None, None, *d_weights


class _MatmulReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        group: dist.ProcessGroup,
        mode: str,
        num_chunks: int,
        deferred: Deferred | None,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.mode, ctx.num_chunks = group, mode, num_chunks
        ctx.destination = Destination(weight, deferred)
        return _matmul_reduce_scatter(x, weight.to(x.dtype).t(), group, mode, num_chunks)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_needs_grad = ctx.needs_input_grad[1]
        d_y = d_y.contiguous()
        gathered: Tensor | None
        if ctx.needs_input_grad[0]:
            matrices = [weight.to(d_y.dtype)]
            (d_x,), gathered = _all_gather_matmul(d_y, matrices, ctx.group, ctx.mode, ctx.num_chunks, weight_needs_grad)
        else:
            d_x, gathered = None, wait(start_all_gather(d_y, ctx.group))
        d_weight = None if gathered is None else ctx.destination.gradient(gathered, x)
        return d_x, d_weight, None, None, None, None


def _all_gather_matmul(
    x: Tensor, matrices: Sequence[Tensor], group: dist.ProcessGroup, mode: str, num_chunks: int, keep_gathered: bool
) -> tuple[list[Tensor], Tensor | None]:
    """As in reference.py."""
    if mode == "fused":
        return FUSED[x.device.type].all_gather_matmul(x, matrices, group, keep_gathered)
    if mode == "chunked":
        return chunked.all_gather_matmul(x, matrices, group, keep_gathered, num_chunks)
    return reference.all_gather_matmul(x, matrices, group, keep_gathered)


def _matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: dist.ProcessGroup, mode: str, num_chunks: int) -> Tensor:
    if mode == "fused":
        return FUSED[x.device.type].matmul_reduce_scatter(x, matrix, group)
    if mode == "chunked":
        return chunked.matmul_reduce_scatter(x, matrix, group, num_chunks)
    return reference.matmul_reduce_scatter(x, matrix, group)
