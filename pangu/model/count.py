"""Parameters and floating-point operations of a model, in closed form: nothing is allocated."""

from typing import Literal

from pangu.config import ModelConfig
from pangu.model.local_filter import EMA_DIMENSIONS, filter_context


def num_parameters(config: ModelConfig, embedding: bool = True) -> int:
    """Trainable values of the model, a tied table counted once. embedding=False leaves out the input table and, when
    it is tied, with it the head."""
    hidden, vocab = config.hidden_size, config.vocab_size
    tables = (1 if embedding else 0) + (0 if config.tie_embeddings else 1)
    return tables * vocab * hidden + config.num_layers * layer_parameters(config) + hidden


def layer_parameters(config: ModelConfig) -> int:
    """Trainable values of one block: matmul weights, biases, norm gains."""
    hidden = config.hidden_size
    norms = hidden * (4 if config.has_post_norm else 2)
    attention_biases = config.query_size + 2 * config.key_value_size + hidden
    feed_forward_biases = 2 * config.intermediate_size + hidden
    return (
        layer_matmul_parameters(config)
        + norms
        + config.attention_bias * attention_biases
        + config.feed_forward_bias * feed_forward_biases
        + _local_filter_other_parameters(config)
    )


def layer_matmul_parameters(config: ModelConfig) -> int:
    """Weights of one block that multiply every token's vector once: projections and the local filter's taps."""
    hidden = config.hidden_size
    attention = hidden * (2 * config.query_size + 2 * config.key_value_size)
    feed_forward = 3 * hidden * config.intermediate_size
    return attention + feed_forward + _local_filter_matmul_parameters(config)


def flops_per_token(
    config: ModelConfig, sequence_length: int, attention: Literal["causal", "full"] = "causal"
) -> float:
    """Model FLOPs of forward and backward per token, without recomputation: what MFU counts.

    6 x matmul parameters (blocks and head; the embedding is a look-up) + attention's two S x S products: 12 L a d S
    when every position counts ("full", as PaLM and Megatron), half of it when only those up to the token do
    ("causal").
    Sequences packed from shorter documents are counted as one of sequence_length.
    """
    matmul = config.num_layers * layer_matmul_parameters(config) + config.vocab_size * config.hidden_size
    products = 12 * config.num_layers * config.query_size * sequence_length
    return 6 * matmul + products / (2 if attention == "causal" else 1)


def _local_filter_matmul_parameters(config: ModelConfig) -> int:
    hidden = config.hidden_size
    match config.local_filter:
        case "none" | "exponential_moving_average":
            return 0
        case "two_convolutions_norm" | "two_convolutions":
            return 2 * hidden * (hidden // 2) * 2
    return (filter_context(config) + 1) * hidden * hidden


def _local_filter_other_parameters(config: ModelConfig) -> int:
    hidden = config.hidden_size
    match config.local_filter:
        case "none":
            return 0
        case "two_convolutions_norm":
            return hidden // 2 + hidden + hidden
        case "two_convolutions":
            return hidden // 2 + hidden
        case "exponential_moving_average":
            return (4 * EMA_DIMENSIONS + 1) * hidden
    return hidden
