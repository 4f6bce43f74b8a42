"""Tensors that an NPU holds and a CPU does not.

torch_npu's operators exist only where it is installed, so that a dry run cannot call them: it makes the tensors that
`pangu_kernels`' Ascend forms make around them. The other forms allocate what the CPU's do, up to a token's statistics.
"""

import torch
from pangu_kernels.linear_cross_entropy.reference import IGNORED
from torch import Tensor


def softmax_cross_entropy_(logits: Tensor, labels: Tensor, token_weights: Tensor, needs_grad: bool) -> Tensor:
    """As `linear_cross_entropy/ascend.py`: CANN returns all log-probabilities, and their gradient beside them."""
    losses, log_probabilities = logits.new_empty(len(logits)), torch.empty_like(logits)
    if needs_grad:
        logits.copy_(torch.empty_like(log_probabilities))
    return losses.masked_fill_(labels == IGNORED, 0)


def attention_mask() -> Tensor:
    """The template of causal documents, which `attention/ascend.py` makes once and keeps."""
    return torch.empty(2048, 2048, dtype=torch.bool)
