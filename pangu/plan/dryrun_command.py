"""The command line of `pangu dryrun`."""

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pangu import config as configuration
from pangu.config import Config
from pangu.errors import ConfigError
from pangu.files import write_atomically
from pangu.parallel.layout import Layout, make_layout
from pangu.plan.commands import one_phase
from pangu.plan.dryrun import DryRun, dry_run
from pangu.plan.hardware import Cluster, load_cluster
from pangu.plan.job import job_of
from pangu.plan.memory import RankMemory, memory
from pangu.plan.recorder import KINDS

_WIDTH_OF_FILES = 160
_MODULES_SHOWN = 12
_DESCRIPTION = """\
Run one training step of CONFIG as one rank of a job of any size, without its devices, its memory or its other ranks,
and say what it would hold, compute and send. --section.field value overrides a field of CONFIG.
"""


def run(arguments: Sequence[str]) -> int:
    """`pangu dryrun ARGUMENTS`. Raises `PanguError` for what the user can mend, also what the real run would raise."""
    options, overrides = _parser().parse_known_args(arguments)
    device = ["--train.device", options.device] if options.device else []
    config = one_phase(configuration.load(options.config, [*overrides, *device]), options.phase)
    if options.world_size < 1:
        raise ConfigError(f"--world-size must be at least 1, got {options.world_size}")
    layout = make_layout(config, options.world_size)
    ranks = _ranks(options, layout)
    cluster = load_cluster(options.cluster)
    config = _with_device(config, cluster)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    planned = memory(job_of(config, layout), cluster)
    reports = []
    for rank in ranks:
        result = dry_run(config, layout, rank, options.micro_batches)
        model = planned[layout.coordinates(rank)["pp"]]
        print_result(console, layout, result, model, cluster)
        reports.append(as_tree(result, model))
    if options.json:
        write_atomically(options.json, json.dumps(reports, indent=1))
        console.print(f"wrote {options.json}")
    return 0


def _with_device(config: Config, cluster: Cluster) -> Config:
    """Where the config leaves the device open, it is the cluster's."""
    if config.train.device != "auto" or cluster.chip.family != "ascend":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device="npu"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pangu dryrun", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of one in configs/")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks of the job")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="R", help="the rank to be (default: 0)")
    which.add_argument("--stage", type=int, metavar="S", help="the first rank that holds this pipeline stage")
    which.add_argument("--all-stages", action="store_true", help="the first rank of every pipeline rank, in turn")
    parser.add_argument("--phase", default="0", help="number or name of the phase (default: 0)")
    parser.add_argument(
        "--micro-batches", type=int, metavar="M", help="run about so many of a step's, and extrapolate the counts"
    )
    parser.add_argument(
        "--cluster",
        default="atlas_800t_a2",
        help="whose devices it has to fit: as for pangu plan (default: %(default)s)",
    )
    parser.add_argument(
        "--device", help="short for --train.device; npu: with an NPU's tensors (default: as the cluster)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything, all modules included")
    return parser


def _ranks(options: argparse.Namespace, layout: Layout) -> list[int]:
    per_pipeline_rank = layout.world_size // layout.pp
    if options.all_stages:
        return [pp_rank * per_pipeline_rank for pp_rank in range(layout.pp)]
    if options.stage is None:
        rank = options.rank or 0
        if not 0 <= rank < layout.world_size:
            raise ConfigError(f"--rank {rank} is not one of the ranks 0 to {layout.world_size - 1} of --world-size")
        return [rank]
    if not 0 <= options.stage < layout.num_stages:
        raise ConfigError(f"--stage {options.stage}: the layout has stages 0 to {layout.num_stages - 1}")
    return [layout.rank_of_stage(options.stage) * per_pipeline_rank]


def print_result(console: Console, layout: Layout, result: DryRun, model: RankMemory, cluster: Cluster) -> None:
    """Tables of memory, computation and communication of one rank."""
    place = ", ".join(f"{name} {index}" for name, index in result.coordinates.items())
    ran = "all of them run" if result.executed == result.micro_batches else f"{result.executed} run, the rest counted"
    console.print(
        f"[bold]rank {result.rank} of {layout.world_size:,}[/bold] ({place}): {result.micro_batches} micro-batches a "
        f"step, {ran}; {result.seconds:.0f} s and {result.resident_bytes / 2**30:.2f} GiB of this machine"
    )
    for stage, parameters in result.stages.items():
        layers = layout.layers_of_stage(stage)
        console.print(
            f"  stage {stage}: layers {layers.start} to {layers.stop - 1}, {parameters:,} parameters per tp rank"
        )
    _print_memory(console, result, model, cluster)
    modules = Table("module", Column("bytes", justify="right"), "of which")
    alike: dict[str, Counter[str]] = {}
    for name, kinds in result.peak.by_module.items():
        alike.setdefault(re.sub(r"\d+", "*", name), Counter()).update(kinds)
    for name, kinds in sorted(alike.items(), key=lambda item: -item[1].total())[:_MODULES_SHOWN]:
        shown = ", ".join(f"{kind} {_bytes(size)}" for kind, size in kinds.most_common(3))
        modules.add_row(name or "(between modules)", _bytes(kinds.total()), shown)
    console.print(modules)
    _print_counts(console, result)


def _print_memory(console: Console, result: DryRun, model: RankMemory, cluster: Cluster) -> None:
    peak = result.peak
    table = Table("memory at the peak", Column("bytes", justify="right"))
    for kind in KINDS:
        if peak.by_kind[kind]:
            table.add_row(kind, _bytes(peak.by_kind[kind]))
    table.add_row("together", _bytes(peak.total), style="bold")
    table.add_row("as pangu plan has it", f"{_bytes(model.allocated)} ({model.allocated / peak.total - 1:+.1%})")
    table.add_row("between steps", _bytes(result.between_steps))
    console.print(table)
    console.print(f"the peak is in: {peak.moment}")
    outside = model.communication + model.overhead
    needed, there = peak.total + outside, cluster.chip.memory_bytes
    console.print(
        f"{'fits' if needed <= there else '[red]does not fit[/red]'} {cluster.chip.name} with {_bytes(there)}: "
        f"{_bytes(needed)} with buffers of communicators, the driver and fragmentation ({_bytes(outside)}, estimated)"
    )


def _print_counts(console: Console, result: DryRun) -> None:
    counts = result.counts
    computed = Table("pass", Column("matmul FLOP", justify="right"), Column("attention FLOP", justify="right"))
    for name in ("forward", "loss", "backward", "recompute"):
        both = [counts.flops[name, operation] for operation in ("matmul", "attention")]
        if any(both):
            computed.add_row(name, *(f"{value:.6g}" for value in both))
    console.print(computed)
    sent = Table("dimension", "collective", Column("calls", justify="right"), Column("sent per step", justify="right"))
    for (dimension, name), traffic in sorted(counts.traffic.items()):
        sent.add_row(dimension, name, f"{traffic.calls:,}", f"{traffic.sent:,}")
    if counts.traffic:
        console.print(sent)
    operators = sum(counts.operators.values())
    common = ", ".join(f"{name} {count:,}" for name, count in counts.operators.most_common(6))
    console.print(f"{operators:,} operators: {common}, ...")


def as_tree(result: DryRun, model: RankMemory) -> dict[str, Any]:
    """Everything known of one rank, for JSON."""
    counts = result.counts
    return {
        "rank": result.rank,
        "coordinates": result.coordinates,
        "parameters_of_stages": result.stages,
        "micro_batches": result.micro_batches,
        "micro_batches_run": result.executed,
        "peak": dataclasses.asdict(result.peak),
        "between_steps": result.between_steps,
        "memory_model": model.allocated,
        "flops": [
            {"pass": name, "operation": operation, "flops": count}
            for (name, operation), count in sorted(counts.flops.items())
        ],
        "communication": [
            {"dimension": dimension, "collective": name, "calls": traffic.calls, "bytes_sent": traffic.sent}
            for (dimension, name), traffic in sorted(counts.traffic.items())
        ],
        "operators": dict(counts.operators.most_common()),
        "seconds": result.seconds,
        "resident_bytes": result.resident_bytes,
    }


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"
