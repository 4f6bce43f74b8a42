"""Output head and cross-entropy on the CPU: the reference's chunks with a compiled softmax for fp32.

It passes three times over a row of logits in the cache, where separate operations pass five times over the chunk.
"""

from torch import Tensor

from pangu_kernels.compiled import kernel, threads
from pangu_kernels.linear_cross_entropy import reference


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
    run = kernel("softmax_cross_entropy", "ppppiiii", logits, token_weights)
    if run is None:
        return reference.softmax_cross_entropy_(logits, labels, token_weights, needs_grad)
    losses = logits.new_empty(len(logits))
    run(
        logits.data_ptr(),
        labels.data_ptr(),
        token_weights.data_ptr(),
        losses.data_ptr(),
        *logits.shape,
        needs_grad,
        threads(logits),
    )
    return losses
