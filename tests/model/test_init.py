import math

import pytest
import torch
from model_helpers import LOCAL_FILTERS, small_config
from torch import Tensor

from pangu.config import ModelConfig
from pangu.model import Transformer, init, init_weights
from pangu.model.init import initial_distribution, initial_rows
from pangu.model.seeding import generator

HIDDEN, LAYERS = 128, 4


def initialized(seed: int = 0, **changes: object) -> dict[str, Tensor]:
    sizes = {"hidden_size": HIDDEN, "num_layers": LAYERS, "head_dim": 16, "intermediate_size": 160}
    model = Transformer(small_config(**{**sizes, **changes}))
    init_weights(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def is_output(name: str) -> bool:
    return name.endswith(("output_proj.weight", "down_proj.weight"))


@pytest.mark.parametrize(
    ("initialization", "std", "output_std"),
    [
        ("tiny", math.sqrt(1 / (2 * HIDDEN * LAYERS)), math.sqrt(1 / (2 * HIDDEN * LAYERS))),
        ("small", math.sqrt(2 / (5 * HIDDEN)), math.sqrt(2 / (5 * HIDDEN * LAYERS))),
        ("megatron", 0.02, 0.02 / math.sqrt(2 * LAYERS)),
    ],
)
def test_linear_weights(initialization: str, std: float, output_std: float) -> None:
    weights = initialized(initialization=initialization, embedding_std=0.5)
    for name, weight in weights.items():
        if "proj" in name or name == "head.weight":
            wanted = output_std if is_output(name) else std
            assert weight.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(weight.mean().item()) < 0.1 * wanted, name
    assert weights["embedding.weight"].std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("norm_placement", "attention_gain", "feed_forward_gain"),
    [
        ("depth_scaled_sandwich", 0.283 / math.sqrt(LAYERS), 0.432 / math.sqrt(LAYERS)),
        ("sandwich", 1.0, 1.0),
    ],
)
def test_norm_gains(norm_placement: str, attention_gain: float, feed_forward_gain: float) -> None:
    for name, weight in initialized(norm_placement=norm_placement).items():
        if name.endswith("norm.weight"):
            wanted = {"post_attention_norm": attention_gain, "post_feed_forward_norm": feed_forward_gain}
            torch.testing.assert_close(weight, torch.full_like(weight, wanted.get(name.split(".")[-2], 1.0)))


def test_biases_are_zero() -> None:
    weights = initialized(attention_bias=True, feed_forward_bias=True)
    biases = [weight for name, weight in weights.items() if name.endswith("bias")]
    assert len(biases) == 5 * LAYERS
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("local_filter", LOCAL_FILTERS[:-1])
def test_convolutions_start_as_pytorch_starts_them(local_filter: str) -> None:
    """Bounds and spread of nn.Conv2d's own initialization for the same shape, weight and bias."""
    weights = initialized(local_filter=local_filter)
    path = "layers.2.attention.local_filter."
    for suffix in ("1", "2") if local_filter.startswith("two") else ("",):
        weight, bias = weights[f"{path}weight{suffix}"], weights[f"{path}bias{suffix}"]
        torch.manual_seed(0)
        theirs = torch.nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], 1))
        bound = theirs.weight.abs().max().item()
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.03)
        assert 0.8 * bound < bias.abs().max().item() <= 1.01 * bound


def test_seed_and_name_decide_alone() -> None:
    whole = initialized(attention_bias=True)
    with torch.device("meta"):
        model = Transformer(small_config(hidden_size=HIDDEN, num_layers=LAYERS, head_dim=16, intermediate_size=160))
    del model.layers["0"], model.layers["2"]  # a pipeline stage
    model.embedding = None
    model.to_empty(device="cpu")
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name]), name

    other = initialized(seed=1)
    name = "layers.1.attention.q_proj.weight"
    assert not torch.equal(other[name], whole[name])
    assert not torch.equal(whole["layers.0.attention.q_proj.weight"], whole[name])


def test_generators_do_not_depend_on_the_process() -> None:
    assert generator(0, "norm.weight", 3).initial_seed() == 11489656937532174758


@pytest.mark.parametrize("block_elements", [1, 7 * 36, 2**24])
def test_any_rows_can_be_drawn_alone(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", block_elements)
    config = small_config()
    model = Transformer(config)
    init_weights(model, 5)
    name = "layers.1.feed_forward.gate_up_proj.weight"
    whole = model.get_parameter(name).detach()
    assert len(whole.view(-1, 36).unique(dim=0)) == 104  # no two blocks alike
    for start, stop in ((0, 104), (0, 1), (3, 50), (103, 104)):
        rows = initial_rows(config, name, whole.shape, start, stop, 5)
        assert torch.equal(rows, whole.view(-1, 36)[start:stop])


@pytest.mark.parametrize("local_filter", ["none", *LOCAL_FILTERS])
def test_every_parameter_has_a_distribution(local_filter: str) -> None:
    config = small_config(local_filter=local_filter, attention_bias=True, feed_forward_bias=True)
    with torch.device("meta"):
        names = [name for name, _ in Transformer(config).named_parameters()]
    for name in names:
        initial_distribution(config, name)
    with pytest.raises(KeyError, match="router"):
        initial_distribution(config, "layers.0.router.weight")


def test_depth_scaled_gains_of_pangu_ultra() -> None:
    """gamma_attn(0) = 0.02919 and gamma_mlp(0) = 0.04456, TinyInit's std 6.579e-4 (derived from the report)."""
    config = ModelConfig(
        vocab_size=153_376,
        hidden_size=12_288,
        num_layers=94,
        num_attention_heads=96,
        num_key_value_heads=8,
        intermediate_size=28_672,
    )

    def scale(name: str) -> float:
        return initial_distribution(config, name).scale

    assert scale("layers.5.post_attention_norm.weight") == pytest.approx(0.02919, abs=5e-6)
    assert scale("layers.5.post_feed_forward_norm.weight") == pytest.approx(0.04456, abs=5e-6)
    assert scale("layers.5.feed_forward.down_proj.weight") == pytest.approx(6.579e-4, abs=5e-8)
    assert scale("embedding.weight") == 0.5
