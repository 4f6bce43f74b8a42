"""Small models and streams for the tests of this folder."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pangu.config import ModelConfig
from pangu.model import Transformer, init_weights

LOCAL_FILTERS = (
    "two_convolutions_norm",
    "two_convolutions",
    "convolution_1",
    "convolution_2",
    "convolution_3",
    "convolution_7",
    "exponential_moving_average",
)


def small_config(**changes: Any) -> ModelConfig:
    """Odd sizes: the heads together are wider than the residual stream."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 36,
        "num_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 6 if changes.get("local_filter", "none") != "none" else 3,
        "head_dim": 10,
        "intermediate_size": 52,
    }
    return ModelConfig(**{**sizes, **changes})


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Every parameter random, gains and biases too, so that a swapped or forgotten one shows."""
    model = Transformer(config)
    init_weights(model, seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif "embedding" in name:
                parameter.copy_(0.7 * noise)
            elif "local_filter" not in name or "convolution" in config.local_filter:
                parameter.copy_(0.15 * noise)
    return model


def stream(lengths: Sequence[int], vocab_size: int = 97, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random documents of these lengths: tokens, position_ids, cu_seqlens."""
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return tokens, positions, boundaries(lengths)


def boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def documents(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
    return grads
