"""Rows of published measurements (the schema of planner_rows.yaml) as jobs and clusters.

What a row leaves out is filled from what is publicly known of its model or from the commonest choice, and every such
assumption is written down beside the prediction. What cannot be assumed raises `Undefined`.
"""

import dataclasses
import math
import re
from typing import Any

from pangu.errors import DataError
from pangu.parallel.layout import Layout
from pangu.plan.frameworks import framework_of
from pangu.plan.hardware import Cluster, load_cluster
from pangu.plan.job import Architecture, Framework, Job, Overlap, Recompute

_CLUSTERS = (
    ("910b3|800t", "atlas_800t_a2"),
    ("910_93|a3|910c", "atlas_a3_superpod"),
    ("ascend|910b|npu", "atlas_900_a2"),
    ("b200", "dgx_b200"),
    ("h100|h800|h200", "dgx_h100"),
    ("a100.*40 ?gb", "dgx_a100_40gb"),
    ("a100|a800|ampere", "dgx_a100"),
    ("v100", "dgx2_v100"),
)
"""The first pattern found in the chip's name decides."""

_VOCABULARIES = (
    ("llama-?3", 128256),
    ("llama|alpaca", 32000),
    ("aquila", 100008),
    ("baichuan", 64000),
    ("internlm", 103168),
    ("bloom", 250880),
    ("gpt|175b", 50304),
)
"""Public configurations of models whose rows leave the vocabulary out."""


class Undefined(Exception):
    """A row lacks what a prediction needs; the message names it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as the planner reads it."""

    id: str
    family: str
    job: Job
    cluster: Cluster
    chips: int
    assumed: tuple[str, ...]


def read_row(row: dict[str, Any], hardware: dict[str, Any]) -> Row:
    """Raises `Undefined` for what is missing, `DataError` for what cannot be."""
    assumed: list[str] = []
    for key in ("id", "model", "layout"):
        if key not in row:
            raise DataError(f"row {row.get('id', '?')!r} has no {key!r}")
    model_row, layout_row = row["model"], row["layout"]
    where = hardware.get(row.get("hardware"), {}) if isinstance(row.get("hardware"), str) else row.get("hardware") or {}
    cluster = _cluster(where, assumed)
    chips = _need(row, "chips")
    model = _architecture(model_row, str(row.get("id")), assumed)
    layout = _layout(layout_row, model, chips, cluster, assumed)
    sequence_length = _need(model_row, "seq")
    batch = _need(layout_row, "gbs")
    micro = layout_row.get("mbs") or _micro_batch(row, layout, batch, assumed)
    if batch % (micro * layout.dp):
        raise Undefined(f"gbs {batch} is not a multiple of mbs {micro} x dp {layout.dp}")
    family = str(row.get("family", ""))
    framework = framework_of(row, layout_row, cluster)
    if framework.name.startswith("megatron-2021"):
        model = dataclasses.replace(model, dropout=True)
    if framework.name == "megatron-core" and model_row.get("tied") is None:
        model = dataclasses.replace(model, tied=False)
    recompute, recompute_layers = _recompute(
        layout_row, "selective" if family.startswith("megascale") else "none", assumed
    )
    zero = _zero(layout_row)
    if framework.weight_bytes == 0 and layout.pp > 1:
        zero = 1  # torchtitan keeps parameters gathered and gradients whole under pipelines
    precision = str(row.get("precision") or "bf16")
    job = Job(
        model=model,
        layout=layout,
        sequence_length=sequence_length,
        micro_batch_size=micro,
        batch_size=batch,
        schedule=_schedule(layout_row, layout),
        sequence_parallel=bool(layout_row.get("sp")) if layout_row.get("sp") is not None else layout.tp > 1,
        zero_stage=zero,
        recompute=recompute,
        recompute_layers=recompute_layers,
        precision="fp8" if "fp8" in precision else "bf16" if "bf16" in precision else "fp16",
        overlap=_overlap(layout_row, framework),
        framework=framework,
    )
    return Row(str(row["id"]), str(row.get("family", "")), job, cluster, chips, tuple(assumed))


def _micro_batch(row: dict[str, Any], layout: Layout, batch: int, assumed: list[str]) -> int:
    share = batch // layout.dp
    micro = 1
    if "torchtitan" in str(row.get("family")) and layout.pp > 1:
        micro = max(1, share // layout.pp)  # its default: as many micro-batches as pipeline ranks
    elif layout.pp == 1:
        micro = next(size for size in (4, 2, 1) if share % size == 0)
    assumed.append(f"micro-batch {micro}")
    return micro


def _need(table: dict[str, Any], key: str) -> Any:
    value = table.get(key)
    if value is None:
        raise Undefined(f"{key} is not given")
    return value


def _cluster(hardware: dict[str, Any], assumed: list[str]) -> Cluster:
    chip = str(hardware.get("chip") or "")
    name = next((name for pattern, name in _CLUSTERS if re.search(pattern, chip.lower())), None)
    if name is None:
        raise Undefined(f"no cluster known for chip {chip!r}")
    cluster = load_cluster(name)
    chip_changes: dict[str, Any] = {}
    peak = hardware.get("peak_bf16_tflops")
    if peak:
        if abs(peak - 294.912) < 1:
            cluster = load_cluster("atlas_800t_a2")
        elif peak != cluster.chip.peak_tflops.bf16:
            chip_changes["peak_tflops"] = dataclasses.replace(cluster.chip.peak_tflops, bf16=peak, fp16=peak)
    elif cluster.chip.family == "ascend":
        assumed.append(f"peak {cluster.chip.peak_tflops.bf16} TFLOP/s")
    if hardware.get("hbm_gbps"):
        chip_changes["memory_gb_per_s"] = hardware["hbm_gbps"]
    watts = re.search(r"(\d+) ?W limit", chip)
    if watts:
        chip_changes["power_w"] = float(watts[1])
    inter = hardware.get("inter") or {}
    rate = inter.get("Gbps_per_chip")
    network = cluster.network
    if rate and network:
        network = dataclasses.replace(
            network, device_gbit_per_s=rate, rails=max(1, round(8 * rate / 200)) if rate < 200 else 8
        )
    return dataclasses.replace(
        cluster, chip=dataclasses.replace(cluster.chip, **chip_changes), network=network, efficiency=cluster.efficiency
    )


def _architecture(model: dict[str, Any], name: str, assumed: list[str]) -> Architecture:
    hidden, layers, heads = _need(model, "hidden"), _need(model, "layers"), _need(model, "heads")
    gated = model.get("gated_mlp")
    if gated is None:
        gated = False
        assumed.append("GELU feed-forward")
    ffn = model.get("ffn")
    if ffn is None:
        factor = re.search(r"multiplier ([\d.]+)", str(model.get("note", "")))
        ffn = 4 * hidden
        if gated:
            ffn = 256 * math.ceil(int(8 * hidden / 3 * float(factor[1] if factor else 1)) / 256)
        assumed.append(f"feed-forward width {ffn}")
    vocab = model.get("vocab")
    if vocab is None:
        text = f"{name} {model.get('name', '')}".lower()
        vocab = next((size for pattern, size in _VOCABULARIES if re.search(pattern, text)), 32000)
        assumed.append(f"vocabulary {vocab}")
    kv_heads = model.get("kv_heads") or heads
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=model.get("kv_channels") or hidden // heads,
        intermediate_size=ffn,
        vocab_size=128 * math.ceil(vocab / 128),
        gated=gated,
        rms_norm=gated,
        tied=bool(model.get("tied", not gated)),
        attention_bias=not gated,
        feed_forward_bias=not gated,
        learned_positions=0 if gated else model.get("seq") or 0,
    )


def _layout(layout: dict[str, Any], model: Architecture, chips: int, cluster: Cluster, assumed: list[str]) -> Layout:
    tp, pp = _need(layout, "tp"), _need(layout, "pp")
    cp = layout.get("cp") or 1
    dp = layout.get("dp") or chips // (tp * pp * cp)
    if tp * pp * cp * dp != chips:
        raise Undefined(f"tp {tp} x pp {pp} x cp {cp} x dp {dp} is not {chips} chips")
    vpp = layout.get("vpp")
    schedule = str(layout.get("schedule") or "")
    if vpp is None:
        vpp = 1
        if "one layer per chunk" in schedule:
            vpp = math.ceil(model.num_layers / pp)
        elif "interleaved" in schedule and pp > 1:
            vpp = next((v for v in (2, 3, 4) if model.num_layers % (pp * v) == 0), 1)
            assumed.append(f"{vpp} chunks per pipeline rank")
    given = layout.get("layers_per_stage")
    stages = tuple(int(part) for part in str(given).split(",")) if given else split_layers(model.num_layers, pp * vpp)
    if len(stages) != pp * vpp or sum(stages) != model.num_layers:
        raise Undefined(f"layers_per_stage {given} does not fit {model.num_layers} layers on {pp * vpp} stages")
    shard = dp
    over = re.search(r"over (\d+) ranks", str(layout.get("zero")))
    if over:
        shard = min(dp, int(over[1]))
    return Layout(
        pp=pp,
        dp_replicate=dp // shard,
        dp_shard=shard,
        cp=cp,
        tp=tp,
        stage_layers=stages,
        v_shaped=False,
        devices_per_node=cluster.node.devices,
    )


def split_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage where a source gives none: even; else one fewer at both ends; else the last stages short."""
    if layers % stages == 0:
        return (layers // stages,) * stages
    if (layers + 2) % stages == 0 and stages > 1:
        each = (layers + 2) // stages
        return (each - 1, *[each] * (stages - 2), each - 1)
    each = math.ceil(layers / stages)
    full = layers // each
    rest = [each] * full + ([layers - each * full] if layers % each else [])
    if len(rest) < stages:
        each = layers // stages
        return tuple(each + (stage < layers % stages) for stage in range(stages))
    return tuple(rest)


def _schedule(layout: dict[str, Any], built: Layout) -> str:
    text = str(layout.get("schedule") or "none")
    if built.num_stages > built.pp:
        return "interleaved_1f1b"
    if "zb" in text:
        return text
    return "1f1b"


def _zero(layout: dict[str, Any]) -> int:
    zero = layout.get("zero")
    if isinstance(zero, int):
        return zero
    text = str(zero).lower()
    if "not resharded" in text:
        return 2
    if "zero-3" in text or "fsdp" in text:
        return 3
    return 0 if zero is None else 1


def _recompute(
    layout: dict[str, Any], default: Recompute, assumed: list[str]
) -> tuple[tuple[Recompute, ...], tuple[int, ...]]:
    text = layout.get("recompute")
    if text is None:
        suggested = str(layout.get("suggested_assumption", ""))
        mode: Recompute = "full" if "full" in suggested else default
        assumed.append(f"recompute {mode}")
        return (mode,), ()
    text = str(text)
    counts = re.search(r"\[([\d, ]+)\]", text)
    if counts:
        numbers = tuple(int(part) for part in counts[1].split(","))
        return ("selective",) * len(numbers), numbers
    block = re.search(r"full/block/(\d+)", text)
    if block:
        return ("full",), (int(block[1]),)
    if "full" in text:
        return ("full",), ()
    if "layer" in text:
        return ("every second layer",), ()
    if "op" in text:
        return ("every second matmul",), ()
    return ("selective" if "sel" in text else "none",), ()


def _overlap(layout: dict[str, Any], framework: Framework) -> Overlap:
    given = layout.get("overlap")
    if isinstance(given, dict):
        tensor = bool(given.get("mc2") or given.get("coc"))
        gradients, parameters = bool(given.get("grad_reduce")), bool(given.get("param_gather"))
    else:
        text = str(given or "").lower()
        tensor = "asynctp" in text or "tp-comm-overlap" in text
        gradients, parameters = "grad-reduce" in text or given is None, "param-gather" in text or given is None
    interleaved = any((layout.get(key) or 0) > 1 for key in ("fine_grain_interleave", "micro_batch_interleave_num"))
    return Overlap(
        tensor=tensor,
        tensor_backward=framework.asynchronous_linear or interleaved,
        gradients=gradients and framework.name != "megatron-deepspeed",
        parameters=parameters and framework.name != "megatron-deepspeed",
    )
