"""Output head and cross-entropy on the NPU: the reference's chunks with aclnnCrossEntropyLoss and its gradient.

torch_npu also has the head's matmul and the loss in one (npu_fused_linear_online_max_sum). It recomputes the logits in
backward and takes half precision only, where these chunks compute their gradients at once and keep fp32 logits.
"""

import torch
from torch import Tensor

from pangu_kernels.ascend_support import fusible, warn_unfused
from pangu_kernels.linear_cross_entropy import reference

MAX_ROWS = 200_000


def forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    chunk_size: int,
    x_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (x, weight, labels, loss_weights, chunk_size, x_needs_grad, weight_needs_grad)
    return reference.forward(*arguments, softmax_cross_entropy_)


def softmax_cross_entropy_(logits: Tensor, labels: Tensor, token_weights: Tensor, needs_grad: bool) -> Tensor:
    if len(logits) > MAX_ROWS:
        warn_unfused(
            "linear_cross_entropy",
            f"a chunk has {len(logits)} rows, the fused one takes up to {MAX_ROWS}; set chunk_size",
        )
        return reference.softmax_cross_entropy_(logits, labels, token_weights, needs_grad)
    if not fusible("linear_cross_entropy", x=logits):
        return reference.softmax_cross_entropy_(logits, labels, token_weights, needs_grad)
    present = labels.clamp_min(0)  # a negative ignore_index means none: every label has to be in the vocabulary
    losses, log_probabilities, _, _ = torch.ops.npu.npu_cross_entropy_loss(logits, present, reduction="none")
    if needs_grad:  # the weights of ignored tokens are 0
        logits.copy_(
            torch.ops.npu.npu_cross_entropy_loss_backward(token_weights, log_probabilities, present, reduction="none")
        )
    token_losses: Tensor = losses.masked_fill_(labels == reference.IGNORED, 0)
    return token_losses
