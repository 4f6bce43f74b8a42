"""Initial weights: Pangu Ultra's TinyInit and depth-scaled gains, and the schemes they are compared with.

A parameter's values depend on the seed and its name alone, neither on the order of construction nor on the device, and
any rows of it can be drawn without the rest: that is how a sharded model gets the weights of an unsharded one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pangu.config import ModelConfig
from pangu.model.local_filter import filter_context
from pangu.model.seeding import generator
from pangu.model.transformer import Transformer

BLOCK_ELEMENTS = 2**24
"""Values drawn from one generator. Bounds what initialization needs besides the weights (64 MB)."""

_SUBLAYER_OUTPUTS = ("output_proj", "down_proj")
_LINEARS = ("q_proj", "kv_proj", "qk_proj", "v_proj", "gate_up_proj", "head", *_SUBLAYER_OUTPUTS)


@dataclass(frozen=True)
class Distribution:
    """Of initial values: `constant` (scale itself), `normal` (mean 0, deviation scale), `uniform` (-scale to scale)."""

    kind: Literal["constant", "normal", "uniform"]
    scale: float


def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter in place. Works on any device, and on a model built on meta and then given memory."""
    for name, parameter in model.named_parameters():
        rows = parameter.detach().view(-1, parameter.shape[-1])
        block = _rows_per_block(parameter.shape)
        for start in range(0, len(rows), block):
            stop = min(start + block, len(rows))
            rows[start:stop].copy_(initial_rows(model.config, name, parameter.shape, start, stop, seed))


def initial_rows(config: ModelConfig, name: str, shape: Sequence[int], start: int, stop: int, seed: int) -> Tensor:
    """Rows start to stop of a parameter's initial value seen as `[-1, shape[-1]]`: fp32 on the CPU.

    shape is the parameter's whole, unsharded shape. Draws at most two blocks beyond what is asked for.
    """
    distribution = initial_distribution(config, name)
    width, num_rows, block = shape[-1], math.prod(shape[:-1]), _rows_per_block(shape)
    pieces = []
    for first in range(start - start % block, stop, block):
        values = torch.empty(min(block, num_rows - first), width)
        _draw(values, distribution, generator(seed, name, first // block))
        pieces.append(values[max(start - first, 0) : stop - first])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def initial_distribution(config: ModelConfig, name: str) -> Distribution:
    """What the parameter of this (global) name starts as."""
    *_, module, kind = name.split(".")
    if module == "local_filter":
        return _local_filter_distribution(config, kind)
    if module == "post_attention_norm":
        return Distribution("constant", _post_norm_gain(config, config.attention_post_norm_gain))
    if module == "post_feed_forward_norm":
        return Distribution("constant", _post_norm_gain(config, config.feed_forward_post_norm_gain))
    if module.endswith("norm"):
        return Distribution("constant", 1.0)
    if kind == "bias":
        return Distribution("constant", 0.0)
    if module == "embedding":
        return Distribution("normal", config.embedding_std)
    if module in _LINEARS:
        return Distribution("normal", _linear_std(config, is_output=module in _SUBLAYER_OUTPUTS))
    raise KeyError(f"no initialization is defined for parameter {name!r}")


def _post_norm_gain(config: ModelConfig, c: float) -> float:
    """c / sqrt(L) (Pangu Ultra, equation 1; its text says "inverse of the depth", its formula the inverse root)."""
    return c / math.sqrt(config.num_layers) if config.norm_placement == "depth_scaled_sandwich" else 1.0


def _linear_std(config: ModelConfig, is_output: bool) -> float:
    hidden, layers = config.hidden_size, config.num_layers
    match config.initialization:
        case "tiny":  # Pangu Ultra, section 2.2
            return math.sqrt(1 / (2 * hidden * layers))
        case "small":  # the baseline it replaced
            return math.sqrt(2 / (5 * hidden * (layers if is_output else 1)))
        case "megatron":
            return 0.02 / math.sqrt(2 * layers) if is_output else 0.02


def _local_filter_distribution(config: ModelConfig, kind: str) -> Distribution:
    if config.local_filter == "exponential_moving_average":  # as MEGA; the sign of beta is that of eta
        return {
            "alpha": Distribution("normal", 0.2),
            "delta": Distribution("normal", 0.2),
            "beta": Distribution("constant", 1.0),
            "eta": Distribution("normal", 1.0),
            "omega": Distribution("normal", 1.0),
        }[kind]
    # PyTorch's default for a convolution, weight and bias alike: uniform within 1 / sqrt(input channels * taps).
    if config.local_filter.startswith("two_convolutions"):
        fan_in = 2 * (config.hidden_size // 2 if kind.endswith("2") else config.hidden_size)
    else:
        fan_in = (filter_context(config) + 1) * config.hidden_size
    return Distribution("uniform", fan_in**-0.5)


def _draw(out: Tensor, distribution: Distribution, source: torch.Generator) -> None:
    match distribution.kind:
        case "constant":
            out.fill_(distribution.scale)
        case "normal":
            out.normal_(0.0, distribution.scale, generator=source)
        case "uniform":
            out.uniform_(-distribution.scale, distribution.scale, generator=source)


def _rows_per_block(shape: Sequence[int]) -> int:
    return max(1, BLOCK_ELEMENTS // shape[-1])
