"""Rotary position embeddings (Su et al. 2021) in the half-split layout of GPT-NeoX, Llama and Yuan."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.checks import check_operand, check_tensor
from pangu_kernels.precision import accumulation_dtype
from pangu_kernels.registration import define, implement
from pangu_kernels.rope import ascend, cpu, reference
from pangu_kernels.triton_support import triton_or


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x * cos + rotate_half(x) * sin`, with `rotate_half(a, b) = (-b, a)` on the halves of a head.

    x `[T, heads, D]` with an even D, contiguous in the last dimension; cos and sin `[T, D]`, best in fp32 whatever
    the dtype of x, and without gradient. The result is contiguous, in the dtype of x.

    Raises TypeError for a dtype that is not floating point, ValueError for a shape, device or stride that does not fit.
    """
    check_tensor("rope", "x", x, 3, contiguous=False)
    num_tokens, _, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"rope: the last dimension of x must be even, got {head_dim}")
    check_operand("rope", "cos", cos, (num_tokens, head_dim), x)
    check_operand("rope", "sin", sin, (num_tokens, head_dim), x)
    if torch.is_grad_enabled():
        return _Rope.apply(x, cos, sin)
    return _forward(x, cos, sin)


def table_dtype(x: Tensor) -> torch.dtype:
    """In which dtype the kernel of x's device reads cosines and sines: fp32 (fp64 for fp64), on an NPU that of x.

    Tables in another are cast on an NPU, at every call: whoever calls with the same ones often casts them first.
    """
    return x.dtype if x.device.type == "npu" else accumulation_dtype(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _forward(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        return _backward(d_y.contiguous(), *ctx.saved_tensors), None, None


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_forward = define("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor", reference=reference.forward, fake=_fake)
_backward = define(
    "rope_backward(Tensor d_y, Tensor cos, Tensor sin) -> Tensor", reference=reference.backward, fake=_fake
)
implement("rope", "cpu", cpu.forward)
implement("rope_backward", "cpu", cpu.backward)
implement("rope", "cuda", triton_or(reference.forward))
implement("rope_backward", "cuda", triton_or(reference.backward))
implement("rope", "npu", ascend.forward)
implement("rope_backward", "npu", ascend.backward)
