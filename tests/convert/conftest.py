from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pangu.config import ModelConfig
from pangu.model import Transformer
from pangu.tokenizer.pieces import ALPHABET, serialize

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "norm_placement": "pre",
    "rope_base": 5000.0,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model_config() -> Callable[..., ModelConfig]:
    """A small model; keywords replace fields."""
    return lambda **changes: ModelConfig(**{**SIZES, **changes})


@pytest.fixture
def random_model() -> Callable[[ModelConfig], Transformer]:
    """A model of which every parameter, norm gains and biases too, is random, so that none can be mistaken."""

    def build(config: ModelConfig) -> Transformer:
        generator = torch.Generator().manual_seed(0)
        model = Transformer(config)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
        return model

    return build


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (23,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def our_logits() -> Callable[[Transformer, Tensor], Tensor]:
    """Logits [T, V] of one document."""

    def run(model: Transformer, tokens: Tensor) -> Tensor:
        boundaries = torch.tensor([0, len(tokens)], dtype=torch.int32)
        with torch.no_grad():
            return model.logits(model(tokens, torch.arange(len(tokens)), boundaries))

    return run


@pytest.fixture
def alphabet_tokenizer(tmp_path: Path) -> Path:
    """The model file of a tokenizer of 361 pieces: the special ones, bytes and single characters."""
    path = tmp_path / "alphabet.model"
    path.write_bytes(serialize(dict.fromkeys(ALPHABET, -1000)))
    return path
