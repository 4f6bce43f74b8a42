"""CUDA: PyTorch's fused operators over symmetric memory, in which ranks of a node read one another's memory."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # defines torch.ops.symm_mem
from torch import Tensor


def limit(x: Tensor, depths: Sequence[int], group: dist.ProcessGroup) -> str | None:
    """Why symmetric memory cannot be used: seen from here, whether the group fits into a node is all that is known."""
    devices = torch.cuda.device_count()
    if group.size() > devices:
        return f"symmetric memory is of one node, which has {devices} devices, the group has {group.size()} ranks"
    return None if len(x) > 0 else "x is empty"


def all_gather_matmul(
    x: Tensor, matrices: Sequence[Tensor], group: dist.ProcessGroup, keep_gathered: bool
) -> tuple[list[Tensor], Tensor | None]:
    gathered, products = torch.ops.symm_mem.fused_all_gather_matmul(
        x, list(matrices), 0, group.group_name, return_A=keep_gathered
    )
    return products, gathered


def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, matrix, "sum", 0, group.group_name)
