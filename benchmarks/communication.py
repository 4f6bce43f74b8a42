"""Bytes that a rank sends per step and dimension, beside the least that the parallelism can do with.

    python benchmarks/communication.py [--json FILE]

The bytes are those of the collectives that `pangu dryrun` sees when the real step runs under a fake process group; the
minimum is written down here from the literature, not taken from the code:

    tp + sp   per layer one all-gather and one reduce-scatter of `[T, H]` around attention and around the feed-forward
              layer, forward and backward, plus the gather again of what is not kept for the weight gradients (as
              Megatron-LM does), (t - 1) / t of it each (Korthikanti et al. 2022)
    fsdp      ZeRO 1: parameters gathered once per step in the compute dtype, gradients reduced once in fp32
              (Rajbhandari et al. 2020); ZeRO 3: both per micro-batch, and a
              layer's parameters gathered again in backward
    pp        the residual stream's share to the next stage, its gradient back, per micro-batch
    cp        ring: c - 1 blocks of keys and values forward and backward, c - 1 fp32 blocks of gradients (Liu et al.)

All-reduces and broadcasts are not compared: they carry numbers of the loss and of the gradient norm, statistics of the
vocabulary and gradients of norm gains.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from pangu import config as configuration
from pangu.config import Config
from pangu.model.count import layer_parameters
from pangu.parallel.layout import Layout, make_layout
from pangu.plan.dryrun import DryRun, dry_run

MODEL = (
    *("--model.hidden_size", "512", "--model.num_layers", "8", "--model.num_attention_heads", "8"),
    *("--model.num_key_value_heads", "4", "--model.intermediate_size", "1408", "--model.vocab_size", "8192"),
    *("--phases.0.sequence_length", "1024", "--phases.0.batch_size", "16", "--train.micro_batch_size", "1"),
    *("--train.dtype", "bf16", "--parallel.devices_per_node", "64"),
)
LAYOUTS = {
    "tp2": (2, "--parallel.tp", "2"),
    "tp4": (4, "--parallel.tp", "4"),
    "dp8 zero 1": (8, "--parallel.zero_stage", "1"),
    "dp8 zero 3": (8, "--parallel.zero_stage", "3"),
    "pp4": (4, "--parallel.pp", "4"),
    "pp2 x 2 stages": (
        *(2, "--parallel.pp", "2", "--parallel.pipeline_stages_per_rank", "2"),
        *("--parallel.pipeline_schedule", "interleaved_1f1b"),
    ),
    "cp4 ring": (4, "--parallel.cp", "4"),
    "tp2 pp2 dp2": (8, "--parallel.tp", "2", "--parallel.pp", "2"),
    "tp2 cp2 dp2": (8, "--parallel.tp", "2", "--parallel.cp", "2"),
    "tp4 pp4 dp4": (64, "--parallel.tp", "4", "--parallel.pp", "4"),
}


@dataclass(frozen=True)
class Row:
    layout: str
    dimension: str
    sent: int
    minimum: int

    @property
    def ratio(self) -> float:
        return self.sent / self.minimum


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = [row for name in LAYOUTS for row in measure(name)]
    table = Table(
        "layout", "dimension", *(Column(name, justify="right") for name in ("bytes sent", "minimum", "ratio"))
    )
    for row in rows:
        table.add_row(row.layout, row.dimension, f"{row.sent:,}", f"{row.minimum:,}", f"{row.ratio:.4f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps([{**vars(row), "ratio": row.ratio} for row in rows], indent=1))


def measure(name: str) -> list[Row]:
    """The rank in the middle of the pipeline: it sends both ways."""
    world_size, *overrides = LAYOUTS[name]
    config = configuration.load("debug", (*MODEL, *overrides))
    layout = make_layout(config, world_size)
    rank = world_size // layout.pp * (layout.pp // 2)
    result = dry_run(config, layout, rank)
    least = minimum(config, layout, result)
    return [Row(name, dimension, sent(result, dimension), size) for dimension, size in least.items()]


def sent(result: DryRun, dimension: str) -> int:
    """Without the few numbers that are summed over a group: statistics of the loss, norms, gradients of gains."""
    return sum(
        traffic.sent
        for (name, collective), traffic in result.counts.traffic.items()
        if name == dimension and collective not in ("all-reduce", "broadcast")
    )


def minimum(config: Config, layout: Layout, result: DryRun) -> dict[str, int]:
    model, count = config.model, result.micro_batches
    tokens = config.train.micro_batch_size * config.phases[0].sequence_length // layout.cp
    stream = 2 * tokens * model.hidden_size  # bf16
    stages = list(result.stages)
    layers = sum(layout.stage_layers[stage] for stage in stages)
    first, last = 0 in stages, layout.num_stages - 1 in stages
    least = {}
    t, c, n = layout.tp, layout.cp, layout.dp * layout.cp
    if t > 1:
        collectives = 10 * layers  # forward 4; backward 4, and 2 gathers again
        collectives += 2 * first + 2 * last  # scatter and gather of the embedding, gather and scatter of the head
        least["tp"] = count * collectives * stream * (t - 1) // t
    if n > 1:
        values = sum(result.stages.values())
        inside = layers * layer_parameters(model) // t  # gathered again in backward; embedding and head are kept
        per_step = 6 * values if config.parallel.zero_stage < 3 else count * (6 * values + 2 * inside)
        least["fsdp"] = per_step * (n - 1) // n
    if layout.pp > 1:
        forward = sum(stage < layout.num_stages - 1 for stage in stages)
        backward = sum(stage > 0 for stage in stages)
        least["pp"] = count * (forward + backward) * stream // t
    if c > 1:
        block = 2 * tokens * model.key_value_size // t  # values of keys and values together
        least["cp"] = count * layers * (c - 1) * block * (2 + 2 + 4)
    return least


if __name__ == "__main__":
    main()
