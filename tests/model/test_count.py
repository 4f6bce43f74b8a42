import pytest
import torch
from model_helpers import LOCAL_FILTERS, small_config

from pangu.config import NAMED_CONFIGS, ModelConfig, load
from pangu.model import Transformer
from pangu.model.count import flops_per_token, layer_parameters, num_parameters


def counted(config: ModelConfig) -> int:
    """Elements of every parameter of a model built without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(path.stem for path in NAMED_CONFIGS.glob("*.toml")))
def test_closed_form_equals_the_model(name: str) -> None:
    config = load(name).model
    assert num_parameters(config) == counted(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "pre", "tie_embeddings": True},
        {"attention_bias": True},
        {"feed_forward_bias": True},
        *({"local_filter": name, "attention_bias": True} for name in LOCAL_FILTERS),
    ],
    ids=str,
)
def test_closed_form_equals_small_models(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    assert num_parameters(config) == counted(config)


@pytest.mark.parametrize(("name", "billions"), [("yuan2_2b", 2.0885), ("yuan2_51b", 51.84), ("yuan2_102b", 102.575)])
def test_yuan(name: str, billions: float) -> None:
    """18 L h^2 + V h of the paper, and what it leaves out: per layer three norms and the convolutions' biases."""
    config = load(name).model
    hidden, layers = config.hidden_size, config.num_layers
    published = 18 * layers * hidden**2 + config.vocab_size * hidden
    assert published / 1e9 == pytest.approx(billions, abs=0.5 * 10 ** -len(str(billions).split(".")[1]))
    extras = layers * (3 * hidden + hidden // 2 + hidden) + hidden
    assert num_parameters(config) == published + extras


def test_pangu_ultra() -> None:
    """94 layers of 327.16M (attention) and 1056.96M (feed-forward), two tables of 1.885B (derived from the report)."""
    config = load("pangu_ultra_135b").model
    attention = 2 * 12288**2 + 2 * 12288 * 1024
    feed_forward = 3 * 12288 * 28672
    assert layer_parameters(config) == attention + feed_forward + 4 * 12288
    assert num_parameters(config) == 94 * layer_parameters(config) + 2 * 153376 * 12288 + 12288
    assert num_parameters(config) / 1e9 == pytest.approx(133.88, abs=0.005)


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "wide", "query", "key_value", "tables"),
    [("openpangu_1b", 1536, 26, 6144, 1536, 768, 1), ("openpangu_7b", 4096, 34, 12800, 4096, 1024, 2)],
)
def test_openpangu(name: str, hidden: int, layers: int, wide: int, query: int, key_value: int, tables: int) -> None:
    projections = hidden * (query + 2 * key_value) + query * hidden
    biases = query + 2 * key_value + hidden
    layer = projections + biases + 3 * hidden * wide + 2 * hidden
    assert num_parameters(load(name).model) == layers * layer + tables * 153376 * hidden + hidden


@pytest.mark.parametrize(
    ("local_filter", "millions"),
    [
        ("none", 160.3),
        ("exponential_moving_average", 160.6),
        ("convolution_1", 163.9),
        ("convolution_2", 167.4),
        ("convolution_3", 171.0),
        ("convolution_7", 185.1),
        ("two_convolutions", 167.4),
        ("two_convolutions_norm", 167.4),
    ],
)
def test_yuan_ablation(local_filter: str, millions: float) -> None:
    """Yuan 2.0, table 1: its proxy model has 6 layers of width 768."""
    config = ModelConfig(
        vocab_size=135_040,
        hidden_size=768,
        num_layers=6,
        num_attention_heads=12,
        intermediate_size=4 * 768,
        norm_placement="pre",
        tie_embeddings=True,
        local_filter=local_filter,  # type: ignore[arg-type]
    )
    assert counted(config) / 1e6 == pytest.approx(millions, abs=0.05)


def test_embedding_is_counted_once() -> None:
    tied, untied = small_config(tie_embeddings=True), small_config()
    table = 97 * 36
    assert num_parameters(untied) - num_parameters(tied) == table
    assert num_parameters(untied) - num_parameters(untied, embedding=False) == table
    assert num_parameters(tied) - num_parameters(tied, embedding=False) == table


def test_flops_of_pangu_ultra() -> None:
    """6 N + 12 L a d S at 4K is 849 GF per token, 820 with causal attention (derived from the report)."""
    config = load("pangu_ultra_135b").model
    assert flops_per_token(config, 4096, "full") / 1e9 == pytest.approx(849, abs=0.5)
    assert flops_per_token(config, 4096) / 1e9 == pytest.approx(820, abs=0.5)


def test_flops_equal_those_of_the_matmuls() -> None:
    """Forward and twice as much backward of every weight matrix but the embedding, and of the attention products."""
    config = small_config(local_filter="convolution_3")
    tokens = 5
    with torch.device("meta"):
        model = Transformer(config)
        matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name]
    matmul = 3 * 2 * sum(matrix.numel() for matrix in matrices)
    attention = 3 * 2 * 2 * config.num_layers * config.num_attention_heads * config.head_dim * tokens
    assert flops_per_token(config, tokens, "full") == matmul + attention
