"""Folders made by transformers become our models; what they have beyond ours is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pangu.convert import export, import_
from pangu.errors import ConversionError
from pangu.model import Transformer

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 3000.0}
WHOLE_HEADS = {**ROPE, "partial_rotary_factor": 1.0}

CLASSES = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": ROPE}),
    "llama_biases_tied_wide": (
        transformers.LlamaConfig,
        {
            "rope_parameters": ROPE,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 16,
        },
    ),
    "llama_all_defaults": (transformers.LlamaConfig, {"num_key_value_heads": None}),
    "glm4": (transformers.Glm4Config, {"rope_parameters": WHOLE_HEADS, "attention_bias": False, "head_dim": 16}),
    "glm4_tied": (
        transformers.Glm4Config,
        {"rope_parameters": WHOLE_HEADS, "attention_bias": False, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "hyperclovax": (transformers.HyperCLOVAXConfig, {"rope_parameters": ROPE, "attention_bias": True}),
    "hyperclovax_pre_norm": (transformers.HyperCLOVAXConfig, {"rope_parameters": ROPE, "use_post_norm": False}),
}


def save_random(config: "transformers.PretrainedConfig", folder: Path, **options: object) -> torch.nn.Module:
    """A checkpoint by transformers in which no parameter has its initial value."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    model.save_pretrained(folder, **options)
    return model.eval()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shard_size", ["50GB", "60KB"])
def test_a_checkpoint_by_transformers_gives_the_same_logits_in_our_model(
    name, shard_size, our_logits, tokens, tmp_path
):
    kind, changes = CLASSES[name]
    theirs = save_random(kind(**{**COMMON, **changes}), tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "60KB")
    imported = import_(tmp_path)
    model = Transformer(imported.config)
    model.load_state_dict(dict(imported.tensors))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(our_logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_bf16_checkpoint_is_imported_exactly(tmp_path):
    config = transformers.LlamaConfig(**COMMON, rope_parameters=ROPE, dtype=torch.bfloat16)
    save_random(config, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert stored.dtype == torch.bfloat16
    imported = import_(tmp_path).tensors["layers.1.feed_forward.down_proj.weight"]
    assert imported.dtype == torch.float32
    assert torch.equal(imported, stored.float())


def test_the_spelling_of_transformers_4_is_read(tmp_path, our_logits, tokens):
    theirs = save_random(transformers.Glm4Config(**COMMON, rope_parameters=WHOLE_HEADS, attention_bias=False), tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["rope_parameters"]
    tree |= {"rope_theta": 3000.0, "partial_rotary_factor": 1.0, "rope_scaling": None, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    imported = import_(tmp_path)
    assert imported.config.rope_base == 3000.0
    model = Transformer(imported.config)
    model.load_state_dict(dict(imported.tensors))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model, tokens), theirs(tokens[None]).logits[0], rtol=1e-5, atol=1e-5)


ROUND_TRIPS = {
    "llama": {"tie_embeddings": True, "attention_bias": True, "feed_forward_bias": True, "initialization": "megatron"},
    "glm4": {"norm_placement": "depth_scaled_sandwich", "attention_post_norm_gain": 0.3, "head_dim": 16},
    "hyperclovax": {"norm_placement": "sandwich", "attention_bias": True, "embedding_std": 0.02},
    "pangu_embedded": {"norm_placement": "depth_scaled_sandwich", "attention_bias": True, "norm_eps": 3e-6},
}


@pytest.mark.parametrize("target", ROUND_TRIPS)
def test_export_then_import_returns_the_same_config_and_the_same_bits(target, model_config, random_model, tmp_path):
    config = model_config(**ROUND_TRIPS[target])
    state = random_model(config).state_dict()
    export(state, config, tmp_path / "out", target=target, max_shard_bytes=100_000)
    imported = import_(tmp_path / "out")
    assert imported.config == config
    assert list(imported.tensors) == list(state)
    assert all(torch.equal(imported.tensors[name], tensor) for name, tensor in state.items())


def test_our_tokenizer_comes_along_and_another_does_not(model_config, random_model, alphabet_tokenizer, tmp_path):
    config = model_config(vocab_size=361)
    export(random_model(config).state_dict(), config, tmp_path / "out", tokenizer=alphabet_tokenizer)
    tokenizer = import_(tmp_path / "out").tokenizer
    assert tokenizer is not None
    assert tokenizer.read_bytes() == alphabet_tokenizer.read_bytes()
    tokenizer.write_bytes(b"a tokenizer of another kind")
    assert import_(tmp_path / "out").tokenizer is None


UNSUPPORTED = {
    "llama3_rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    "yarn": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "'yarn'"),
    "old_linear_rope": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None},
        "'linear'",
    ),
    "rope_per_layer_type": ("llama", {"rope_parameters": {"full_attention": ROPE}}, "full_attention"),
    "partial_rotary": (
        "glm4",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "partial_rotary_by_default": ("glm4", {"rope_parameters": ROPE}, "partial_rotary_factor = 0.5"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "window": ("llama", {"sliding_window": 4096}, "sliding_window = 4096"),
    "window_layers": ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
    "query_key_norm": ("llama", {"use_qk_norm": True}, "use_qk_norm"),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "half_of_the_biases": ("glm4", {"attention_bias": True}, "attention_bias = True"),
    "softmax_scale": ("hyperclovax", {"attention_multiplier": 1.0}, "attention_multiplier = 1.0"),
    "embedding_multiplier": ("hyperclovax", {"embedding_multiplier": 10.0}, "embedding_multiplier = 10.0"),
    "residual_multiplier": ("hyperclovax", {"residual_multiplier": 0.5}, "residual_multiplier = 0.5"),
    "logits_scaling": ("hyperclovax", {"logits_scaling": 0.125}, "logits_scaling = 0.125"),
    "other_class": ("llama", {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    "other_task": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "missing_key": ("llama", {"rms_norm_eps": None}, "no 'rms_norm_eps'"),
    "impossible_heads": ("llama", {"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple"),
    "not_a_number": ("llama", {"hidden_size": "wide"}, "hidden_size"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_our_model_lacks_is_refused_by_name(name, model_config, random_model, tmp_path):
    target, changes, named = UNSUPPORTED[name]
    config = model_config(norm_placement="pre" if target == "llama" else "sandwich")
    export(random_model(config).state_dict(), config, tmp_path / "out", target=target)
    path = tmp_path / "out" / "config.json"
    tree = json.loads(path.read_text())
    tree.pop("partial_rotary_factor", None)
    path.write_text(json.dumps({**tree, **changes}))
    with pytest.raises(ConversionError) as refusal:
        import_(tmp_path / "out")
    assert named in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.fixture
def folder(model_config, random_model, tmp_path):
    config = model_config()
    export(random_model(config).state_dict(), config, tmp_path / "out")
    return tmp_path / "out"


def change_weights(folder: Path, **changes: "torch.Tensor | None") -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__layers__0__self_attn__q_norm__weight": torch.ones(8)},
            r"unknown tensors .*self_attn\.q_norm\.weight",
        ),
        ({"model__norm__weight": None}, r"lacks tensors .*model\.norm\.weight"),
        ({"model__norm__weight": torch.ones(49)}, r"model\.norm\.weight is \[49\].*\[48\]"),
        ({"model__norm__weight": torch.ones(48, dtype=torch.int8)}, r"model\.norm\.weight is I8"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(changes, message, folder):
    change_weights(folder, **changes)
    with pytest.raises(ConversionError, match=message):
        import_(folder)


def test_the_tied_flag_is_honoured(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ConversionError, match=r"differs from .* although config.json has tie_word_embeddings"):
        import_(folder)
    change_weights(folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone())
    imported = import_(folder)
    assert imported.config.tie_embeddings
    assert "head.weight" not in imported.tensors


def test_damaged_files_are_named(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read"):
        import_(folder)
    weights.unlink()
    with pytest.raises(ConversionError, match=r"has neither model\.safetensors nor"):
        import_(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match=r"config\.json is not a JSON object"):
        import_(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json"):
        import_(folder)


def test_a_missing_shard_is_named(model_config, random_model, tmp_path):
    config = model_config()
    export(random_model(config).state_dict(), config, tmp_path / "out", max_shard_bytes=60_000)
    lost = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ConversionError, match=lost.name):
        import_(tmp_path / "out")


def test_an_index_that_names_other_tensors_is_refused(model_config, random_model, tmp_path):
    config = model_config()
    export(random_model(config).state_dict(), config, tmp_path / "out", max_shard_bytes=60_000)
    path = tmp_path / "out" / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    tree["weight_map"]["model.extra.weight"] = tree["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(tree))
    with pytest.raises(ConversionError, match=r"index\.json does not match .*model\.extra\.weight"):
        import_(tmp_path / "out")
