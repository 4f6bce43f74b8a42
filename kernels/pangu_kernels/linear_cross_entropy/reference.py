"""Output head and cross-entropy by PyTorch operations, a chunk of tokens at a time.

The gradients are computed with the loss, while a chunk's logits are at hand: two matmuls besides the logits' own. To
recompute the logits in backward would take a fourth and save nothing: the gradient of the weight, the only large thing
kept, lives until the optimizer's step anyway.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pangu_kernels import large_memory
from pangu_kernels.checks import readable
from pangu_kernels.precision import accumulation_dtype, widen

ChunkLoss = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

IGNORED = -100
CHUNK_BYTES = 2**27
"""fp32 logits held at once: below about 100 rows of a large vocabulary the matmuls slow down, above nothing is won."""


def softmax_cross_entropy_(logits: Tensor, labels: Tensor, token_weights: Tensor, needs_grad: bool) -> Tensor:
    """Losses `[C]` of logits `[C, V]`, which become `token_weights * (softmax - one_hot(labels))` in place."""
    present = labels.clamp_min(0)
    maximum = logits.amax(-1)
    label_logit = logits.gather(1, present.unsqueeze(1)).squeeze(1)
    total = logits.sub_(maximum.unsqueeze(1)).exp_().sum(-1)
    if needs_grad:
        logits.mul_((token_weights / total).unsqueeze(1))
        logits[torch.arange(len(labels), device=labels.device), present] -= token_weights
    return (total.log() + maximum - label_logit).masked_fill_(labels == IGNORED, 0)


def forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    chunk_size: int,
    x_needs_grad: bool,
    weight_needs_grad: bool,
    loss_and_gradient_: ChunkLoss = softmax_cross_entropy_,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, every token's loss, d_x and d_weight; a gradient that is not needed is an empty tensor.

    A device with a kernel for the softmax of a chunk passes it in place of the one above. vocab_size: what labels are
    below, where weight is only a shard of the vocabulary.
    """
    needs_grad = x_needs_grad or weight_needs_grad
    _check_labels(labels, len(weight) if vocab_size is None else vocab_size)
    dtype = accumulation_dtype(x.dtype)
    ignored = labels == IGNORED
    token_weights = (~ignored).to(dtype) if loss_weights is None else loss_weights.to(dtype).masked_fill(ignored, 0)
    weight_as_x = weight.to(x.dtype)
    token_loss = x.new_empty(len(x), dtype=dtype)
    d_x = x.new_empty(x.shape if x_needs_grad else 0)
    d_weight = large_memory.empty(x, weight.shape if weight_needs_grad else (0,), dtype)
    rows = _rows_per_chunk(len(x), len(weight), chunk_size)
    buffer = large_memory.empty(x, (rows, len(weight)), x.dtype)
    for start in range(0, len(x), rows):
        chunk = slice(start, min(start + rows, len(x)))
        logits = widen(torch.mm(x[chunk], weight_as_x.T, out=buffer[: chunk.stop - start]))
        token_loss[chunk] = loss_and_gradient_(logits, labels[chunk], token_weights[chunk], needs_grad)
        if x_needs_grad:
            torch.mm(logits.to(x.dtype), weight_as_x, out=d_x[chunk])
        if weight_needs_grad:  # with beta 0, in the first chunk, what the buffer held does not matter
            torch.addmm(d_weight, logits.T, widen(x[chunk]), beta=int(start > 0), out=d_weight)
    if not len(x):
        d_weight.zero_()
    return token_loss @ token_weights, token_loss, d_x, d_weight.to(weight.dtype)


def backward(d_loss: Tensor, d_x: Tensor, d_weight: Tensor) -> None:
    """Scale the gradients, in place: a second tensor as large as the weight would be the peak of the whole step."""
    if readable(d_loss) and d_loss.item() == 1:
        return
    d_x.mul_(d_loss)
    d_weight.mul_(d_loss)


def _rows_per_chunk(num_tokens: int, vocab_size: int, chunk_size: int) -> int:
    most = chunk_size or max(1, CHUNK_BYTES // (4 * vocab_size))
    num_chunks = -(-num_tokens // most) or 1
    return -(-num_tokens // num_chunks) or 1  # the last chunk is about as large as the others


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    if readable(labels) and len(labels):
        low, high = (bound.item() for bound in labels.aminmax())
        if high >= vocab_size or low < IGNORED or (low < 0 and bool(((labels < 0) & (labels != IGNORED)).any())):
            raise ValueError(
                f"linear_cross_entropy: labels must be {IGNORED} or from 0 to {vocab_size - 1}, "
                f"got values from {low} to {high}"
            )
