# mypy: allow-untyped-defs
"""Output head and cross-entropy in Triton: the reference's chunks and matmuls, with one kernel for their softmax."""

import triton
import triton.language as tl
from torch import Tensor

from pangu_kernels.linear_cross_entropy import reference
from pangu_kernels.triton_support import supports
from pangu_kernels.triton_tiles import tile_shape


def forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    chunk_size: int,
    x_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (x, weight, labels.contiguous(), loss_weights, chunk_size, x_needs_grad, weight_needs_grad)
    return reference.forward(*arguments, softmax_cross_entropy_)


def softmax_cross_entropy_(logits: Tensor, labels: Tensor, token_weights: Tensor, needs_grad: bool) -> Tensor:
    if not supports(logits, token_weights):
        return reference.softmax_cross_entropy_(logits, labels, token_weights, needs_grad)
    losses = logits.new_empty(len(logits))
    columns = tile_shape(logits.shape[1])["COLUMNS"]
    softmax_kernel[(len(logits),)](
        logits, labels, token_weights, losses, logits.shape[1], NEEDS_GRAD=needs_grad, COLUMNS=columns
    )
    return losses


@triton.jit
def softmax_kernel(logits, labels, token_weights, losses, size, NEEDS_GRAD: tl.constexpr, COLUMNS: tl.constexpr):
    """A program per token: one walk along its logits for loss and softmax's total, one to put d_logits in their place.

    With the largest logit so far, the total so far is scaled down whenever that grows (Milakov and Gimelshein 2018).
    """
    token = tl.program_id(0)
    logits += token.to(tl.int64) * size
    label = tl.load(labels + token)
    maximum, total, label_logit = float("-inf"), 0.0, 0.0
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        tile = tl.load(logits + column, column < size, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(tile))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(tile - new_maximum))
        label_logit += tl.sum(tl.where(column == label, tile, 0.0))
        maximum = new_maximum
    tl.store(losses + token, tl.where(label < 0, 0.0, tl.log(total) + maximum - label_logit))
    if NEEDS_GRAD:
        token_weight = tl.load(token_weights + token)
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            tile = tl.load(logits + column, column < size)
            softmax = tl.exp(tile - maximum) / total
            one_hot = tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, token_weight * (softmax - one_hot), column < size)
