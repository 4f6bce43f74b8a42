"""Where our tensors live in Hugging Face checkpoints: one table per layout, read in both directions.

`export` walks a table from our names to theirs and `import_` from theirs to ours; `split` and `join` are each other's
inverse and only move rows, so a tensor that goes out and comes back is the same to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pangu.config import ModelConfig
from pangu.errors import ConversionError

Target = Literal["llama", "glm4", "hyperclovax", "pangu_embedded"]


@dataclass(frozen=True)
class Place:
    """What one module of ours becomes. `{}` stands for the layer's number; weight and bias go the same way."""

    theirs: tuple[str, ...]
    """Their modules, which share our rows in this order."""
    stacked: bool = False
    """Ours has a leading dimension of 2 (keys and values, gate and up); theirs have not."""
    rotary: int = 0
    """How many of `theirs`, from the first, hold rows that RoPE rotates."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A Hugging Face architecture: its names, and what it can express beyond a plain pre-norm decoder."""

    architecture: str
    """`architectures` in config.json."""
    model_type: str
    """`model_type` in config.json."""
    norms: Mapping[bool, Mapping[str, str]]
    """Without (False) and with (True) norms after the sub-layers: our norm in a block to theirs."""
    post_norm_key: str | None = None
    """Key in config.json that turns those norms on. None: the architecture has them always or never."""
    attention_bias_key: str | None = None
    """Key for biases on query, key, value and output projections. None: it has no such set of biases."""
    feed_forward_bias_key: str | None = None
    """Key for biases on the feed-forward projections. None: it has none."""
    fused_gate_up: bool = False
    """Gate and up projections are one tensor, gate first."""
    interleaved_rotary: bool = False
    """RoPE pairs rows 2i and 2i + 1 of a head; ours pairs i and i + head_dim / 2."""
    partial_rotary_default: float | None = None
    """What a config.json without partial_rotary_factor means. None: the architecture always rotates whole heads."""
    fixed: Mapping[str, object] = field(default_factory=dict)
    """Keys with a single value that we can express."""
    softmax_scale_key: str | None = None
    """Key for the factor on attention scores, 1 / sqrt(head_dim) in ours."""
    config_class: str | None = None
    """`file.Class` of a config class that transformers lacks; the file is in this package and goes with the export."""
    heads_divide_hidden_size: bool = False
    """Its config class refuses a hidden_size that is not a multiple of the number of heads."""


_PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}

LAYOUTS: Mapping[Target, Layout] = {
    "llama": Layout(
        architecture="LlamaForCausalLM",
        model_type="llama",
        norms={False: _PRE_NORMS},
        attention_bias_key="attention_bias",
        feed_forward_bias_key="mlp_bias",
        heads_divide_hidden_size=True,
    ),
    "glm4": Layout(
        architecture="Glm4ForCausalLM",
        model_type="glm4",
        norms={
            True: {
                **_PRE_NORMS,
                "post_attention_norm": "post_self_attn_layernorm",
                "post_feed_forward_norm": "post_mlp_layernorm",
            }
        },
        fused_gate_up=True,
        interleaved_rotary=True,
        partial_rotary_default=0.5,
        fixed={"attention_bias": False},
    ),
    "hyperclovax": Layout(
        architecture="HyperCLOVAXForCausalLM",
        model_type="hyperclovax",
        norms={
            False: _PRE_NORMS,
            True: {**_PRE_NORMS, "post_attention_norm": "post_norm1", "post_feed_forward_norm": "post_norm2"},
        },
        post_norm_key="use_post_norm",
        attention_bias_key="attention_bias",
        feed_forward_bias_key="mlp_bias",
        fixed={"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0},
        softmax_scale_key="attention_multiplier",
        heads_divide_hidden_size=True,
    ),
    # openPangu-Embedded 1B and 7B as published, and vLLM's PanguEmbeddedForCausalLM, which adds `sandwich_norm`. With
    # it, post_attention_layernorm is the norm after attention; without it, the one before the feed-forward layer.
    "pangu_embedded": Layout(
        architecture="PanguEmbeddedForCausalLM",
        model_type="PanguEmbedded",
        norms={
            False: _PRE_NORMS,
            True: {
                "attention_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "feed_forward_norm": "pre_mlp_layernorm",
                "post_feed_forward_norm": "post_mlp_layernorm",
            },
        },
        post_norm_key="sandwich_norm",
        attention_bias_key="bias",
        feed_forward_bias_key="mlp_bias",
        fixed={"is_causal": True},
        config_class="configuration_pangu_embedded.PanguEmbeddedConfig",
    ),
}

_ATTENTION = "model.layers.{}.self_attn."
_FEED_FORWARD = "model.layers.{}.mlp."


def places(layout: Layout, post_norm: bool) -> dict[str, Place]:
    """The table of a layout: our module names, with `{}` for the layer, to where their tensors are."""
    gate_up = ("gate_up_proj",) if layout.fused_gate_up else ("gate_proj", "up_proj")
    table = {
        "embedding": Place(("model.embed_tokens",)),
        "layers.{}.attention.q_proj": Place((_ATTENTION + "q_proj",), rotary=1),
        "layers.{}.attention.kv_proj": Place((_ATTENTION + "k_proj", _ATTENTION + "v_proj"), stacked=True, rotary=1),
        "layers.{}.attention.output_proj": Place((_ATTENTION + "o_proj",)),
        "layers.{}.feed_forward.gate_up_proj": Place(tuple(_FEED_FORWARD + name for name in gate_up), stacked=True),
        "layers.{}.feed_forward.down_proj": Place((_FEED_FORWARD + "down_proj",)),
        "norm": Place(("model.norm",)),
        "head": Place(("lm_head",)),
    }
    for ours, theirs in layout.norms[post_norm].items():
        table["layers.{}." + ours] = Place(("model.layers.{}." + theirs,))
    return table


@dataclass(frozen=True)
class TensorMap:
    """One tensor of ours and the tensors of theirs that hold it."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    their_shape: tuple[int, ...]
    stacked: bool
    rotary: int
    """How many of `theirs`, from the first, have their heads' rows interleaved."""
    head_dim: int

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Our tensor as theirs: views of it where possible."""
        rows = tensor.flatten(0, 1) if self.stacked else tensor
        parts = list(rows.chunk(len(self.theirs)))
        for index in range(self.rotary):
            parts[index] = _swap_pair_order(parts[index], 2, self.head_dim // 2)
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Their tensors as ours."""
        parts = list(parts)
        for index in range(self.rotary):
            parts[index] = _swap_pair_order(parts[index], self.head_dim // 2, 2)
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        return rows.unflatten(0, (2, -1)) if self.stacked else rows


def _swap_pair_order(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Transpose the [outer, inner] grid that a head's rows form: half-split to interleaved pairs, and back."""
    return rows.unflatten(0, (-1, outer, inner)).transpose(1, 2).flatten(0, 2)


def tensor_maps(config: ModelConfig, layout: Layout, shapes: Mapping[str, Sequence[int]]) -> list[TensorMap]:
    """Where each of our parameters (name to shape) goes, in their order."""
    table = places(layout, config.has_post_norm)
    return [_tensor_map(name, tuple(shape), table, layout, config.head_dim) for name, shape in shapes.items()]


def _tensor_map(name: str, shape: tuple[int, ...], table: Mapping[str, Place], layout: Layout, dim: int) -> TensorMap:
    module, _, kind = name.rpartition(".")
    prefix, _, rest = module.partition(".")
    layer, _, inside = rest.partition(".")
    place = table["layers.{}." + inside if prefix == "layers" else module]
    rows, *columns = (shape[0] * shape[1], *shape[2:]) if place.stacked else shape
    return TensorMap(
        ours=name,
        shape=shape,
        theirs=tuple(f"{theirs.format(layer)}.{kind}" for theirs in place.theirs),
        their_shape=(rows // len(place.theirs), *columns),
        stacked=place.stacked,
        rotary=place.rotary if layout.interleaved_rotary else 0,
        head_dim=dim,
    )


def choose(config: ModelConfig, target: Target | Literal["auto"]) -> Target:
    """The layout to export to. auto: the first that transformers loads (llama, glm4, hyperclovax) and that fits.

    Raises `ConversionError` naming every feature of the model that the layout has no way to say, and the layouts
    that do.
    """
    loadable: tuple[Target, ...] = ("llama", "glm4", "hyperclovax")
    fitting = [name for name in LAYOUTS if not obstacles(config, name)]
    if target == "auto":
        for name in loadable:
            if name in fitting:
                return name
        target = "hyperclovax" if config.has_post_norm else "llama"
    reasons = obstacles(config, target)
    if not reasons:
        return target
    remedy = f"export to {' or '.join(fitting)}" if fitting else "no other target can; `pangu generate` runs the model"
    raise ConversionError(f"{LAYOUTS[target].architecture} cannot express {'; '.join(reasons)}: {remedy}")


def obstacles(config: ModelConfig, target: Target) -> list[str]:
    """The features of a model that a layout cannot express."""
    layout = LAYOUTS[target]
    reasons = []
    if config.local_filter != "none":
        reasons.append(f"model.local_filter = {config.local_filter!r} (localized filtering-based attention)")
    if config.has_post_norm not in layout.norms:
        reasons.append(f"model.norm_placement = {config.norm_placement!r}")
    if config.attention_bias and not layout.attention_bias_key:
        reasons.append("model.attention_bias = true (a bias on the output projection too)")
    if config.feed_forward_bias and not layout.feed_forward_bias_key:
        reasons.append("model.feed_forward_bias = true")
    if layout.heads_divide_hidden_size and config.hidden_size % config.num_attention_heads:
        reasons.append(
            f"model.hidden_size = {config.hidden_size} not being a multiple of model.num_attention_heads = "
            f"{config.num_attention_heads}"
        )
    return reasons
