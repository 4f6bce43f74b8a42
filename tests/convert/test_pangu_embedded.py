"""The PanguEmbedded layout, which no installed library runs: computed here from the files, by their names alone.

The forward pass follows openPangu-Embedded's published description of the layer and, with `sandwich_norm`, the order
of vLLM's OpenPanguDecoderLayer: input_layernorm, attention, post_attention_layernorm, add, pre_mlp_layernorm,
feed-forward, post_mlp_layernorm, add. RoPE is the half-split one.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pangu.convert import export, import_
from pangu.errors import ConversionError
from pangu.model import Transformer

transformers = pytest.importorskip("transformers")

PRE_NORM_LAYER = {
    "input_layernorm.weight": (48,),
    "self_attn.q_proj.weight": (96, 48),
    "self_attn.q_proj.bias": (96,),
    "self_attn.k_proj.weight": (32, 48),
    "self_attn.k_proj.bias": (32,),
    "self_attn.v_proj.weight": (32, 48),
    "self_attn.v_proj.bias": (32,),
    "self_attn.o_proj.weight": (48, 96),
    "self_attn.o_proj.bias": (48,),
    "post_attention_layernorm.weight": (48,),
    "mlp.gate_proj.weight": (80, 48),
    "mlp.up_proj.weight": (80, 48),
    "mlp.down_proj.weight": (48, 80),
}
SANDWICH_LAYER = PRE_NORM_LAYER | {"pre_mlp_layernorm.weight": (48,), "post_mlp_layernorm.weight": (48,)}


def forward(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [T, V] in float64."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[name + ".weight"]

    frequencies = config["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    turn = torch.polar(torch.ones(()).double(), torch.outer(torch.arange(len(tokens)).double(), frequencies))

    def rotate(x: Tensor) -> Tensor:  # [T, heads, head_dim]
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * turn[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)

    def attention(x: Tensor, prefix: str) -> Tensor:
        q = rotate(linear(x, prefix + "q_proj").unflatten(-1, (heads, head_dim)))
        k = rotate(linear(x, prefix + "k_proj").unflatten(-1, (key_heads, head_dim)))
        v = linear(x, prefix + "v_proj").unflatten(-1, (key_heads, head_dim))
        k, v = (tensor.repeat_interleave(heads // key_heads, 1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        return linear(out.flatten(1), prefix + "o_proj")

    def feed_forward(x: Tensor, prefix: str) -> Tensor:
        gate = linear(x, prefix + "gate_proj")
        return linear(gate * gate.sigmoid() * linear(x, prefix + "up_proj"), prefix + "down_proj")

    h = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        y = attention(norm(h, prefix + "input_layernorm"), prefix + "self_attn.")
        if config.get("sandwich_norm"):
            h = h + norm(y, prefix + "post_attention_layernorm")
            y = feed_forward(norm(h, prefix + "pre_mlp_layernorm"), prefix + "mlp.")
            h = h + norm(y, prefix + "post_mlp_layernorm")
        else:
            h = h + y
            h = h + feed_forward(norm(h, prefix + "post_attention_layernorm"), prefix + "mlp.")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(h, "model.norm") @ weights[head].T


@pytest.mark.parametrize(("placement", "layer"), [("pre", PRE_NORM_LAYER), ("sandwich", SANDWICH_LAYER)])
@pytest.mark.parametrize("tied", [False, True])
def test_names_shapes_and_logits(placement, layer, tied, model_config, random_model, our_logits, tokens, tmp_path):
    config = model_config(norm_placement=placement, head_dim=16, attention_bias=True, tie_embeddings=tied)
    model = random_model(config)
    export(model.state_dict(), config, tmp_path / "out", target="pangu_embedded")
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (97, 48), "model.norm.weight": (48,)}
    expected |= {} if tied else {"lm_head.weight": (97, 48)}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected
    logits = forward(tmp_path / "out", tokens).float()
    torch.testing.assert_close(logits, our_logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_transformers_reads_the_config_with_the_class_beside_it(model_config, random_model, tmp_path):
    config = model_config(norm_placement="sandwich", attention_bias=True, rope_base=1.6e7)
    export(random_model(config).state_dict(), config, tmp_path / "out", target="pangu_embedded")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (theirs.model_type, theirs.architectures) == ("PanguEmbedded", ["PanguEmbeddedForCausalLM"])
    assert (theirs.bias, theirs.sandwich_norm, theirs.head_dim, theirs.num_key_value_heads) == (True, True, 8, 2)
    assert theirs.rope_parameters["rope_theta"] == 1.6e7


# openPangu-Embedded-7B's config.json, key for key, with smaller sizes.
PUBLISHED = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    "bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 45892,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "model_type": "PanguEmbedded",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_cache": True,
    "vocab_size": 97,
}


def test_the_published_layout_is_imported(our_logits, tokens, tmp_path):
    shapes = {"model.embed_tokens.weight": (97, 48), "model.norm.weight": (48,), "lm_head.weight": (97, 48)}
    for layer in range(2):
        for name, shape in PRE_NORM_LAYER.items():
            rows = {"q_proj": 48, "k_proj": 16, "v_proj": 16}.get(name.split(".")[-2], shape[0])
            columns = (48,) if "o_proj.weight" in name else shape[1:]
            shapes[f"model.layers.{layer}.{name}"] = (rows, *columns)
        shapes[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (8,)
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: (0.2 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    imported = import_(tmp_path)
    assert (imported.config.norm_placement, imported.config.attention_bias) == ("pre", True)
    assert (imported.config.head_dim, imported.config.rope_base) == (16, 1.6e7)
    assert imported.tokenizer is None
    model = Transformer(imported.config)
    model.load_state_dict(dict(imported.tensors))
    torch.testing.assert_close(our_logits(model, tokens), forward(tmp_path, tokens).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("param_sink_number", 128),
        ("interleaved_sliding_window", [128, 0]),
        ("n_routed_experts", 64),
        ("kv_lora_rank", 512),
        ("num_nextn_predict_layers", 1),
        ("is_causal", False),
    ],
)
def test_features_of_the_larger_openpangu_models_are_refused(key, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, key: value}))
    with pytest.raises(ConversionError, match=f"config.json asks for .*{key} = "):
        import_(tmp_path)
