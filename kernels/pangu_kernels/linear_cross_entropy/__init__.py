"""Output head and cross-entropy in one, without the logits (the block-wise cross-entropy of Yuan 2.0, section 3.4)."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.checks import check_operand, check_tensor, describe
from pangu_kernels.linear_cross_entropy import ascend, cpu, reference
from pangu_kernels.precision import accumulation_dtype
from pangu_kernels.registration import define, implement
from pangu_kernels.triton_support import triton_or


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None = None, chunk_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `logits = x weight^T` and labels, of which only `chunk_size` rows exist at once.

    x `[T, H]`; weight `[V, H]`, cast to the dtype of x for the matmul; labels int64 `[T]`, -100 for none; loss_weights
    `[T]`, all 1 when absent; chunk_size 0 for 128 MB of fp32 logits. Statistics and the accumulation of the weight's
    gradient are fp32 (fp64 for fp64).

    Returns the sum over tokens of `loss_weights * loss` `[]` in nats, and each token's unweighted loss `[T]` without
    gradient, both fp32 (fp64 for fp64). Gradients are computed at once where they are needed, and backward scales them
    in place: it runs once (`retain_graph` does not help).

    Raises TypeError for wrong dtypes; ValueError for shapes, devices or strides that do not fit, a negative chunk_size,
    and on the CPU for labels outside the vocabulary.
    """
    _check(x, weight, labels, loss_weights, chunk_size)
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(x, weight, labels, loss_weights, chunk_size)
    loss_sum, token_loss, _, _ = _forward(x, weight, labels, loss_weights, chunk_size, False, False)
    return loss_sum, token_loss


def _check(x: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, chunk_size: int) -> None:
    check_tensor("linear_cross_entropy", "x", x, 2)
    check_tensor("linear_cross_entropy", "weight", weight, 2)
    check_operand("linear_cross_entropy", "weight", weight, (len(weight), x.shape[1]), x)
    if not isinstance(labels, Tensor):
        raise TypeError(f"linear_cross_entropy: labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: labels must be int64, got {describe(labels)}")
    if labels.shape != x.shape[:1] or labels.device != x.device:
        raise ValueError(f"linear_cross_entropy: labels must be [{len(x)}] on {x.device}, got {describe(labels)}")
    if loss_weights is not None:
        check_operand("linear_cross_entropy", "loss_weights", loss_weights, labels.shape, x)
    if chunk_size < 0:
        raise ValueError(f"linear_cross_entropy: chunk_size must not be negative, got {chunk_size}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        loss_sum, token_loss, d_x, d_weight = _forward(
            x, weight, labels, loss_weights, chunk_size, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(d_x, d_weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(token_loss)
        return loss_sum, token_loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, d_token_loss: None) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return None, None, None, None, None
        d_x, d_weight = ctx.saved_tensors
        _backward(d_loss, d_x, d_weight)
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        return d_x if x_needs_grad else None, d_weight if weight_needs_grad else None, None, None, None


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    chunk_size: int,
    x_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(len(x), dtype=dtype),
        x.new_empty(x.shape if x_needs_grad else 0),
        weight.new_empty(weight.shape if weight_needs_grad else 0),
    )


def _fake_backward(d_loss: Tensor, d_x: Tensor, d_weight: Tensor) -> None:
    pass


_forward = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor? loss_weights, int chunk_size,"
    " bool x_needs_grad, bool weight_needs_grad)"
    " -> (Tensor loss_sum, Tensor token_loss, Tensor d_x, Tensor d_weight)",
    reference=reference.forward,
    fake=_fake_forward,
)
_backward = define(
    "linear_cross_entropy_backward(Tensor d_loss, Tensor(a!) d_x, Tensor(b!) d_weight) -> ()",
    reference=reference.backward,
    fake=_fake_backward,
)
implement("linear_cross_entropy", "cpu", cpu.forward)
implement("linear_cross_entropy", "cuda", triton_or(reference.forward))
implement("linear_cross_entropy", "npu", ascend.forward)
