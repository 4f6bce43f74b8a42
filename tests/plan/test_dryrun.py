"""The dry run: what it counts is what a real run allocates, computes and sends."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pangu import config as configuration
from pangu.cli import main
from pangu.config import Config
from pangu.errors import ConfigError, TrainingError
from pangu.model.count import flops_per_token
from pangu.model.transformer import Block
from pangu.parallel.layout import make_layout
from pangu.plan.counting import ATTENTION_BACKWARD
from pangu.plan.dryrun import Counts, DryRun, dry_run
from pangu.plan.hardware import load_cluster
from pangu.plan.job import job_of
from pangu.plan.memory import memory
from pangu.plan.operators import Operators
from pangu.plan.time import StageTime, data_parallel, send_seconds, stage_passes

SMALL = ("--parallel.devices_per_node", "64", "--metrics.tensorboard", "false")


def config_of(*overrides: str) -> Config:
    config = configuration.load("debug", (*SMALL, *overrides))
    return dataclasses.replace(
        config, metrics=dataclasses.replace(config.metrics, statistics_interval=0, peak_flops=1.0)
    )


def run(world_size: int, rank: int, *overrides: str, micro_batches: int | None = None) -> DryRun:
    config = config_of(*overrides)
    return dry_run(config, make_layout(config, world_size), rank, micro_batches)


def total_flops(counts: Counts, *passes: str) -> float:
    """With attention's backward as two products, as model FLOPs have it, instead of two and a half."""
    return sum(
        count * (0.8 if (name, operation) == ("backward", "attention") else 1)
        for (name, operation), count in counts.flops.items()
        if name in passes
    )


LAYOUTS = {
    "one device": (1,),
    "tp": (2, "--parallel.tp", "2"),
    "tp without sp": (2, "--parallel.tp", "2", "--parallel.sequence_parallel", "false"),
    "cp": (4, "--parallel.cp", "4"),
    "cp, all-gather": (2, "--parallel.cp", "2", "--parallel.context_exchange", "all_gather"),
    "zero 3": (2, "--parallel.zero_stage", "3"),
    "1f1b": (4, "--parallel.pp", "4", "--train.micro_batch_size", "1"),
    "zero bubble": (
        2,
        "--parallel.pp",
        "2",
        "--parallel.pipeline_schedule",
        "zero_bubble_v",
        "--parallel.pipeline_stages_per_rank",
        "2",
    ),
    "tp, pp and dp": (8, "--parallel.tp", "2", "--parallel.pp", "2", "--train.micro_batch_size", "1"),
    "full recomputation": (2, "--parallel.tp", "2", "--parallel.recompute.mode", "full"),
    "LFA": (
        *(2, "--parallel.tp", "2", "--model.local_filter", "two_convolutions_norm"),
        *("--model.num_key_value_heads", "4"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_together_compute_what_mfu_counts(name: str) -> None:
    world_size, *overrides = LAYOUTS[name]
    config = config_of(*overrides)
    layout = make_layout(config, world_size)
    ranks = [dry_run(config, layout, rank) for rank in range(world_size)]
    computed = sum(total_flops(each.counts, "forward", "loss", "backward") for each in ranks)
    phase = config.phases[0]
    assert computed == flops_per_token(config.model, phase.sequence_length) * phase.batch_size * phase.sequence_length
    again = sum(total_flops(each.counts, "recompute") for each in ranks)
    forward = sum(total_flops(each.counts, "forward") for each in ranks)
    assert again == (forward if name == "full recomputation" else 0)


class Computed(Operators):
    """The time model's operators, in FLOPs instead of seconds."""

    def matmul(self, m: float, n: float, k: float, weight_gradient: bool = False) -> float:
        return 2 * m * n * k

    def attention(self, flops: float, blocks: float, backward: bool = False) -> float:
        return flops * (ATTENTION_BACKWARD if backward else 1)

    def moving(self, size: float) -> float:
        return 0.0

    def gather(self, size: int, members: int, full_bytes: float, flows: int = 0) -> float:
        return 0.0

    def send(self, size: float, across_nodes: bool) -> float:
        return 0.0


class Sent(Computed):
    """In bytes sent."""

    def matmul(self, m: float, n: float, k: float, weight_gradient: bool = False) -> float:
        return 0.0

    def attention(self, flops: float, blocks: float, backward: bool = False) -> float:
        return 0.0

    def gather(self, size: int, members: int, full_bytes: float, flows: int = 0) -> float:
        return (size - 1) / size * full_bytes

    def send(self, size: float, across_nodes: bool) -> float:
        return size


def sent(result: DryRun, dimension: str) -> int:
    """Without sums of a few numbers."""
    return sum(
        traffic.sent
        for (name, collective), traffic in result.counts.traffic.items()
        if name == dimension and collective not in ("all-reduce", "broadcast")
    )


@pytest.mark.parametrize("name", [*sorted({*LAYOUTS} - {"tp without sp", "zero 3"}), "cp and tp"])
def test_the_time_model_reckons_with_the_same(name: str) -> None:
    world_size, *overrides = {**LAYOUTS, "cp and tp": (4, "--parallel.cp", "2", "--parallel.tp", "2")}[name]
    config = config_of("--train.dtype", "bf16", *overrides)
    layout, cluster = make_layout(config, world_size), load_cluster("atlas_800t_a2")
    job = job_of(config, layout)
    ranks = [dry_run(config, layout, rank) for rank in range(world_size)]
    computed, exchanged = (stage_passes(operators(job, cluster)) for operators in (Computed, Sent))
    costs = [
        [(each.forward, each.backward_input, each.backward_weight) for each in cost] for cost in (computed, exchanged)
    ]
    for pp_rank in range(layout.pp):
        stages = layout.stages_of(pp_rank)
        mine = [each for each in ranks if each.coordinates["pp"] == pp_rank]
        flops = sum(cost.compute for stage in stages for cost in costs[0][stage]) * job.num_micro_batches
        assert sum(sum(each.counts.flops.values()) for each in mine) == flops * len(mine)
        for dimension in ("tp", "cp"):
            total = sum(
                cost.exposed.get(dimension, 0) + cost.hidden.get(dimension, 0)
                for stage in stages
                for cost in costs[1][stage]
            )
            assert {sent(each, dimension) for each in mine} == {total * job.num_micro_batches}
        if layout.pp > 1:
            edges = [
                (stage, stage + step) for stage in stages for step in (-1, 1) if 0 <= stage + step < layout.num_stages
            ]
            neighbours = sum(layout.rank_of_stage(a) != layout.rank_of_stage(b) for a, b in edges)
            passed = send_seconds(Sent(job, cluster)) * neighbours * job.num_micro_batches
            votes = sent(mine[0], "pp") - passed  # numbers by which torch's stages agree before their first step
            assert 0 <= votes <= 4 * neighbours


def test_the_time_model_reckons_with_the_same_all_reduces() -> None:
    """But for three numbers a token, by which the ranks of a sharded vocabulary agree on the loss, and two sums."""
    world_size, *overrides = LAYOUTS["tp without sp"]
    config = config_of("--train.dtype", "bf16", *overrides)
    layout = make_layout(config, world_size)
    job = job_of(config, layout)
    (passes,) = stage_passes(Sent(job, load_cluster("atlas_800t_a2")))
    costs = (passes.forward, passes.backward_input, passes.backward_weight)
    total = sum(cost.exposed.get("tp", 0) + cost.hidden.get("tp", 0) for cost in costs) * job.num_micro_batches
    for rank in range(world_size):
        traffic = dry_run(config, layout, rank).counts.traffic
        assert {key for key in traffic if key[0] == "tp"} == {("tp", "all-reduce")}
        agreed = 3 * 4 * job.local_tokens * job.num_micro_batches
        assert traffic["tp", "all-reduce"].sent == total + agreed + 8 + 8


SHARDED = {
    "zero 1": (2,),
    "zero 2": (2, "--parallel.zero_stage", "2"),
    "zero 3": (2, "--parallel.zero_stage", "3"),
    "zero 3 and tp": (4, "--parallel.zero_stage", "3", "--parallel.tp", "2"),
    "hybrid": (4, "--parallel.dp_replicate", "2", "--parallel.dp_shard", "2"),
    "hybrid, zero 3": (4, "--parallel.dp_replicate", "2", "--parallel.dp_shard", "2", "--parallel.zero_stage", "3"),
    "cp": (2, "--parallel.cp", "2"),
    "zero 1 and pp": (4, "--parallel.pp", "2"),
    "zero 2 and pp": (4, "--parallel.zero_stage", "2", "--parallel.pp", "2"),
    "zero 3 and pp": (4, "--parallel.zero_stage", "3", "--parallel.pp", "2"),
}


@pytest.mark.parametrize("name", SHARDED)
def test_the_time_model_reckons_with_the_same_data_parallelism(name: str) -> None:
    world_size, *overrides = SHARDED[name]
    config = config_of(
        *("--train.dtype", "bf16", "--phases.0.batch_size", "8", "--train.micro_batch_size", "1", *overrides)
    )
    layout = make_layout(config, world_size)
    job = job_of(config, layout)
    operators = Sent(job, load_cluster("atlas_800t_a2"))
    m = job.num_micro_batches
    passes = stage_passes(operators)
    gathers, reductions, hidden = data_parallel(operators, (StageTime(0, 0, 0),) * layout.num_stages)
    assert hidden == 0
    for stage in range(layout.num_stages):
        forward, again, scattered = (
            each.exposed.get("dp", 0) + each.hidden.get("dp", 0)
            for each in (passes[stage].forward, passes[stage].backward_input, passes[stage].backward_weight)
        )
        traffic = dry_run(config, layout, stage * world_size // layout.num_stages).counts.traffic
        reduced = traffic["fsdp", "reduce-scatter"].sent
        if layout.dp_replicate > 1:
            reduced += traffic["dp_replicate", "all-reduce"].sent
        assert traffic["fsdp", "all-gather"].sent == gathers[stage] + m * (forward + again)
        assert reduced == reductions[stage] + m * scattered


@pytest.mark.parametrize(
    "overrides",
    [
        ("--train.micro_batch_size", "1", "--phases.0.batch_size", "9"),
        ("--parallel.pp", "2", "--train.micro_batch_size", "1", "--phases.0.batch_size", "8"),
        (
            *("--parallel.pp", "2", "--parallel.pipeline_stages_per_rank", "2", "--train.micro_batch_size", "1"),
            *("--parallel.pipeline_schedule", "interleaved_1f1b", "--phases.0.batch_size", "12"),
        ),
    ],
    ids=["one stage", "1f1b", "interleaved"],
)
def test_fewer_micro_batches_tell_everything(overrides: tuple[str, ...]) -> None:
    world_size = 2 if "--parallel.pp" in overrides else 1
    whole, part = run(world_size, 0, *overrides), run(world_size, 0, *overrides, micro_batches=3)
    assert part.executed < whole.executed == whole.micro_batches
    assert part.counts == whole.counts
    targets = 4 * (whole.micro_batches - part.executed) if world_size > 1 else 0  # torch wants one number for each
    assert part.peak.total == whole.peak.total - targets


LARGER = (
    *("--model.vocab_size", "32000", "--model.hidden_size", "2048", "--model.intermediate_size", "5632"),
    *("--model.num_layers", "8", "--model.num_attention_heads", "16", "--model.num_key_value_heads", "8"),
    *("--phases.0.sequence_length", "4096", "--train.micro_batch_size", "1", "--train.dtype", "bf16"),
)
PIPELINE = ("--parallel.pp", "2", "--parallel.tp", "4", "--parallel.dp_shard", "2")
TWO_STAGES = (*PIPELINE, "--parallel.pipeline_stages_per_rank", "2", "--parallel.pipeline_schedule")
MEMORY = {
    "one device": (1, 2),
    "one micro-batch": (1, 1),
    "zero 1": (8, 4, "--parallel.tp", "4"),
    "zero 3": (4, 4, "--parallel.tp", "2", "--parallel.zero_stage", "3"),
    "cp": (4, 4, "--parallel.cp", "2", "--parallel.tp", "2"),
    "1f1b, as few micro-batches as ranks": (16, 4, *PIPELINE),
    "1f1b": (16, 8, *PIPELINE),
    "interleaved, few micro-batches": (16, 4, *TWO_STAGES, "interleaved_1f1b"),
    "interleaved": (16, 8, *TWO_STAGES, "interleaved_1f1b"),
    "interleaved zero bubble, few micro-batches": (16, 4, *TWO_STAGES, "interleaved_zero_bubble"),
    "interleaved zero bubble": (16, 8, *TWO_STAGES, "interleaved_zero_bubble"),
    "zero bubble v": (16, 8, *TWO_STAGES, "zero_bubble_v"),
    "dualpipe v": (16, 8, *TWO_STAGES, "dualpipe_v"),
}


@pytest.mark.parametrize("name", MEMORY)
def test_the_memory_model_has_every_ranks_peak(name: str) -> None:
    world_size, batch_size, *overrides = MEMORY[name]
    config = config_of(*LARGER, "--phases.0.batch_size", str(batch_size), *overrides)
    layout = make_layout(config, world_size)
    planned = memory(job_of(config, layout), load_cluster("atlas_800t_a2"))
    ranks = range(0, world_size, world_size // layout.pp)
    errors = [
        rank.allocated / dry_run(config, layout, at).peak.total - 1 for rank, at in zip(planned, ranks, strict=True)
    ]
    assert max(map(abs, errors)) < 0.03, errors


def test_the_peak_is_told_by_kind_module_and_moment() -> None:
    result = run(4, 3, "--parallel.tp", "2", "--parallel.pp", "2", "--train.micro_batch_size", "1")
    peak = result.peak
    assert sum(peak.by_kind.values()) == peak.total
    assert sum(sum(kinds.values()) for kinds in peak.by_module.values()) == peak.total
    assert peak.by_kind["logits and loss"] > 0
    assert "stage 1" in peak.moment
    assert "micro-batch" in peak.moment
    values = sum(result.stages.values())
    assert peak.by_kind["parameters"] == 4 * values
    assert peak.by_kind["optimizer state"] == 8 * values


def test_an_npu_holds_more() -> None:
    """Its mask of attention, and two more tensors as large as a chunk of logits."""
    on_cpu, on_npu = (run(1, 0, "--train.device", device) for device in ("cpu", "npu"))
    assert on_npu.peak.by_kind["constants"] == 2048 * 2048
    assert on_npu.between_steps == on_cpu.between_steps + 2048 * 2048
    assert on_npu.counts.flops == on_cpu.counts.flops
    logits = 4 * 2 * 128 * 512
    assert on_npu.peak.total - on_npu.peak.by_kind["constants"] - on_cpu.peak.total == pytest.approx(
        2 * logits, rel=0.02
    )


def test_what_the_run_would_raise_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Block, h: torch.Tensor, *rest: object) -> torch.Tensor:
        return h @ h

    monkeypatch.setattr(Block, "forward", broken)
    with pytest.raises(TrainingError, match=r"rank 5 \(pp 0, .*tp 1\): RuntimeError: .*same reduction dim"):
        run(8, 5, "--parallel.tp", "2", "--phases.0.batch_size", "8")


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--rank 4 is not one of the 4 ranks"):
        run(4, 4, "--parallel.tp", "4", "--model.num_key_value_heads", "4")
    for arguments, message in {
        ("--rank", "2"): "--rank 2",
        ("--stage", "1"): "--stage 1: the layout has stages 0 to 0",
        ("--rank", "0", "--parallel.tp", "4"): "not a multiple of",
        ("--phase", "x"): "--phase x",
        ("--micro-batches", "0"): "--micro-batches must be at least 1",
    }.items():
        assert main(["dryrun", "debug", "--world-size", "2", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_command_reports_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dry.json"
    layout = ("--parallel.pp", "2", "--parallel.tp", "2", "--train.micro_batch_size", "1")
    assert main(["dryrun", "debug", "--world-size", "8", "--all-stages", "--json", str(file), *layout]) == 0
    reports = json.loads(file.read_text())
    assert [report["rank"] for report in reports] == [0, 4]
    dimensions = {traffic["dimension"] for report in reports for traffic in report["communication"]}
    assert dimensions == {"tp", "pp", "fsdp", "world"}
    assert "the peak is in:" in capsys.readouterr().out
