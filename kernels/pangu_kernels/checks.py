"""Argument checks: one line per tensor in an operator, about a microsecond when all is well."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_tensor(operator: str, name: str, tensor: Tensor, dim: int | None = None, *, contiguous: bool = True) -> None:
    """Refuse what is not a floating-point tensor of `dim` dimensions, contiguous or at least in its last one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{operator}: {name} must be fp32, bf16, fp16 or fp64, got {describe(tensor)}")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{operator}: {name} must have {dim} dimensions, got {describe(tensor)}")
    if not tensor.is_contiguous() and (contiguous or tensor.stride(-1) != 1):
        which = name if contiguous else f"the last dimension of {name}"
        raise ValueError(
            f"{operator}: {which} must be contiguous, got strides {tensor.stride()} of {describe(tensor)}; "
            "call .contiguous() first"
        )


def check_operand(
    operator: str, name: str, tensor: Tensor, shape: Sequence[int], beside: Tensor, *, contiguous: bool = True
) -> None:
    """`check_tensor`, and refuse another shape than `shape` or another device than that of `beside`."""
    check_tensor(operator, name, tensor, contiguous=contiguous)
    if tensor.shape != shape:
        raise ValueError(f"{operator}: {name} must have shape {list(shape)}, got {describe(tensor)}")
    if tensor.device != beside.device:
        raise ValueError(f"{operator}: {name} must be on {beside.device}, got {describe(tensor)}")


def check_boundaries(operator: str, name: str, cu_seqlens: Tensor) -> None:
    """Refuse what is not `int32 [N+1]` on the CPU; `document_bounds` checks the numbers in it."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{operator}: {name} must be int32, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{operator}: {name} must have one dimension and at least one element, got {describe(cu_seqlens)}"
        )
    if cu_seqlens.device.type != "cpu":
        raise ValueError(f"{operator}: {name} must be on the CPU whatever the device, got {describe(cu_seqlens)}")


def document_bounds(operator: str, name: str, cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """`cu_seqlens` as a list, refused unless it rises from 0 to `num_tokens`.

    Called by kernels, not by public functions: reading a tensor's numbers would break the graph of torch.compile.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(start > stop for start, stop in pairwise(bounds)):
        raise ValueError(f"{operator}: {name} must rise from 0 to the number of tokens {num_tokens}, got {bounds}")
    return bounds


def check_same_dtype(operator: str, name: str, tensor: Tensor, beside: Tensor) -> None:
    if tensor.dtype != beside.dtype:
        raise TypeError(f"{operator}: {name} must be {describe(beside).split()[0]}, got {describe(tensor)}")


def describe(tensor: Tensor) -> str:
    """`bfloat16 [4, 8] on cpu`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def readable(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values is free: an accelerator would have to stop for it, a dry run has none."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
