"""What the model is fed: a flat stream of tokens with boundaries, no batch dimension and no padding."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Packed sequences laid end to end; T = micro_batch_size * sequence_length."""

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, the next token; IGNORED_LABEL where there is none
    position_ids: Tensor  # [T] int64, what rotary embeddings see
    cu_seqlens: Tensor  # [N + 1] int32 on the CPU, from 0 to T: attention stays between two neighbours
    loss_weights: Tensor | None = None  # [T] fp32

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on `device`. `cu_seqlens` stays on the CPU, where the operators want it."""
        weights = self.loss_weights
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
            loss_weights=None if weights is None else weights.to(device, non_blocking=non_blocking),
        )

    def scaled(self, factor: float) -> "Batch":
        """With every token's loss multiplied by `factor`, on top of what `loss_weights` say."""
        weights = self.loss_weights
        if weights is None:
            weights = torch.ones(self.labels.shape, device=self.labels.device)
        return replace(self, loss_weights=weights * factor)

    def num_labels(self) -> int:
        """Positions that have a label, the denominator of the mean loss."""
        return int((self.labels != IGNORED_LABEL).sum())
