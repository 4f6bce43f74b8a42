"""Rows of an embedding table, with a dense gradient of the table."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.checks import check_tensor, describe
from pangu_kernels.embedding import cpu, reference
from pangu_kernels.registration import define, implement


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows `[T, H]` of weight `[V, H]` for tokens int64 `[T]`, in the dtype of weight.

    Raises TypeError for wrong dtypes, ValueError for ranks, devices or strides that do not fit.
    """
    check_tensor("embedding", "weight", weight, 2)
    if not isinstance(tokens, Tensor):
        raise TypeError(f"embedding: tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"embedding: tokens must be int64, got {describe(tokens)}")
    if tokens.ndim != 1 or tokens.device != weight.device:
        raise ValueError(f"embedding: tokens must be [T] on {weight.device}, got {describe(tokens)}")
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(tokens, weight)
    return _forward(tokens, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows = len(weight)
        return _forward(tokens, weight)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[None, Tensor]:
        return None, _backward(d_y.contiguous(), *ctx.saved_tensors, ctx.num_rows)


def _fake_forward(tokens: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((len(tokens), weight.shape[1]))


def _fake_backward(d_y: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    return d_y.new_empty((num_rows, d_y.shape[1]))


_forward = define("embedding(Tensor tokens, Tensor weight) -> Tensor", reference=reference.forward, fake=_fake_forward)
_backward = define(
    "embedding_backward(Tensor d_y, Tensor tokens, int num_rows) -> Tensor",
    reference=reference.backward,
    fake=_fake_backward,
)
implement("embedding_backward", "cpu", cpu.backward)
