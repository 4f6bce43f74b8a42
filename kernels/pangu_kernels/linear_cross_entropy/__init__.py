import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None = None, chunk_size: int = 0
) -> tuple[Tensor, Tensor]:
    logits = (x @ weight.to(x.dtype).T).to(torch.promote_types(x.dtype, torch.float32))
    token_loss = cross_entropy(logits, labels, reduction="none")
    weighted = token_loss if loss_weights is None else token_loss * loss_weights
    return weighted.sum(), token_loss.detach()
