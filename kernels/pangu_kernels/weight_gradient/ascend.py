"""Ascend: the weight's gradient added where it belongs by the matmul itself, of MindSpeed or of torch_npu.

MindSpeed (its own C++ over ATB) is used where it is installed; its package changes Megatron when it is imported, so
that is left until the first gradient. Limits of torch_npu's operator are those of its documentation.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pangu_kernels.weight_gradient import cuda

_WIDEST = 65535


def add_(accumulator: Tensor, d_y: Tensor, x: Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.numel() or not d_y.numel():
        return cuda.add_(accumulator, d_y, x)
    matmul_add = _mindspeed()
    if matmul_add is not None:
        return matmul_add(x.contiguous(), d_y.contiguous(), accumulator)
    if max(accumulator.shape) > _WIDEST:
        return cuda.add_(accumulator, d_y, x)
    group_ends = torch.full((1,), len(x), dtype=torch.int64, device=x.device)  # one group: all tokens
    torch.ops.npu.npu_grouped_matmul_add_(accumulator.unsqueeze(0), d_y, x, group_ends)
    return None


@functools.cache
def _mindspeed() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """MindSpeed's `npu_matmul_add_fp32(total_input, grad_output, grad)`, if there is a MindSpeed."""
    if importlib.util.find_spec("mindspeed") is None:
        return None
    module: Any = importlib.import_module("mindspeed.ops.npu_matmul_add")
    function: Callable[[Tensor, Tensor, Tensor], None] = module.npu_matmul_add_fp32
    return function
