"""The training loop: what a step computes; a run that was stopped, killed or damaged ends like one that was not."""

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pangu import config as configuration
from pangu.config import Config
from pangu.data.batch import Batch
from pangu.data.loader import Loader
from pangu.data.schedule import Schedule
from pangu.errors import CheckpointError, ConfigError, TrainingError
from pangu.model import Transformer, init_weights
from pangu.parallel.layout import make_layout
from pangu.train.checkpoint import Checkpointer, complete_steps
from pangu.train.events import read_events
from pangu.train.run import load_model
from pangu.train.trainer import Trainer, train

TIMINGS = ("seconds", "stage_seconds", "tokens_per_second", "mfu", "memory_bytes", "seconds_left")


def debug_config(*overrides: str) -> Config:
    return configuration.load("debug", ("--metrics.tensorboard", "false", *overrides))


def events(run: Path) -> list[dict[str, object]]:
    """All events without what depends on the clock and the machine."""
    return [{key: value for key, value in event.items() if key not in TIMINGS} for event in read_events(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(run).named_parameters())


def assert_same_run(left: Path, right: Path) -> None:
    assert events(left) == events(right)
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_learns(tmp_path: Path) -> None:
    config = debug_config(
        "--train.steps", "60", "--train.validation_interval", "60", "--metrics.statistics_interval", "20"
    )
    assert train(config, tmp_path / "run")
    kinds = [event["kind"] for event in events(tmp_path / "run")]
    assert kinds.count("step") == 60
    assert kinds.count("validation") == 1
    assert kinds.count("statistics") == 3
    steps = [event for event in read_events(tmp_path / "run") if event["kind"] == "step"]
    for field in ("step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_bytes"):
        assert all(math.isfinite(event[field]) for event in steps), field
    assert [event["tokens"] for event in steps] == [512 * step for step in range(1, 61)]
    assert steps[-1]["loss"] < 0.75 * math.log(512)


def make_trainer(config: Config, output: Path) -> Trainer:
    schedule = Schedule(config)
    checkpointer = Checkpointer(output / "checkpoints", config.checkpoint)
    loader, layout = Loader(config, schedule), make_layout(config, 1)
    return Trainer(config, output, torch.device("cpu"), schedule, loader, checkpointer, layout)


def plain_adamw_step(model: Transformer, batches: Sequence[Batch], config: Config, rate: float) -> tuple[float, float]:
    """The same step with torch.optim and the mean over all labels of the concatenated batch."""
    gains_and_biases = [p for name, p in model.named_parameters() if "bias" in name]
    decayed = [p for name, p in model.named_parameters() if "bias" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": gains_and_biases, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        eps=config.optimizer.eps,
    )
    losses, labels = [], []
    for batch in batches:
        logits = model.logits(model(batch.tokens, batch.position_ids, batch.cu_seqlens))
        losses.append(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
        labels.append((batch.labels != -100).sum())
    loss = torch.stack(losses).sum() / torch.stack(labels).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
    optimizer.step()
    return loss.item(), norm.item()


@pytest.mark.parametrize("clip_norm", ["1.0", "0.05"])
def test_a_step_is_adamw_on_the_mean_loss_of_all_labels(tmp_path: Path, clip_norm: str) -> None:
    # With a small eps, Adam's first step is the gradient's sign, which rounding decides where the gradient is tiny.
    config = debug_config(
        "--optimizer.clip_norm", clip_norm, "--model.attention_bias", "true", "--optimizer.eps", "1e-3"
    )
    trainer = make_trainer(config, tmp_path)
    reference = Transformer(config.model)
    init_weights(reference, config.train.seed)
    position = trainer.schedule.at(0)
    batches = list(trainer.loader.batches(0))
    assert len(batches) == 2
    result = trainer.step(position, batches)
    loss, norm = plain_adamw_step(reference, batches, config, trainer.schedule.learning_rate(position))
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for (name, ours), theirs in zip(trainer.model.parameters.items(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6, msg=name)


def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    whole = make_trainer(debug_config("--train.micro_batch_size", "4"), tmp_path / "whole")
    parts = make_trainer(debug_config("--train.micro_batch_size", "1"), tmp_path / "parts")
    for step in range(3):
        position = whole.schedule.at(step)
        one, four = list(whole.loader.batches(step)), list(parts.loader.batches(step))
        assert (len(one), len(four)) == (1, 4)
        left, right = whole.step(position, one), parts.step(position, four)
        assert left.loss == pytest.approx(right.loss, rel=1e-5)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-4)


def test_norm_gains_decay_only_when_asked(tmp_path: Path) -> None:
    for decay in (True, False):
        config = debug_config("--optimizer.decay_norm_gains", str(decay).lower())
        optimizer = make_trainer(config, tmp_path / str(decay)).optimizer
        (decayed, _), (kept, _) = optimizer._groups()
        assert ("norm.weight" in decayed) == decay
        assert ("layers.0.post_attention_norm.weight" in kept) == (not decay)
        assert "layers.0.attention.q_proj.weight" in decayed


def test_a_phase_changes_rope_length_and_batch(tmp_path: Path) -> None:
    config = debug_config()
    first = dataclasses.replace(config.phases[0], name="short", tokens=2 * 512)
    second = dataclasses.replace(first, name="long", tokens=None, sequence_length=256, batch_size=2, rope_base=1e5)
    config = dataclasses.replace(config, phases=(first, second), train=dataclasses.replace(config.train, steps=4))
    train(config, tmp_path)
    steps = [event for event in events(tmp_path) if event["kind"] == "step"]
    assert [(event["phase"], event["tokens"], event["batch_size"]) for event in steps] == [
        ("short", 512, 4),
        ("short", 1024, 4),
        ("long", 1536, 2),
        ("long", 2048, 2),
    ]
    assert load_model(tmp_path).rope_base == 1e5


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path: Path) -> None:
    config = debug_config("--train.dtype", "bf16", "--train.steps", "40")
    trainer = make_trainer(config, tmp_path)
    seen = []
    trainer.model.parts[0].layers["0"].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    results = [trainer.step(trainer.schedule.at(step), list(trainer.loader.batches(step))) for step in range(40)]
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters.values()} == {torch.float32}
    assert results[-1].loss < results[0].loss - 0.5


def test_a_non_finite_step_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = make_trainer(debug_config(), tmp_path)
    batches = list(trainer.loader.batches(0))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.parameters.items()}
    poison = trainer.model.parts[0].norm.weight.register_hook(lambda gradient: gradient * math.nan)
    assert not trainer.step(trainer.schedule.at(0), batches).finite
    poison.remove()
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.parameters.items())
    assert all(not moment.any() for moment in trainer.optimizer.exp_avg.values())
    assert (trainer.counters.skipped_steps, trainer.counters.skipped_in_a_row, trainer.counters.updates) == (1, 1, 0)
    assert trainer.step(trainer.schedule.at(1), list(trainer.loader.batches(1))).finite
    assert (trainer.counters.skipped_steps, trainer.counters.skipped_in_a_row, trainer.counters.updates) == (1, 0, 1)


def test_training_stops_after_too_many_skipped_steps(tmp_path: Path) -> None:
    config = debug_config(
        "--phases.0.learning_rate", "1e30", "--phases.0.warmup_steps", "0", "--train.max_skipped_steps", "3"
    )
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train(config, tmp_path)
    skipped = [event["skipped"] for event in events(tmp_path)]
    assert skipped[-3:] == [True] * 3
    assert events(tmp_path)[-1]["loss"] is None or events(tmp_path)[-1]["grad_norm"] is None


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    train(debug_config("--train.steps", "1"), tmp_path)
    with pytest.raises(ConfigError, match="--resume"):
        train(debug_config("--train.steps", "1"), tmp_path)


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert train(debug_config("--train.steps", "2"), tmp_path, resume=True)
    assert complete_steps(tmp_path / "checkpoints") == [2]


def test_resume_of_another_model_is_refused(tmp_path: Path) -> None:
    train(debug_config("--train.steps", "1"), tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.feed_forward"):
        train(debug_config("--train.steps", "2", "--model.intermediate_size", "96"), tmp_path, resume=True)


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    train(debug_config("--train.steps", "12"), tmp_path / "whole")
    train(debug_config("--train.steps", "5"), tmp_path / "parts")
    train(debug_config("--train.steps", "12"), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start(run: Path, steps: int, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pangu", "train", "debug", "--output", str(run), "--resume"]
    options = ["--train.steps", str(steps), "--metrics.tensorboard", "false", "--checkpoint.interval", "2", *more]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigterm_saves_and_resume_ends_like_an_uninterrupted_run(tmp_path: Path) -> None:
    train(debug_config("--train.steps", "60", "--checkpoint.interval", "2"), tmp_path / "whole")
    process = start(tmp_path / "parts", 60)
    assert process.stdout is not None
    while "7/60" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGTERM" in output
    stopped_at = complete_steps(tmp_path / "parts" / "checkpoints")[-1]
    assert 7 <= stopped_at < 60
    process = start(tmp_path / "parts", 60)
    assert process.wait(timeout=60) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def kill_until_done(run: Path, steps: int, kills: int, seed: int, *more: str) -> None:
    """Start and kill -9 at random moments `kills` times, then let the run end."""
    draw = random.Random(seed)
    for _ in range(kills):
        process = start(run, steps, *more)
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and "step" not in line.split()[:1]:
            line = process.stdout.readline()
        time.sleep(draw.uniform(0, 0.6))
        process.kill()
        process.wait()
    process = start(run, steps, *more)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_kill_9_at_random_moments_and_resume_is_exact(tmp_path: Path, asynchronous: str) -> None:
    """Checkpoints follow every second step, so that many of the kills fall into a save."""
    overrides = (
        "--checkpoint.asynchronous",
        asynchronous,
        "--train.validation_interval",
        "7",
        "--metrics.statistics_interval",
        "5",
    )
    train(debug_config("--train.steps", "80", "--checkpoint.interval", "2", *overrides), tmp_path / "whole")
    kill_until_done(tmp_path / "killed", 80, 4, 1, *overrides)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(debug_config("--train.steps", "12"), tmp_path / "whole")
    train(debug_config("--train.steps", "6", "--checkpoint.interval", "3"), tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "step_00000006"
    shard = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    train(debug_config("--train.steps", "12"), tmp_path / "damaged", resume=True)
    assert "step_00000006" in caplog.text
    assert shard.name in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")
