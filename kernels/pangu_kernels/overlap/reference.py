"""Matmul and collective one after the other: what every other implementation must equal.

A matrix here is `[K, N]`, the right operand as it is multiplied: `weight.t()` in forward, `weight` in backward.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from pangu_kernels.overlap.collectives import start_all_gather, start_reduce_scatter, wait


def all_gather_matmul(
    x: Tensor, matrices: Sequence[Tensor], group: dist.ProcessGroup, keep_gathered: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The products of all ranks' rows with every matrix and, if wanted, those rows."""
    gathered = wait(start_all_gather(x, group))
    return [gathered @ matrix for matrix in matrices], gathered if keep_gathered else None


def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum over ranks of `x @ matrix`."""
    return wait(start_reduce_scatter(x @ matrix, group))
