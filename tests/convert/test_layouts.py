"""The tables: complete, invertible, and the choice of a layout."""

import pytest
import torch

from pangu.convert.layouts import LAYOUTS, choose, tensor_maps
from pangu.errors import ConversionError


@pytest.mark.parametrize(
    ("target", "placement"),
    [(name, "sandwich" if post_norm else "pre") for name, layout in LAYOUTS.items() for post_norm in layout.norms],
)
def test_split_and_join_are_inverse_and_shapes_are_right(model_config, random_model, target, placement):
    layout = LAYOUTS[target]
    config = model_config(
        norm_placement=placement,
        head_dim=16,
        attention_bias=bool(layout.attention_bias_key),
        feed_forward_bias=bool(layout.feed_forward_bias_key),
    )
    state = random_model(config).state_dict()
    names = []
    for entry in tensor_maps(config, layout, {name: tensor.shape for name, tensor in state.items()}):
        parts = entry.split(state[entry.ours])
        assert [tuple(part.shape) for part in parts] == [entry.their_shape] * len(entry.theirs)
        torch.testing.assert_close(entry.join(parts), state[entry.ours], rtol=0, atol=0)
        names += entry.theirs
    assert len(set(names)) == len(names)
    assert all(name.startswith("model.") or name == "lm_head.weight" for name in names)


def test_glm4_interleaves_the_rows_of_each_query_and_key_head(model_config):
    config = model_config(norm_placement="sandwich", num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    shapes = {"layers.0.attention.q_proj.weight": (8, 48), "layers.0.attention.kv_proj.weight": (2, 4, 48)}
    query, key_value = tensor_maps(config, LAYOUTS["glm4"], shapes)
    (rows,) = query.split(torch.arange(8)[:, None].expand(8, 48))
    assert rows[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    keys, values = key_value.split(torch.arange(8).view(2, 4, 1).expand(2, 4, 48))
    assert keys[:, 0].tolist() == [0, 2, 1, 3]
    assert values[:, 0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "llama"),
        ({"norm_placement": "sandwich"}, "glm4"),
        ({"norm_placement": "depth_scaled_sandwich"}, "glm4"),
        ({"norm_placement": "sandwich", "attention_bias": True}, "hyperclovax"),
        ({"norm_placement": "sandwich", "hidden_size": 50, "head_dim": 8}, "glm4"),
    ],
)
def test_auto_takes_the_first_layout_that_transformers_loads_and_that_fits(model_config, changes, chosen):
    assert choose(model_config(**changes), "auto") == chosen


@pytest.mark.parametrize(
    ("changes", "target", "named", "remedy"),
    [
        ({"num_key_value_heads": 0, "local_filter": "two_convolutions_norm"}, "auto", "local_filter", "pangu generate"),
        ({"norm_placement": "sandwich"}, "llama", "norm_placement", "glm4 or hyperclovax or pangu_embedded"),
        ({}, "glm4", "norm_placement", "llama or hyperclovax or pangu_embedded"),
        ({"norm_placement": "sandwich", "attention_bias": True}, "glm4", "attention_bias", "hyperclovax"),
        ({"norm_placement": "sandwich", "feed_forward_bias": True}, "glm4", "feed_forward_bias", "hyperclovax"),
        ({"hidden_size": 50, "head_dim": 8}, "auto", "hidden_size = 50", "pangu_embedded"),
        ({"hidden_size": 50, "head_dim": 8}, "llama", "hidden_size = 50", "pangu_embedded"),
    ],
)
def test_refusals_name_the_feature_and_what_would_work(model_config, changes, target, named, remedy):
    with pytest.raises(ConversionError) as refusal:
        choose(model_config(**changes), target)
    assert named in str(refusal.value)
    assert remedy in str(refusal.value)
