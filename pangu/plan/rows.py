"""Rows of published measurements (the schema of planner_rows.yaml) as jobs and clusters.

What a row leaves out and what matters little is filled from its model's public configuration or the commonest choice;
every such assumption stands beside the prediction. What cannot be assumed raises `Undefined` or is a reason, `Row.
no_time` or `Row.no_memory`, not to predict.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from pangu.errors import DataError
from pangu.parallel.layout import Layout
from pangu.plan.frameworks import framework_of
from pangu.plan.hardware import Cluster, load_cluster
from pangu.plan.job import Architecture, Framework, Job, Overlap, Precision, Recompute
from pangu.plan.zero_bubble import LIMITS

_CLUSTERS = (
    ("910b3|800t", "atlas_800t_a2"),
    ("910_93|910c|a3 ", "atlas_a3_superpod"),
    ("ascend|910b|npu", "atlas_900_a2"),
    ("b200", "dgx_b200"),
    ("h100|h800|h200", "dgx_h100"),
    ("a100.*40 ?gb", "dgx_a100_40gb"),
    ("a100|a800|ampere", "dgx_a100"),
    ("v100", "dgx2_v100"),
)
"""The first pattern found in a chip's name names the cluster whose figures stand for what the row leaves out."""

_NOMINAL_GB = {"atlas_800t_a2": 64, "atlas_900_a2": 64, "dgx_a100": 80, "dgx_a100_40gb": 40, "dgx_h100": 80}

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
    """A row lacks what any prediction needs; the message names it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as the planner reads it."""

    job: Job
    cluster: Cluster
    chips: int
    assumed: tuple[str, ...]
    no_time: str
    """Why a step time would be a guess. Empty: it would not."""
    no_memory: str
    """The same of the memory."""


def read_row(row: Mapping[str, Any], hardware: Mapping[str, Any]) -> Row:
    """Raises `Undefined` for what is missing, `DataError` for what cannot be."""
    assumed: list[str] = []
    model_row, layout_row = _table(row, "model"), _table(row, "layout")
    where = row.get("hardware") or {}
    machine = where if isinstance(where, Mapping) else hardware.get(str(where)) or {}
    cluster, no_time = _cluster(machine, assumed)
    model = _architecture(model_row, str(row["id"]), assumed)
    layout = _layout(layout_row, model, _count(row, "chips"), cluster, assumed)
    framework = framework_of(row, layout_row)
    model = _with_framework(model, model_row, framework)
    batch = _count(layout_row, "gbs")
    micro, no_micro = _micro_batch(layout_row, layout, batch, assumed)
    if batch % (micro * layout.dp):
        raise Undefined(f"gbs {batch} is not a multiple of mbs {micro} x dp {layout.dp}")
    recompute, recompute_layers, no_recompute = _recompute(layout_row, framework, layout, assumed)
    no_layers = "no-op layers: their number is not given" if layout_row.get("noop_layers") else ""
    zero = _zero(layout_row)
    if framework.weight_bytes == 0 and layout.pp > 1:
        zero = 1  # torchtitan keeps parameters gathered and gradients whole under pipelines
    job = Job(
        model=model,
        layout=layout,
        sequence_length=_count(model_row, "seq"),
        micro_batch_size=micro,
        batch_size=batch,
        schedule=_schedule(layout_row, layout),
        sequence_parallel=layout.tp > 1 if layout_row.get("sp") is None else bool(layout_row["sp"]),
        zero_stage=zero,
        recompute=recompute,
        recompute_layers=recompute_layers,
        recompute_layers_of_rank=framework.name == "mindspeed",
        recomputes_activation=bool(layout_row.get("recompute_activation_function")),
        precision=_precision(str(row.get("precision") or "bf16")),
        overlap=_overlap(layout_row, framework),
        framework=framework,
    )
    return Row(
        job,
        cluster,
        _count(row, "chips"),
        tuple(assumed),
        no_time or no_micro or no_layers,
        no_micro or no_recompute or no_layers,
    )


def _table(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    if not isinstance(value, Mapping):
        raise DataError(f"row {row.get('id')!r}: {key} must be a table of fields, got {value!r}")
    return value


def _count(table: Mapping[str, Any], key: str) -> int:
    """A whole number from 1 on. Raises `Undefined` where there is none, `DataError` where it is something else."""
    value = table.get(key)
    if value is None:
        raise Undefined(f"{key} is not given")
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != int(value):
        raise DataError(f"{key} must be a whole number from 1 on, got {value!r}")
    return int(value)


def _optional(table: Mapping[str, Any], key: str) -> int | None:
    return None if table.get(key) is None else _count(table, key)


def _rate(table: Mapping[str, Any], key: str) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise DataError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def _cluster(hardware: Mapping[str, Any], assumed: list[str]) -> tuple[Cluster, str]:
    """The cluster, and why its rates are not known."""
    text = str(hardware.get("chip") or "")
    name = next((name for pattern, name in _CLUSTERS if re.search(pattern, text.lower())), None)
    if name is None:
        raise Undefined(f"no figures known for chip {text!r}")
    peak, unknown = _rate(hardware, "peak_bf16_tflops"), ""
    if name == "atlas_900_a2" and peak is not None and abs(peak - 294.912) < 1:
        name = "atlas_800t_a2"
    cluster = load_cluster(name)
    chip = cluster.chip
    if peak is not None and peak != chip.peak_tflops.bf16:
        chip = dataclasses.replace(chip, peak_tflops=dataclasses.replace(chip.peak_tflops, bf16=peak, fp16=peak))
    elif peak is None and chip.family == "ascend":
        unknown = "the chip's variant is not given: 246 to 374 TFLOP/s"
    if (memory := _rate(hardware, "hbm_gb")) and name in _NOMINAL_GB:
        chip = dataclasses.replace(chip, memory_gib=chip.memory_gib * memory / _NOMINAL_GB[name])
    if bandwidth := _rate(hardware, "hbm_gbps"):
        chip = dataclasses.replace(chip, memory_gb_per_s=bandwidth)
    if watts := re.search(r"(\d+) ?W limit", text):
        chip = dataclasses.replace(chip, power_w=float(watts[1]))
    network = cluster.network
    between = hardware.get("inter")
    between = between if isinstance(between, Mapping) else {}
    rate = _rate(between, "Gbps_per_chip")
    if network and rate:
        ports = max(1, round(cluster.node.devices * rate / 100)) if rate < 100 else cluster.node.devices
        network = dataclasses.replace(network, device_gbit_per_s=rate, rails=ports)
    elif network and not str(between.get("kind")).startswith("none"):
        assumed.append(f"network {network.device_gbit_per_s:g} Gbit/s per device")
    return dataclasses.replace(cluster, chip=chip, network=network), unknown


def _architecture(model: Mapping[str, Any], name: str, assumed: list[str]) -> Architecture:
    hidden, layers, heads = _count(model, "hidden"), _count(model, "layers"), _count(model, "heads")
    gated = bool(model.get("gated_mlp"))
    if model.get("gated_mlp") is None:
        assumed.append("GELU feed-forward")
    wide = _optional(model, "ffn")
    if wide is None:
        factor = re.search(r"multiplier ([\d.]+)", str(model.get("note", "")))
        llama = 256 * math.ceil(int(8 * hidden / 3 * float(factor[1] if factor else 1)) / 256)
        wide = llama if gated else 4 * hidden
        assumed.append(f"feed-forward width {wide}")
    vocab = _optional(model, "vocab")
    if vocab is None:
        text = f"{name} {model.get('name', '')}".lower()
        vocab = next((size for pattern, size in _VOCABULARIES if re.search(pattern, text)), 32000)
        assumed.append(f"vocabulary {vocab}")
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=_optional(model, "kv_heads") or heads,
        head_dim=_optional(model, "kv_channels") or hidden // heads,
        intermediate_size=wide,
        vocab_size=128 * math.ceil(vocab / 128),
        gated=gated,
        rms_norm=gated,
        tied=bool(model.get("tied", not gated)),
        attention_bias=not gated,
        feed_forward_bias=not gated,
        learned_positions=0 if gated else _count(model, "seq"),
    )


def _with_framework(model: Architecture, row: Mapping[str, Any], framework: Framework) -> Architecture:
    """Defaults of frameworks: Megatron of 2021 ties the head and drops out; today's does not tie, and drops out unless
    told otherwise (`hidden_dropout` 0.1), as every script for a Llama does."""
    if framework.name == "megatron-core" and row.get("tied") is None:
        model = dataclasses.replace(model, tied=False)
    drops = framework.name == "megatron-2021" or (framework.name == "megatron-core" and not model.gated)
    return dataclasses.replace(model, dropout=drops)


def _layout(layout: Mapping[str, Any], model: Architecture, chips: int, cluster: Cluster, assumed: list[str]) -> Layout:
    tp, pp, cp = _count(layout, "tp"), _count(layout, "pp"), _optional(layout, "cp") or 1
    dp = _optional(layout, "dp") or max(1, chips // (tp * pp * cp))
    if tp * pp * cp * dp != chips:
        raise Undefined(f"tp {tp} x pp {pp} x cp {cp} x dp {dp} is not {chips} chips")
    chunks, schedule = _optional(layout, "vpp"), str(layout.get("schedule") or "")
    if chunks is None:
        chunks = 1
        if "one layer per chunk" in schedule:
            chunks = math.ceil(model.num_layers / pp)
        elif "interleaved" in schedule and pp > 1:
            chunks = next((v for v in (2, 3, 4) if model.num_layers % (pp * v) == 0), 1)
            assumed.append(f"{chunks} chunks per pipeline rank")
    given = layout.get("layers_per_stage")
    try:
        parts = given if isinstance(given, list) else str(given or "").split(",")
        stages = tuple(int(part) for part in parts if str(part).strip())
    except (TypeError, ValueError):
        raise DataError(f"layers_per_stage must be numbers with commas between them, got {given!r}") from None
    stages = stages or split_layers(model.num_layers, pp * chunks)
    if len(stages) != pp * chunks or sum(stages) != model.num_layers:
        raise Undefined(f"{model.num_layers} layers on {pp * chunks} stages: {given or 'too many stages'}")
    over = re.search(r"over (\d+) ranks", str(layout.get("zero")))
    shard = min(dp, int(over[1])) if over else dp
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
    if (layers + 2) % stages == 0 and stages > 2:
        each = (layers + 2) // stages
        return (each - 1, *[each] * (stages - 2), each - 1)
    each = math.ceil(layers / stages)
    rest = layers - each * (stages - 1)
    if rest > 0:
        return (*[each] * (stages - 1), rest)
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def _micro_batch(layout: Mapping[str, Any], built: Layout, batch: int, assumed: list[str]) -> tuple[int, str]:
    """Sequences of a micro-batch, and why that is a guess."""
    given = _optional(layout, "mbs")
    if given is not None:
        return given, ""
    suggested = re.search(r"mbs (\d+)", str(layout.get("suggested_assumption")))
    share = batch // built.dp
    micro = int(suggested[1]) if suggested else 1 if built.pp > 1 else next((n for n in (4, 2) if share % n == 0), 1)
    assumed.append(f"micro-batch {micro}")
    return micro, "" if suggested else "the micro-batch is not given"


def _schedule(layout: Mapping[str, Any], built: Layout) -> str:
    text = str(layout.get("schedule"))
    if built.pp == 1 or built.num_stages == built.pp:
        return text if text in LIMITS and built.pp > 1 else "1f1b"
    return "interleaved_1f1b"


def _zero(layout: Mapping[str, Any]) -> int:
    zero = layout.get("zero")
    if isinstance(zero, int):
        if not 0 <= zero <= 3:
            raise DataError(f"zero must be a stage from 0 to 3, got {zero!r}")
        return zero
    text = str(zero).lower()
    if "not resharded" in text:
        return 2
    if "zero-3" in text or "fsdp" in text or "mindspore" in text:
        return 3
    return 1 if zero is not None or "param-gather" in str(layout.get("overlap")) else 0


def _recompute(
    layout: Mapping[str, Any], framework: Framework, built: Layout, assumed: list[str]
) -> tuple[tuple[Recompute, ...], tuple[int, ...], str]:
    """Modes and numbers of layers, and why memory would be a guess."""
    if layout.get("recompute") is None:
        mode: Recompute = "selective" if not framework.fused_attention and layout.get("flash_attn") is None else "none"
        if "zb" in str(layout.get("schedule")) or layout.get("sp") is False:
            mode = "none"
        if "full recompute" in str(layout.get("suggested_assumption")):
            mode = "full"
        assumed.append(f"recompute {mode}")
        unclear = built.tp > 1 and layout.get("sp") is None
        return (mode,), (), "neither recomputation nor sequence parallelism is given" if unclear else ""
    text = str(layout["recompute"])
    if counts := re.search(r"\[([\d, ]+)\]", text):
        numbers = tuple(int(part) for part in counts[1].split(","))
        if len(numbers) != built.pp:
            raise Undefined(f"recompute {text!r} has {len(numbers)} numbers for {built.pp} pipeline ranks")
        selective: tuple[Recompute, ...] = tuple("selective" for _ in numbers)
        return selective, numbers, ""
    if block := re.search(r"full/block/(\d+)", text):
        return ("full",), (int(block[1]),), ""
    if "full" in text:
        return ("full",), (), ""
    if "(layer)" in text:
        return ("every second layer",), (), ""
    if "(op)" in text:
        return ("every second matmul",), (), ""
    return ("selective" if "sel" in text else "none",), (), ""


def _precision(text: str) -> Precision:
    return "fp8" if "fp8" in text else "bf16" if "bf16" in text else "fp16"


def _overlap(layout: Mapping[str, Any], framework: Framework) -> Overlap:
    given = layout.get("overlap")
    if isinstance(given, Mapping):
        tensor = bool(given.get("mc2") or given.get("coc"))
        gradients, parameters = bool(given.get("grad_reduce")), bool(given.get("param_gather"))
    else:
        text = str(given or "").lower()
        tensor = "asynctp" in text or "tp-comm-overlap" in text
        gradients, parameters = (given is None or words in text for words in ("grad-reduce", "param-gather"))
    interleaved = any(
        (_optional(layout, key) or 0) > 1 for key in ("fine_grain_interleave", "micro_batch_interleave_num")
    )
    after_the_last = framework.name == "megatron-deepspeed"  # its pipeline engine reduces when all passes are done
    return Overlap(
        tensor=tensor,
        tensor_backward=framework.asynchronous_linear or interleaved,
        gradients=gradients and not after_the_last,
        parameters=parameters and not after_the_last,
    )
