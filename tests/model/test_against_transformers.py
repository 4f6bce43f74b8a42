"""Logits and gradients equal those of classes nobody here wrote. The mappings are this file's own, apart from
pangu.convert's, so that the two check each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import gradients, random_model, small_config, stream
from torch import Tensor, nn

from pangu.config import ModelConfig

transformers = pytest.importorskip("transformers")

Parameters = dict[str, Tensor]


def common_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base, "partial_rotary_factor": 1.0},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }


def llama_class(config: ModelConfig) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**common_fields(config), mlp_bias=config.feed_forward_bias)
    )


def glm4_class(config: ModelConfig) -> nn.Module:
    return transformers.Glm4ForCausalLM(transformers.Glm4Config(**common_fields(config)))


def hyperclovax_class(config: ModelConfig) -> nn.Module:
    return transformers.HyperCLOVAXForCausalLM(
        transformers.HyperCLOVAXConfig(
            **common_fields(config), mlp_bias=config.feed_forward_bias, use_post_norm=config.has_post_norm
        )
    )


def outside_layers(ours: Parameters) -> Parameters:
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"]
    return theirs


def llama(ours: Parameters, config: ModelConfig) -> Parameters:
    theirs = outside_layers(ours)
    names = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "post_attention_norm": "post_norm1",
        "post_feed_forward_norm": "post_norm2",
        "attention.q_proj": "self_attn.q_proj",
        "attention.output_proj": "self_attn.o_proj",
        "feed_forward.down_proj": "mlp.down_proj",
    }
    stacks = {
        "attention.kv_proj": ("self_attn.k_proj", "self_attn.v_proj"),
        "feed_forward.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for name, value in ours.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            if module in names:
                theirs[f"model.layers.{layer}.{names[module]}.{kind}"] = value
            else:
                for part, target in zip(value, stacks[module], strict=True):
                    theirs[f"model.layers.{layer}.{target}.{kind}"] = part
    return theirs


def glm4(ours: Parameters, config: ModelConfig) -> Parameters:
    def interleaved(rows: Tensor, heads: int) -> Tensor:
        return rows.unflatten(0, (heads, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    theirs = outside_layers(ours)
    names = {
        "attention_norm": "input_layernorm",
        "post_attention_norm": "post_self_attn_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "post_feed_forward_norm": "post_mlp_layernorm",
        "attention.output_proj": "self_attn.o_proj",
        "feed_forward.down_proj": "mlp.down_proj",
    }
    for name, value in ours.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            prefix = f"model.layers.{layer}"
            if module in names:
                theirs[f"{prefix}.{names[module]}.{kind}"] = value
            elif module == "attention.q_proj":
                theirs[f"{prefix}.self_attn.q_proj.{kind}"] = interleaved(value, config.num_attention_heads)
            elif module == "attention.kv_proj":
                theirs[f"{prefix}.self_attn.k_proj.{kind}"] = interleaved(value[0], config.num_key_value_heads)
                theirs[f"{prefix}.self_attn.v_proj.{kind}"] = value[1]
            else:
                theirs[f"{prefix}.mlp.gate_up_proj.{kind}"] = value.flatten(0, 1)
    return theirs


@pytest.mark.parametrize(
    ("build", "mapping", "changes"),
    [
        pytest.param(llama_class, llama, {"norm_placement": "pre"}, id="llama"),
        pytest.param(llama_class, llama, {"norm_placement": "pre", "tie_embeddings": True}, id="llama-tied"),
        pytest.param(
            llama_class,
            llama,
            {"norm_placement": "pre", "attention_bias": True, "feed_forward_bias": True, "num_key_value_heads": 1},
            id="llama-biases-multi-query",
        ),
        pytest.param(llama_class, llama, {"norm_placement": "pre", "num_key_value_heads": 6}, id="llama-multi-head"),
        pytest.param(glm4_class, glm4, {"norm_placement": "depth_scaled_sandwich"}, id="glm4"),
        pytest.param(glm4_class, glm4, {"norm_placement": "sandwich", "tie_embeddings": True}, id="glm4-tied"),
        pytest.param(hyperclovax_class, llama, {"norm_placement": "sandwich"}, id="hyperclovax"),
        pytest.param(
            hyperclovax_class,
            llama,
            {"norm_placement": "depth_scaled_sandwich", "attention_bias": True, "feed_forward_bias": True},
            id="hyperclovax-biases",
        ),
    ],
)
def test_logits_and_gradients_equal(
    build: Callable[[ModelConfig], nn.Module],
    mapping: Callable[[Parameters, ModelConfig], Parameters],
    changes: dict[str, Any],
) -> None:
    config = small_config(**changes)
    ours = random_model(config)
    theirs = build(config)
    weights = mapping({name: p.detach() for name, p in ours.named_parameters()}, config)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())

    tokens, positions, cu_seqlens = stream([19])
    logits = ours.logits(ours(tokens, positions, cu_seqlens))
    expected = theirs(input_ids=tokens[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) / len(tokens)
    logits.backward(direction)
    expected.backward(direction)
    wanted = gradients(theirs)
    found = mapping(gradients(ours), config)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-5, msg=name)
