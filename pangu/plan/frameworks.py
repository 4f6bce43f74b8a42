"""Conventions of the frameworks that published rows come from: switches that change what a step does, no numbers."""

from dataclasses import replace
from typing import Any

from pangu.plan.hardware import Cluster
from pangu.plan.job import Framework

MEGATRON = Framework("megatron-core", slices_sends=True)
FRAMEWORKS = {
    "megatron-core": MEGATRON,
    "megatron-2021": Framework(
        "megatron-2021",
        fused_attention=False,
        fused_cross_entropy=False,
        gradient_bytes=2,
        waits_for_sends=True,
    ),
    "mindspeed": Framework("mindspeed", fused_cross_entropy=False, waits_for_sends=True),
    "mindformers": Framework(
        "mindformers",
        fused_cross_entropy=False,
        compiled=True,
        gradient_bytes=2,
        waits_for_sends=True,
        asynchronous_linear=False,
    ),
    "torchtitan": Framework(
        "torchtitan", fused_elementwise=False, fused_cross_entropy=False, fsdp=True, asynchronous_linear=False
    ),
    "llm-foundry": Framework(
        "llm-foundry", fused_elementwise=False, fused_cross_entropy=False, fsdp=True, fused_gradient_accumulation=False
    ),
    "megatron-deepspeed": Framework(
        "megatron-deepspeed",
        fused_attention=False,
        fused_cross_entropy=False,
        gradient_bytes=2,
        waits_for_sends=True,
        slices_sends=True,
        fused_gradient_accumulation=False,
        asynchronous_linear=False,
        all_reduces_gradients=True,
    ),
    "deepspeed-zero3": Framework(
        "deepspeed-zero3",
        fused_attention=False,
        fused_cross_entropy=False,
        gradient_bytes=2,
        fsdp=True,
        network_flows=1,
    ),
    "internevo": Framework(
        "internevo",
        fused_cross_entropy=False,
        gradient_bytes=2,
        fused_gradient_accumulation=False,
        all_reduces_gradients=True,
        broadcasts_parameters=True,
    ),
}

_OF_FAMILY = (
    ("mindspeed", "mindspeed"),
    ("mindformers", "mindformers"),
    ("korthikanti", "megatron-2021"),
    ("sc21", "megatron-2021"),
    ("mt_nlg", "megatron-deepspeed"),
    ("megascale", "megatron-2021"),
    ("megatron_early", "megatron-2021"),
    ("zero_bubble", "megatron-2021"),
    ("torchtitan", "torchtitan"),
    ("llm_foundry", "llm-foundry"),
    ("bloom", "megatron-deepspeed"),
    ("internevo", "internevo"),
)


def framework_of(row: dict[str, Any], layout: dict[str, Any], cluster: Cluster) -> Framework:
    """The framework of a row by its family; unknown families are taken for today's Megatron."""
    family = str(row.get("family", "")).lower()
    name = next((name for prefix, name in _OF_FAMILY if family.startswith(prefix)), "megatron-core")
    if name == "megatron-2021" and layout.get("zero") == 3:
        name = "deepspeed-zero3"
    framework = FRAMEWORKS[name]
    if family.startswith("sc21"):
        framework = replace(framework, asynchronous_linear=False)
    if layout.get("flash_attn") is not None:
        framework = replace(framework, fused_attention=bool(layout["flash_attn"]))
    if layout.get("compile"):
        framework = replace(framework, fused_elementwise=True, fused_cross_entropy=True, compiled=True)
    return framework
