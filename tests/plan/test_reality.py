"""Calibration gives back the constants that made the events, and explains a real run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from plan_helpers import cluster_with, small_config

from pangu import config as configuration
from pangu.cli import main
from pangu.config import Config
from pangu.errors import PanguError
from pangu.parallel.layout import make_layout
from pangu.plan.hardware import Cluster, load_cluster
from pangu.plan.reality import STAGES, calibrate, expectation
from pangu.plan.report import terms
from pangu.plan.search import search
from pangu.plan.space import parse_layout

LAPTOP = """
name = "two cores"
[chip]
name = "cpu"
family = "cpu"
cores = 1
memory_gib = 4
memory_gb_per_s = 100
vector_tflops = 0.1
peak_tflops = { bf16 = 2.0, fp32 = 2.0 }
[node]
devices = 8
topology = "switch"
link_gb_per_s = 5
latency_us = 20
"""


def changed(cluster: Cluster, **values: float) -> Cluster:
    return dataclasses.replace(cluster, efficiency=dataclasses.replace(cluster.efficiency, **values))


def write_run(folder: Path, config: Config, cluster: Cluster, batches: tuple[int, ...], stages: bool = True) -> None:
    """A run whose every step took exactly what `cluster` would."""
    folder.mkdir()
    (folder / "config.toml").write_text(configuration.show(config))
    layout = make_layout(config, 16)
    lines = []
    for step in range(40):
        batch = batches[step * len(batches) // 40]
        expected = expectation(config, layout, cluster, batch_size=batch)
        slow = 10.0 if step < 3 else 1.0  # the first steps of a run are slower
        event: dict[str, Any] = {
            "kind": "step",
            "step": step + 1,
            "phase": "only",
            "batch_size": batch,
            "skipped": False,
        }
        event["seconds"] = expected.seconds * slow
        if stages:
            event["stage_seconds"] = expected.stages
        lines.append(json.dumps(event))
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


def parallel_config(batch_size: int = 64) -> Config:
    config = small_config(batch_size)
    return search(config, cluster_with(), 16, parse_layout("tp2,pp2,dp4,1f1b"), keep=1).plans[0].configured(config)


def test_constants_are_found_again(tmp_path: Path) -> None:
    guess = cluster_with()
    old = guess.efficiency
    truth = changed(
        guess,
        matmul=0.8 * old.matmul,
        attention_forward=0.8 * old.attention_forward,
        attention_backward=0.8 * old.attention_backward,
        memory=0.7 * old.memory,
        intra_node=0.5 * old.intra_node,
        inter_node=0.5 * old.inter_node,
        step_ms=old.step_ms + 30,
    )
    write_run(tmp_path / "run", parallel_config(), truth, (64,))
    result = calibrate(tmp_path / "run", guess, devices=16)
    for name in ("matmul", "memory", "inter_node", "step_ms"):
        assert getattr(result.cluster.efficiency, name) == pytest.approx(getattr(truth.efficiency, name), rel=0.02), (
            name
        )
    assert result.after[0].seconds == pytest.approx(result.observations[0].seconds, rel=0.005)
    assert abs(result.before[0].seconds / result.observations[0].seconds - 1) > 0.1


def test_without_stages_two_batch_sizes_tell_computation_from_the_constant(tmp_path: Path) -> None:
    guess = cluster_with()
    truth = changed(guess, step_ms=guess.efficiency.step_ms + 200)
    write_run(tmp_path / "run", parallel_config(), truth, (32, 64), stages=False)
    result = calibrate(tmp_path / "run", guess, devices=16)
    assert [each.batch_size for each in result.observations] == [32, 64]
    assert result.cluster.efficiency.step_ms == pytest.approx(truth.efficiency.step_ms, rel=0.05)
    assert result.cluster.efficiency.matmul == pytest.approx(truth.efficiency.matmul, rel=0.02)


def test_expectation_is_the_plan() -> None:
    config, cluster = parallel_config(), cluster_with()
    plan = search(small_config(64), cluster, 16, parse_layout("tp2,pp2,dp4,1f1b"), keep=1).plans[0]
    expected = expectation(config, make_layout(config, 16), cluster)
    assert expected.seconds == plan.time.step
    assert expected.mfu == pytest.approx(plan.mfu)
    assert sum(expected.stages.values()) == pytest.approx(expected.seconds)
    assert tuple(expected.stages) == STAGES
    assert expected.stages["optimizer"] == pytest.approx(terms(plan)["optimizer"])
    assert expected.memory_bytes == max(rank.allocated for rank in plan.memory)
    assert expectation(config, make_layout(config, 16), cluster, peak_flops=1e14).mfu > 1.5 * expected.mfu


def test_a_run_too_short(tmp_path: Path) -> None:
    write_run(tmp_path / "run", parallel_config(), cluster_with(), (64,))
    events = tmp_path / "run" / "events.jsonl"
    events.write_text("".join(events.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(PanguError, match="no more than 3 steps"):
        calibrate(tmp_path / "run", cluster_with(), devices=16)


def test_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fitted to a run on this machine, the plan of that run takes what the run took, stage by stage."""
    laptop, fitted, run = tmp_path / "laptop.toml", tmp_path / "fitted.toml", tmp_path / "run"
    laptop.write_text(LAPTOP)
    overrides = ["--metrics.tensorboard", "false", "--train.steps", "30", "--data.prefetch", "0"]
    assert main(["train", "debug", "--output", str(run), *overrides]) == 0
    assert main(["plan", "--calibrate", str(run), "--cluster", str(laptop), "--output", str(fitted)]) == 0
    assert f"wrote {fitted}" in capsys.readouterr().out
    result = calibrate(run, load_cluster(laptop))
    assert load_cluster(fitted) == result.cluster
    measured, (after,) = result.observations[0], result.after
    for stage in ("forward_backward", "optimizer", "other"):
        assert after.stages[stage] == pytest.approx(measured.stages[stage], rel=0.05), stage
