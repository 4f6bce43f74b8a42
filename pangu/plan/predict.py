"""`pangu plan predict`: predictions for explicit layouts, in the schema of published rows."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pangu.errors import ConfigError, DataError, PanguError
from pangu.files import write_atomically
from pangu.plan.activations import layer_bytes
from pangu.plan.conventions import convention_of, flops_per_token, peak_of
from pangu.plan.job import Job
from pangu.plan.layer import block, recomputed
from pangu.plan.memory import RankMemory, memory
from pangu.plan.operators import Operators
from pangu.plan.rows import Row, Undefined, read_row
from pangu.plan.simulate import Durations, schedule_order, simulate
from pangu.plan.time import step_time

GIB, MIB = 2**30, 2**20


def run(arguments: Sequence[str]) -> int:
    """The command line. Raises `PanguError` for files that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="pangu plan predict",
        description="Predict step time, throughput, MFU and memory of the layouts in ROWS, one JSON line each.",
    )
    parser.add_argument("rows", metavar="ROWS", type=Path, help="YAML (or JSON) in the schema of planner_rows.yaml")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="JSON lines, one for every row")
    options = parser.parse_args(arguments)
    rows, hardware = load_rows(options.rows)
    predictions = [predict(row, hardware) for row in rows]
    write_atomically(options.output, "".join(json.dumps(each) + "\n" for each in predictions))
    complete = sum("step_time_s" not in each["skipped"] for each in predictions)
    print(f"{options.output}: {len(predictions)} rows, {complete} with a step time; reasons for the others are in them")
    return 0


def load_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and descriptions of hardware. Raises `DataError` naming the file and the row that is malformed."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: {error}") from None
    hardware = tree.get("hardware") or {} if isinstance(tree, dict) else {}
    lists = [tree] if isinstance(tree, list) else []
    if isinstance(tree, dict):
        lists = [value for value in tree.values() if isinstance(value, list)]
    rows = [row for each in lists for row in each]
    if not rows:
        raise DataError(f"{path}: no rows; expected a list of rows, or tables with lists of rows beside `hardware`")
    if not isinstance(hardware, dict):
        raise DataError(f"{path}: hardware must be a table of machines, got {hardware!r}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not row.get("id"):
            raise DataError(f"{path}: row {index} must be a table with an id, got {str(row)[:80]!r}")
        for field in ("model", "layout"):
            if not isinstance(row.get(field), dict):
                raise DataError(f"{path}: row {row['id']!r}: {field} must be a table, got {row.get(field)!r}")
    return rows, hardware


def predict(row: Mapping[str, Any], hardware: Mapping[str, Any]) -> dict[str, Any]:
    """One row's predictions. What a row does not define is left out and named under `skipped`."""
    result: dict[str, Any] = {"id": row["id"], "family": row.get("family"), "assumed": [], "skipped": {}}
    try:
        read = read_row(row, hardware)
    except Undefined as missing:
        result["skipped"] = dict.fromkeys(("step_time_s", "memory_gib", "fits"), str(missing))
        return result
    except PanguError as error:
        raise DataError(f"row {row['id']!r}: {error}") from None
    result["assumed"] = list(read.assumed)
    try:
        times = dict(_times(row, read))
        ranks = memory(read.job, read.cluster)
    except ConfigError as error:  # a schedule that cannot deal so many micro-batches, more nodes than there are
        result["skipped"] = dict.fromkeys(("step_time_s", "memory_gib", "fits"), str(error))
        return result
    if read.no_time:
        result["skipped"]["step_time_s"] = read.no_time
        result["guess"] = times
    else:
        result |= times
    if read.no_memory:
        result["skipped"] |= dict.fromkeys(("memory_gib", "fits"), read.no_memory)
    else:
        result |= _memory(row, read, ranks)
    result |= _extras(row, read)
    return result


def _times(row: Mapping[str, Any], read: Row) -> Iterator[tuple[str, Any]]:
    job = read.job
    time = step_time(job, read.cluster)
    rate = job.tokens / time.step / read.chips
    convention = convention_of(row, job)
    achieved = rate * flops_per_token(job.model, job.sequence_length, convention)
    peak = peak_of(row, read.cluster.chip.peak_flops("bf16" if job.precision == "fp8" else job.precision))
    yield "step_time_s", time.step
    yield "tokens_per_s_per_chip", rate
    yield "tokens_per_s", rate * read.chips
    yield "samples_per_s_per_chip", rate / job.sequence_length
    yield "days_for_300B_tokens", 300e9 / (rate * read.chips) / 86400
    yield "tflops_per_chip", achieved * 1e-12
    yield "mfu", achieved / peak
    yield "flops_convention", f"{convention}; peak {peak * 1e-12:g} TFLOP/s"
    if job.recompute == ("full",) and "6 N" in convention:
        yield "hfu", achieved / peak * 4 / 3
    yield "bubble_fraction_of_step", time.bubble
    yield "bubble_over_ideal", time.bubble_over_ideal


def _memory(row: Mapping[str, Any], read: Row, ranks: Sequence[RankMemory]) -> Iterator[tuple[str, Any]]:
    fullest = max(ranks, key=lambda rank: rank.total)
    device = read.cluster.chip.memory_bytes
    yield "fits", fullest.total <= device
    yield "memory_total_gib", fullest.total / GIB
    yield "memory_gib", max(rank.reserved for rank in ranks) / GIB
    yield "memory_gib_alloc", max(rank.allocated for rank in ranks) / GIB
    yield "memory_gib_reserved", max(rank.reserved for rank in ranks) / GIB
    yield "memory_gb_max", max(rank.allocated for rank in ranks) * 1e-9
    yield "memory_gb_max_first_last_node", max(ranks[0].total, ranks[-1].total) / GIB
    yield "memory_allocated_bytes", max(rank.static for rank in ranks)
    yield "memory_max_allocated_bytes", max(rank.allocated for rank in ranks)
    measured = _measured(row).get("memory_per_rank_mib")
    layout = read.job.layout
    if isinstance(measured, list):
        yield (
            "memory_per_rank_mib",
            [
                {
                    "rank": each["rank"],
                    "allocated": ranks[layout.coordinates(each["rank"])["pp"]].static / MIB,
                    "max_allocated": ranks[layout.coordinates(each["rank"])["pp"]].first_step / MIB,
                }
                for each in measured
            ],
        )
    else:
        given = measured if isinstance(measured, Mapping) else range(min(read.chips, layout.world_size))
        per_rank = {int(rank): ranks[layout.coordinates(int(rank))["pp"]].allocated / MIB for rank in given}
        yield "memory_per_rank_mib", per_rank if len(per_rank) <= 64 else {0: per_rank[0]}
    yield (
        "memory_per_pipeline_rank_mib",
        [{name: value / MIB for name, value in vars(rank).items()} for rank in ranks],
    )


def _extras(row: Mapping[str, Any], read: Row) -> Iterator[tuple[str, Any]]:
    """Quantities that few rows measure."""
    measured, job = _measured(row), read.job
    if "layer_forward_ms" in measured:
        operators = Operators(job, read.cluster)
        passes = recomputed(operators, block(operators), job.recompute[0])
        host = read.cluster.efficiency.operator_us * 1e-6
        yield "layer_forward_ms", passes.forward.seconds(host) * 1e3
        yield (
            "layer_backward_ms",
            (passes.backward_input.seconds(host) + passes.backward_weight.seconds(host)) * 1e3,
        )
    if "activation_pct_of_tp_baseline" in measured:
        yield "activation_pct_of_tp_baseline", _activation_percentages(job)
    if "bubble_fraction_1f1b" in measured and job.layout.pp > 1:
        yield "bubble_fraction_1f1b", _even_bubble("1f1b", job, 1)
    for name in measured:
        if name.startswith("bubble_fraction_interleaved_vpp"):
            yield name, _even_bubble("interleaved_1f1b", job, int(name.removeprefix("bubble_fraction_interleaved_vpp")))


def _measured(row: Mapping[str, Any]) -> Mapping[str, Any]:
    measured = row.get("measured")
    return measured if isinstance(measured, Mapping) else {}


def _activation_percentages(job: Job) -> dict[str, float]:
    """Figure 7 of Korthikanti et al. 2022."""
    baseline = layer_bytes(replace(job, sequence_parallel=False), "none")
    kept = {
        "seq": layer_bytes(replace(job, sequence_parallel=True), "none"),
        "sel": layer_bytes(replace(job, sequence_parallel=False), "selective"),
        "seqsel": layer_bytes(replace(job, sequence_parallel=True), "selective"),
        "full": layer_bytes(replace(job, sequence_parallel=False), "full"),
    }
    return {name: 100 * value / baseline for name, value in kept.items()}


def _even_bubble(schedule: str, job: Job, chunks: int) -> float:
    """Idle share of the step when all stages are alike and backward takes twice as long as forward."""
    stages = job.layout.pp * chunks
    order = schedule_order(schedule, job.layout.pp, chunks, job.num_micro_batches)
    return simulate(order, Durations([1.0] * stages, [1.0] * stages, [1.0] * stages)).bubble_of_step
