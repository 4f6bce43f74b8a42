"""Conventions of the frameworks that published rows come from: switches that change what a step does, no numbers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pangu.plan.efficiency import fitted
from pangu.plan.job import Framework

FRAMEWORKS = {
    each.name: each
    for each in (
        Framework(
            "megatron-core",
            fused_cross_entropy=False,
            keeps_raw_keys=False,
            weight_gradient_copies=True,
            loss_bytes=(6, 2),
        ),
        Framework(
            "megatron-2021",
            fused_attention=False,
            fused_cross_entropy=False,
            gradient_bytes=2,
            waits_for_sends=True,
            loss_bytes=(10, 10),
        ),
        Framework(
            "mindspeed",
            fused_cross_entropy=False,
            embedding_gradient_bytes=6,
            waits_for_sends=True,
            statistics_bytes=64,
            loss_bytes=(10, 10),
        ),
        Framework(
            "mindformers",
            fused_cross_entropy=False,
            compiled=True,
            gradient_bytes=2,
            waits_for_sends=True,
            asynchronous_linear=False,
            weight_bytes=0,
            optimizer_bytes=8,
            statistics_bytes=64,
            loss_bytes=(10, 10),
        ),
        Framework(
            "torchtitan",
            fused_elementwise=False,
            fused_cross_entropy=False,
            asynchronous_linear=False,
            weight_bytes=0,
            optimizer_bytes=8,
            loss_bytes=(10, 14),
            keeps_outputs=True,
            pools_per_stream=True,
        ),
        Framework(
            "llm-foundry",
            fused_elementwise=False,
            fused_cross_entropy=False,
            fused_gradient_accumulation=False,
            weight_bytes=0,
            optimizer_bytes=8,
            loss_bytes=(10, 10),
        ),
        Framework(
            "megatron-deepspeed",
            fused_attention=False,
            fused_cross_entropy=False,
            fused_gradient_accumulation=False,
            gradient_bytes=2,
            accumulated_bytes=2,
            waits_for_sends=True,
            asynchronous_linear=False,
            all_reduces_gradients=True,
            optimizer_bytes=16,
            loss_bytes=(10, 10),
            embedding_gradient_bytes=0,
            keeps_outputs=True,
            layer_ms=fitted()["software"]["deepspeed_layer_ms"],
            bucket_bytes=6 * 5e8,
            fragmentation=0.15,
        ),
        Framework(
            "deepspeed-zero3",
            fused_attention=False,
            fused_cross_entropy=False,
            gradient_bytes=2,
            network_flows=1,
            gathered_pieces=4,
            weight_bytes=0,
            optimizer_bytes=8,
            loss_bytes=(10, 10),
        ),
        Framework(
            "internevo",
            fused_elementwise=False,
            fused_cross_entropy=False,
            fused_gradient_accumulation=False,
            gradient_bytes=2,
            accumulated_bytes=2,
            all_reduces_gradients=True,
            broadcasts_parameters=True,
        ),
    )
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


def framework_of(row: Mapping[str, Any], layout: Mapping[str, Any]) -> Framework:
    """The framework of a row by its family, or by its source's title; others are taken for today's Megatron."""
    family = str(row.get("family", "")).lower()
    source = row.get("source")
    title = str(source.get("title") if isinstance(source, Mapping) else "").lower().replace("-", "_")
    name = next((name for prefix, name in _OF_FAMILY if family.startswith(prefix)), "")
    name = name or next((name for word, name in _OF_FAMILY if word in title), "megatron-core")
    if name == "megatron-2021" and layout.get("zero") == 3:
        name = "deepspeed-zero3"
    framework = FRAMEWORKS[name]
    if name == "torchtitan" and (layout.get("tp") or 1) != 1:
        framework = replace(framework, loss_bytes=(14, 18))  # loss parallel: one PyTorch operator after the other
    if family.startswith("sc21"):
        framework = replace(framework, asynchronous_linear=False)
    if layout.get("flash_attn") is not None:
        framework = replace(framework, fused_attention=bool(layout["flash_attn"]))
    if "cross-entropy fusion" in str(layout.get("overlap")):
        framework = replace(framework, fused_cross_entropy=True, loss_bytes=(4, 2))
    if name == "megatron-deepspeed" and "bf16" in str(row.get("precision")):
        framework = replace(framework, accumulated_bytes=6, optimizer_bytes=12)  # bf16 and fp32 beside it
    if layout.get("reuse_fp32_param"):
        framework = replace(framework, optimizer_bytes=10)  # the working copy is half of the master copy
    if layout.get("compile"):
        framework = replace(framework, fused_elementwise=True, fused_cross_entropy=True, compiled=True)
    return framework
