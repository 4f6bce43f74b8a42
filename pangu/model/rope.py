"""Rotary position embeddings (Su et al. 2021) in the half-split layout of Llama, Yuan and openPangu."""

import torch
from torch import Tensor


def rotary_tables(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each fp32 `[T, head_dim]`, for `position_ids` `[T]`.

    Dimension i and i + head_dim/2 of a head turn together by `position * base^(-2i / head_dim)`. The tables stay fp32
    whatever the compute dtype: near position 128K neighbouring bf16 numbers are 512 positions apart.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / base**exponents  # rounded before the product, as transformers does: near 128K it shows
    angles = position_ids.float()[:, None] * frequencies  # [T, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)  # [T, head_dim]
    return angles.cos(), angles.sin()
