"""FLOPs of a step as the sources of published rows count them: most apparent errors of a planner are these."""

import re
from collections.abc import Mapping
from typing import Any

from pangu.plan.job import Architecture, Job

MODEL_FULL = "model FLOPs, attention in full (Korthikanti et al. 2022; PaLM)"
MODEL_CAUSAL = "model FLOPs, half of attention (causal)"
HARDWARE_FULL = "with full recomputation, attention in full (SC21, equation 3)"
PARAMETERS = "6 N + 12 L h s a token, attention in full (llm-foundry)"

_OF_FAMILY = (("bloom|mt_nlg|internevo", HARDWARE_FULL), ("llm_foundry", PARAMETERS), ("llama3|pangu", MODEL_CAUSAL))


def convention_of(row: Mapping[str, Any], job: Job) -> str:
    """The convention that a row states, or that its source is known for; otherwise Megatron's model FLOPs."""
    measured = row.get("measured")
    stated = str(measured.get("flops_convention") if isinstance(measured, Mapping) else "")
    if "hardware" in stated:
        return HARDWARE_FULL
    if "6N" in stated:
        return PARAMETERS
    if "model" in stated:
        return MODEL_FULL
    family = str(row.get("family"))
    found = next((name for pattern, name in _OF_FAMILY if re.match(pattern, family)), MODEL_FULL)
    if found == HARDWARE_FULL and job.recompute == ("none",):
        return MODEL_FULL
    return found


def peak_of(row: Mapping[str, Any], published: float) -> float:
    """What a row's MFU divides by, FLOP/s; `published` is the chip's peak.

    MindSpeed-LLM prints 4672 tokens/s in one table and MFUs of 65.8 % and 69 % in two later ones for one script
    (Llama-2 7B): with attention in full 327 and 312 TFLOP/s, the "313T" that Huawei's plugin notes beside 910B3.
    """
    family = str(row.get("family"))
    return 313e12 if family.startswith("mindspeed_llm") and 300e12 < published < 360e12 else published


def flops_per_token(model: Architecture, sequence_length: int, convention: str) -> float:
    """FLOPs of forward and backward, one token."""
    h = model.hidden_size
    wide = model.intermediate_size * (3 if model.gated else 2)
    layer = h * (2 * model.query_size + 2 * model.key_value_size + wide)
    attention = 12 * model.num_layers * model.query_size * sequence_length
    head = 6 * model.vocab_size * h
    if convention == HARDWARE_FULL:
        return 8 * model.num_layers * layer + attention * 4 / 3 + head
    if convention == MODEL_CAUSAL:
        return 6 * model.num_layers * layer + attention / 2 + head
    if convention == PARAMETERS and not model.tied:
        return 6 * model.num_layers * layer + attention + 2 * head
    return 6 * model.num_layers * layer + attention + head
