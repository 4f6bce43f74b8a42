"""What the NPU's kernels (`*/ascend.py`) share.

They call torch_npu's operators as `torch.ops.npu.*`, which are there once torch_npu is imported: before the first
tensor on an NPU exists. Their schemas are in `ascend_schemas.json`, and a test holds every call to them.
"""

import functools
import logging

import torch
from torch import Tensor

from pangu_kernels.checks import describe

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def fusible(operator: str, **tensors: Tensor | None) -> bool:
    """Whether CANN's kernels can compute on these: fp32, bf16 or fp16, with something in them."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            warn_unfused(operator, f"{name} is {describe(tensor).split()[0]}, the fused one takes fp32, bf16 and fp16")
            return False
    return all(tensor is None or tensor.numel() for tensor in tensors.values())


@functools.cache
def warn_unfused(operator: str, reason: str) -> None:
    """Once per reason. What falls back for want of anything to compute is not worth a word."""
    logging.getLogger(__name__).warning("%s runs unfused on the NPU, slower: %s", operator, reason)
