"""The two convolutions of Yuan 2.0's localized filtering-based attention (section 3.1, figures 1 and 2)."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.checks import check_boundaries, check_operand, check_tensor
from pangu_kernels.local_filter import reference
from pangu_kernels.registration import define, implement
from pangu_kernels.triton_support import triton_or


def local_filter(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """`conv2(conv1(x))` along each document: two causal taps each, H to C to H channels, no residual and no norm.

    x `[T, H]`; weight1 `[C, H, 2]`, bias1 `[C]`, weight2 `[H, C, 2]`, bias2 `[H]`, cast to the dtype of x, with C = H/2
    in Yuan 2.0 and a share of it where channels are dealt over devices; tap 1 for the token itself and tap 0 for the
    one before; cu_seqlens int32 `[N+1]` from 0 to T, on the CPU. Before the first token of a document both convolutions
    see zeros: conv1's output there is 0, not its bias.

    Token t depends on t - 2, t - 1 and t. To decode, keep the last two inputs of each sequence: call with those and
    the new ones as one document, and drop the results of the old ones (the last result is then exact). A sequence with
    fewer than two tokens so far passes the tokens it has: zeros in their place would become conv1's bias.

    Raises TypeError for wrong dtypes, ValueError for shapes, devices, strides or boundaries that do not fit.
    """
    check_tensor("local_filter", "x", x, 2)
    check_tensor("local_filter", "weight1", weight1, 3)
    size, channels = x.shape[1], len(weight1)
    check_operand("local_filter", "weight1", weight1, (channels, size, 2), x)
    check_operand("local_filter", "bias1", bias1, (channels,), x)
    check_operand("local_filter", "weight2", weight2, (size, channels, 2), x)
    check_operand("local_filter", "bias2", bias2, (size,), x)
    check_boundaries("local_filter", "cu_seqlens", cu_seqlens)
    if torch.is_grad_enabled():
        return _LocalFilter.apply(x, weight1, bias1, weight2, bias2, cu_seqlens)
    return _forward(x, weight1, bias1, weight2, bias2, cu_seqlens)[0]


class _LocalFilter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        y, hidden = _forward(x, weight1, bias1, weight2, bias2, cu_seqlens)
        ctx.save_for_backward(x, hidden, weight1, weight2, cu_seqlens)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(d_y.contiguous(), *ctx.saved_tensors), None


def _fake_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((len(x), len(bias1)))


def _fake_backward(
    d_y: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, ...]:
    d_bias1, d_bias2 = weight1.new_empty(len(weight1)), weight2.new_empty(len(weight2))
    return torch.empty_like(x), torch.empty_like(weight1), d_bias1, torch.empty_like(weight2), d_bias2


_forward = define(
    "local_filter(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor cu_seqlens)"
    " -> (Tensor y, Tensor hidden)",
    reference=reference.forward,
    fake=_fake_forward,
)
_backward = define(
    "local_filter_backward(Tensor d_y, Tensor x, Tensor hidden, Tensor weight1, Tensor weight2, Tensor cu_seqlens)"
    " -> (Tensor d_x, Tensor d_weight1, Tensor d_bias1, Tensor d_weight2, Tensor d_bias2)",
    reference=reference.backward,
    fake=_fake_backward,
)
implement("local_filter", "cuda", triton_or(reference.forward))
implement("local_filter_backward", "cuda", triton_or(reference.backward))
