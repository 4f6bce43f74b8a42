"""config.json and generation_config.json: written from a `ModelConfig`, and read back into one.

What decides the computation is written by one function, `_architecture`. Reading fills a `ModelConfig` from the keys
with a counterpart and then compares the file with what `_architecture` would have written: every difference is a
feature that we cannot express, and is refused by its name.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from pangu.config import ModelConfig
from pangu.convert.layouts import LAYOUTS, Layout, Target
from pangu.errors import ConversionError

_COUNTERPARTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_HAVE_DEFAULTS = {"num_key_value_heads", "head_dim", "tie_embeddings"}

# What only matters before training, so that no class has a key for it: kept under a key of our own.
_INITIAL = (
    "norm_placement",
    "attention_post_norm_gain",
    "feed_forward_post_norm_gain",
    "initialization",
    "embedding_std",
)
_OUR_KEY = "pangu"

_DEFAULT_ROPE_BASE = 10_000.0
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

_UNSUPPORTED = {
    "sliding_window": "attention to a window",
    "interleaved_sliding_window": "attention to a window",
    "sliding_window_list": "attention to a window",
    "param_sink_number": "learned attention sinks",
    "use_qk_norm": "norms on queries and keys",
    "qk_norm": "norms on queries and keys",
    "n_routed_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "num_nextn_predict_layers": "multi-token prediction",
    "final_logit_softcapping": "soft-capped logits",
    "attn_logit_softcapping": "soft-capped attention",
    "quantization_config": "quantized weights",
}


def write_config(
    config: ModelConfig, target: Target, *, rope_base: float, dtype: torch.dtype, eos_id: int | None, pad_id: int | None
) -> dict[str, Any]:
    """config.json of an exported model.

    `rope_base` is the base of the last training phase. RoPE and dtype are spelt so that transformers 4 and 5 and vLLM
    read them: `rope_theta` and `torch_dtype` are the old names and still read by all of them.
    """
    layout = LAYOUTS[target]
    tree: dict[str, Any] = {"architectures": [layout.architecture], "model_type": layout.model_type}
    if layout.config_class:
        tree["auto_map"] = {"AutoConfig": layout.config_class}
    tree |= _architecture(config, layout)
    rotary: dict[str, Any] = {"rope_theta": rope_base}
    if layout.partial_rotary_default is not None:
        rotary["partial_rotary_factor"] = 1.0
    tree |= rotary
    tree["rope_parameters"] = {"rope_type": "default", **rotary}
    tree |= {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id}
    tree["attention_dropout"] = 0.0
    tree["torch_dtype"] = str(dtype).removeprefix("torch.")
    tree[_OUR_KEY] = {name: getattr(config, name) for name in _INITIAL}
    return tree


def write_generation_config(eos_id: int | None, pad_id: int | None) -> dict[str, Any]:
    """generation_config.json: without it, Glm4 would stop at the end-of-text ids of GLM-4's own vocabulary."""
    return {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id}


def read_config(tree: Mapping[str, Any], source: str) -> tuple[Target, ModelConfig]:
    """The layout and the model that a config.json describes.

    Raises `ConversionError` naming the keys, their values and what they mean when the model has a feature that ours
    has not. `source` names the file in it.
    """
    target = _recognize(tree, source)
    layout = LAYOUTS[target]
    fields = _read_fields(tree, layout, source)
    try:
        config = TypeAdapter(ModelConfig).validate_python(fields)
    except ValidationError as error:
        details = (f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
        raise ConversionError(f"{source}: {'; '.join(details)}") from None
    differences = [
        f"{key} = {tree[key]!r} (only {value!r})"
        for key, value in _architecture(config, layout).items()
        if tree.get(key) is not None and not _same(tree[key], value)
    ]
    differences += [f"{key} = {tree[key]!r} ({meaning})" for key, meaning in _UNSUPPORTED.items() if tree.get(key)]
    if set(tree.get("layer_types") or ()) - {"full_attention"}:
        differences.append(f"layer_types = {tree['layer_types']!r} (only 'full_attention')")
    if differences:
        raise ConversionError(f"{source} asks for what Pangu's model does not have: {'; '.join(differences)}")
    return target, config


def _architecture(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The keys, other than RoPE's, that decide what the model computes."""
    tree = {theirs: getattr(config, ours) for ours, theirs in _COUNTERPARTS.items()}
    if layout.post_norm_key:
        tree[layout.post_norm_key] = config.has_post_norm
    if layout.attention_bias_key:
        tree[layout.attention_bias_key] = config.attention_bias
    if layout.feed_forward_bias_key:
        tree[layout.feed_forward_bias_key] = config.feed_forward_bias
    if layout.softmax_scale_key:
        tree[layout.softmax_scale_key] = config.head_dim**-0.5
    return {**tree, **layout.fixed, "hidden_act": "silu"}


def _recognize(tree: Mapping[str, Any], source: str) -> Target:
    architectures = tree.get("architectures") or []
    for name, layout in LAYOUTS.items():
        if layout.architecture in architectures or (not architectures and tree.get("model_type") == layout.model_type):
            return name
    raise ConversionError(
        f"{source}: architectures {architectures}, model_type {tree.get('model_type')!r} is not a layout that Pangu "
        f"reads; it reads {', '.join(layout.architecture for layout in LAYOUTS.values())}"
    )


def _read_fields(tree: Mapping[str, Any], layout: Layout, source: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for ours, theirs in _COUNTERPARTS.items():
        if tree.get(theirs) is not None:
            fields[ours] = tree[theirs]
        elif ours not in _HAVE_DEFAULTS:
            raise ConversionError(f"{source} has no {theirs!r}")
    if layout.attention_bias_key:
        fields["attention_bias"] = bool(tree.get(layout.attention_bias_key))
    if layout.feed_forward_bias_key:
        fields["feed_forward_bias"] = bool(tree.get(layout.feed_forward_bias_key))
    post_norm = bool(tree.get(layout.post_norm_key)) if layout.post_norm_key else True in layout.norms
    fields["norm_placement"] = "sandwich" if post_norm else "pre"
    fields["rope_base"] = _read_rope_base(tree, layout, source)
    initial = tree.get(_OUR_KEY)
    if isinstance(initial, dict) and (initial.get("norm_placement") != "pre") == post_norm:
        fields |= {name: initial[name] for name in _INITIAL if name in initial}
    return fields


def _read_rope_base(tree: Mapping[str, Any], layout: Layout, source: str) -> float:
    """transformers 5 keeps RoPE in `rope_parameters`; before it there were `rope_theta` and `rope_scaling`."""
    parameters = {"rope_theta": _DEFAULT_ROPE_BASE, "partial_rotary_factor": layout.partial_rotary_default or 1.0}
    parameters |= {key: tree[key] for key in parameters if tree.get(key) is not None}
    parameters |= tree.get("rope_scaling") or {}
    parameters |= tree.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" or parameters.keys() - _ROPE_KEYS:
        raise ConversionError(
            f"{source}: RoPE of type {kind!r} with {parameters} is not supported, only 'default' with a base; "
            "Pangu extends context by raising the base"
        )
    if parameters["partial_rotary_factor"] != 1:
        raise ConversionError(
            f"{source}: partial_rotary_factor = {parameters['partial_rotary_factor']} is not supported; "
            "Pangu rotates whole heads"
        )
    return parameters["rope_theta"]


def _same(found: object, expected: object) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == expected
