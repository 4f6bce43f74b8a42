"""Copied beside exported weights, never imported by Pangu: transformers reads config.json through it.

transformers has no PanguEmbedded; vLLM has PanguEmbeddedForCausalLM and needs only this to load the folder
(`--trust-remote-code`).
"""

from transformers import PretrainedConfig


class PanguEmbeddedConfig(PretrainedConfig):
    """Every field is in config.json; none has a default."""

    model_type = "PanguEmbedded"
