"""How long the ranks of a pipeline wait for one another, under every schedule.

    python benchmarks/bubble.py [--seconds 0.1] [--rounds 2] [--micro-batches 16] [--ranks 8] [--output bubble.json]

The pipeline is that of training (pangu.parallel.pipeline) on processes that send over gloo. Its stages sleep instead of
computing: `seconds` for a forward pass and for each of the two gradients, so that processes may outnumber cores. Of an
interleaved pipeline it is a virtual stage that takes so long.

    bubble    1 - time asleep / time from the first pass's start to the last one's end, over all ranks
    formula   (p - 1) / (p - 1 + n v) with p ranks, n micro-batches and v stages per rank (Narayanan et al. 2021), or
              (p - 1) / (p - 1 + 3 n v) where the gradients of weights fill gaps (Qi et al. 2023)
    order     of an ideal machine that runs the passes in the library's order (pangu.plan.simulate)
    measured  of the fastest round

What an interpreter does between passes counts as waiting: it is the smaller, the longer the passes are.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pangu_kernels.deferred import Deferred
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pangu.config import Config, load
from pangu.data.batch import Batch
from pangu.model.linear import Linear
from pangu.parallel.layout import Layout, make_layout
from pangu.parallel.mesh import make_mesh
from pangu.parallel.pipeline import Pipeline
from pangu.plan.simulate import Durations, schedule_order, simulate

CASES = (
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 6),
    ("interleaved_zero_bubble", 2),
    ("zero_bubble_v", 2),
    ("dualpipe_v", 2),
)
FILLS_GAPS = ("interleaved_zero_bubble", "zero_bubble_v", "dualpipe_v")
TOKENS = 8


class SleepingStage(nn.Module):
    """What a pipeline asks of a `pangu.model.Transformer`."""

    def __init__(self, config: Config, layout: Layout, stage: int) -> None:
        super().__init__()
        self.config = config.model
        self.compute_dtype = torch.float32
        self.embedding = None
        self.layers = nn.ModuleDict({"0": Linear(1, 1)})
        self.norm = nn.Identity() if stage == layout.num_stages - 1 else None
        self.seconds = 0.0
        self.passes: list[tuple[float, float]] = []

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        cache: None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Any:
        linear: Any = self.layers["0"]
        if not x.is_floating_point():
            x = torch.zeros(len(x), self.config.hidden_size)
        y: Tensor = _SleepingLayer.apply(x, linear.weight, get_gradient_edge(linear.weight), linear.deferred, self)
        return y if labels is None else (y.sum(), None)

    def sleep(self) -> None:
        start = time.monotonic()
        time.sleep(self.seconds)
        self.passes.append((start, time.monotonic()))

    def weight_gradient(self) -> Tensor:
        self.sleep()
        return torch.zeros(1, 1)


class _SleepingLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, edge: GradientEdge, deferred: Deferred | None, stage: SleepingStage
    ) -> Tensor:
        ctx.edge, ctx.deferred, ctx.stage = edge, deferred, stage
        stage.sleep()
        return x + 0

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stage.sleep()
        if ctx.deferred is None:
            return d_y, ctx.stage.weight_gradient(), None, None, None
        ctx.deferred.add(ctx.edge, ctx.stage.weight_gradient)
        return d_y, None, None, None, None


def make_config(schedule: str, stages_per_rank: int, options: argparse.Namespace) -> Config:
    parallel = {"pp": options.ranks, "pipeline_schedule": schedule, "pipeline_stages_per_rank": stages_per_rank}
    phase = {"batch_size": options.micro_batches, "sequence_length": TOKENS}
    words = {f"--parallel.{key}": value for key, value in parallel.items()}
    words |= {f"--phases.0.{key}": value for key, value in phase.items()}
    words |= {"--train.micro_batch_size": 1, "--model.num_layers": options.ranks * stages_per_rank}
    return load("debug", [str(word) for pair in words.items() for word in pair])


def make_batches(count: int) -> list[Batch]:
    positions = torch.arange(TOKENS)
    return [Batch(positions, positions, positions, torch.tensor([0, TOKENS], dtype=torch.int32))] * count


def bubble(stages: Sequence[SleepingStage]) -> float:
    """Of all ranks, from the passes of this rank's stages; clocks of one machine agree."""
    passes = [moments for stage in stages for moments in stage.passes]
    mine = (
        min(start for start, _ in passes),
        max(end for _, end in passes),
        sum(end - start for start, end in passes),
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    starts, ends, asleep = zip(*everyone, strict=True)
    return 1 - sum(asleep) / len(asleep) / (max(ends) - min(starts))


def measure(schedule: str, stages_per_rank: int, options: argparse.Namespace) -> float:
    config = make_config(schedule, stages_per_rank, options)
    layout = make_layout(config, options.ranks)
    mesh = make_mesh(layout, "cpu")
    stages = [SleepingStage(config, layout, stage) for stage in layout.stages_of(mesh.coordinates["pp"])]
    pipeline: Any = Pipeline(stages, mesh, config)  # type: ignore[arg-type]
    batches = make_batches(options.micro_batches)
    pipeline.forward_backward(batches, 1.0)  # connects the ranks
    results = []
    for _ in range(options.rounds):
        for stage in stages:
            stage.seconds, stage.passes = options.seconds, []
        dist.barrier()
        pipeline.forward_backward(batches, 1.0)
        results.append(bubble(stages))
    return min(results)


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Rank 0 writes the measured bubbles, in the order of `CASES`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", options.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    results = [measure(schedule, stages_per_rank, options) for schedule, stages_per_rank in CASES]
    if rank == 0:
        Path(folder, "results").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def formula(schedule: str, stages_per_rank: int, options: argparse.Namespace) -> Fraction:
    waits = options.ranks - 1
    work = options.micro_batches * stages_per_rank * (3 if schedule in FILLS_GAPS else 1)
    return Fraction(waits, waits + work)


def of_order(schedule: str, stages_per_rank: int, options: argparse.Namespace) -> float:
    order = schedule_order(schedule, options.ranks, stages_per_rank, options.micro_batches)
    ones = [1] * order.num_stages
    return simulate(order, Durations(ones, ones, ones)).bubble_of_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a pass through a stage")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    for schedule, stages_per_rank in CASES:  # refused before processes start
        make_layout(make_config(schedule, stages_per_rank, options), options.ranks)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (options, folder), nprocs=options.ranks)
        measured = json.loads(Path(folder, "results").read_text())
    rows = []
    print(f"{'schedule':<24}{'stages/rank':>12}{'formula':>18}{'order':>9}{'measured':>10}{'points off':>12}")
    for (schedule, stages_per_rank), found in zip(CASES, measured, strict=True):
        wanted, ideal = formula(schedule, stages_per_rank, options), of_order(schedule, stages_per_rank, options)
        shown = f"{wanted} = {float(wanted):.2%}"
        off = 100 * (found - float(wanted))
        print(f"{schedule:<24}{stages_per_rank:>12}{shown:>18}{ideal:>9.2%}{found:>10.2%}{off:>12.2f}")
        rows.append(
            {
                "schedule": schedule,
                "stages_per_rank": stages_per_rank,
                "formula": float(wanted),
                "order": float(ideal),
                "measured": found,
            }
        )
    if options.output:
        settings = {key: getattr(options, key) for key in ("seconds", "rounds", "micro_batches", "ranks")}
        options.output.write_text(json.dumps({"settings": settings, "schedules": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
