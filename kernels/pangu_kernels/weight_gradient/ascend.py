"""Ascend: the weight's gradient added where it belongs by the matmul itself, of MindSpeed or of torch_npu.

MindSpeed (its own C++ over ATB) is used where it is installed; its package changes Megatron when it is imported, so
that is left until the first gradient. Limits of torch_npu's operator are those of its documentation.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pangu_kernels.ascend_support import warn_unfused
from pangu_kernels.weight_gradient import cuda

_WIDEST = 65535


def add_(accumulator: Tensor, d_y: Tensor, x: Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.numel() or not d_y.numel():
        return cuda.add_(accumulator, d_y, x)
    matmul_add = _mindspeed()
    if matmul_add is not None:
        return matmul_add(x.contiguous(), d_y.contiguous(), accumulator)
    if max(accumulator.shape) > _WIDEST:
        warn_unfused("add_weight_gradient", f"accumulator is {list(accumulator.shape)}, the fused one takes {_WIDEST}")
        return cuda.add_(accumulator, d_y, x)
    group_ends = torch.full((1,), len(x), dtype=torch.int64, device=x.device)  # one group: all tokens
    torch.ops.npu.npu_grouped_matmul_add_(accumulator.unsqueeze(0), d_y, x, group_ends)
    return None


@functools.cache
def _mindspeed() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """MindSpeed's `npu_matmul_add_fp32(total_input, grad_output, grad)`, if there is a MindSpeed that loads."""
    if importlib.util.find_spec("mindspeed") is None:
        return None
    try:
        module: Any = importlib.import_module("mindspeed.ops.npu_matmul_add")
    except ImportError as error:
        logging.getLogger(__name__).warning("MindSpeed is installed but does not load, torch_npu is used: %s", error)
        return None
    function: Callable[[Tensor, Tensor, Tensor], None] = module.npu_matmul_add_fp32
    return function
