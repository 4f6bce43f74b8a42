"""Ascend: MC2, matmuls of torch_npu (aclnn) that communicate by themselves.

Limits are those of the operators' documentation; torch_npu checks some of them, and its shape-only kernels none.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD_SIZES = (2, 4, 8)
WORLD_SIZES_A3 = (2, 4, 8, 16, 32)
DEPTHS = range(256, 65535)
DTYPES = (torch.float16, torch.bfloat16)


def limit(x: Tensor, depths: Sequence[int], group: dist.ProcessGroup) -> str | None:
    """Which documented limit a call exceeds."""
    npu: Any = torch.get_device_module("npu")
    is_a3 = npu.get_device_name(x.device).startswith("Ascend910_93")
    world_sizes = WORLD_SIZES_A3 if is_a3 else WORLD_SIZES
    if x.dtype not in DTYPES:
        return f"MC2 computes in fp16 and bf16, x is {x.dtype}"
    if group.size() not in world_sizes:
        return f"MC2 runs on {', '.join(map(str, world_sizes))} ranks, the group has {group.size()}"
    for depth in depths:
        if depth not in DEPTHS:
            return f"MC2 contracts over {DEPTHS.start} to {DEPTHS.stop - 1} elements, not {depth}"
    return None if len(x) > 0 else "x is empty"


def all_gather_matmul(
    x: Tensor, matrices: Sequence[Tensor], group: dist.ProcessGroup, keep_gathered: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The gather is hidden behind the product with the widest matrix; the others get its result."""
    widest = max(range(len(matrices)), key=lambda index: matrices[index].shape[1])
    needs_gathered = keep_gathered or len(matrices) > 1
    first, gathered = torch.ops.npu.npu_all_gather_base_mm(
        x, matrices[widest], _communicator(group), group.size(), gather_output=needs_gathered
    )
    products = [first if index == widest else gathered @ matrix for index, matrix in enumerate(matrices)]
    return products, gathered if keep_gathered else None


def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    return torch.ops.npu.npu_mm_reduce_scatter_base(x, matrix, _communicator(group), group.size(), reduce_op="sum")


def _communicator(group: dist.ProcessGroup) -> str:
    """HCCL's name of the group. The first call makes the communicator, so that all its ranks must call."""
    backend: Any = group._get_backend(torch.device("npu"))
    return backend.get_hccl_comm_name(dist.get_rank())
