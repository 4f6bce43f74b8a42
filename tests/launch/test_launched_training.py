"""`pangu launch train` on this machine: a hung rank is named, a stopped job resumes, a dead rank costs no step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_helpers import Running

from pangu.train.events import read_events

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def launch(run: Path, steps: int, *options: object, restarts: int = 0) -> Running:
    words = ("--nproc", 2, "--max-restarts", restarts, "train", "debug", "--output", run, "--train.steps", steps)
    more = ("--parallel.tp", 2, "--metrics.tensorboard", "false", *options)
    return Running([sys.executable, "-m", "pangu", "launch", *map(str, (*words, *more))], cwd=ROOT)


def worker(run: Path, rank: int) -> int:
    """The process of a rank that trains into `run`."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:
            continue
        if str(run) in command and f"RANK={rank}" in environment:
            return int(pid)
    raise AssertionError(f"rank {rank} does not run")


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run) if event["kind"] == "step"]


def test_a_hung_rank_is_named_and_a_stopped_job_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launch(run, 100000, "--train.hang_seconds", 5, "--checkpoint.interval", 0) as launcher:
        launcher.wait_for(" 3/100000 ")
        stopped = worker(run, 1)
        os.kill(stopped, signal.SIGSTOP)
        launcher.wait_for("Slowest: rank 1 (pp 0, dp_replicate 0, dp_shard 0, cp 0, tp 1), which says nothing any more")
        os.kill(stopped, signal.SIGCONT)
        launcher.signal(signal.SIGTERM)
        assert launcher.wait() == 130
        assert "the checkpoint is written" in launcher.said
    (hang,) = (run / "hangs").iterdir()
    text = (hang / "rank_0.txt").read_text()
    assert "in forward_backward" in text
    assert "Collectives in flight:" in text
    events = [event for event in read_events(run) if event["kind"] == "step"]
    assert {"busy_seconds", "busy_spread", "slowest_rank"} <= events[-1].keys()

    steps = len(events) + 2
    with launch(run, steps, "--resume") as launcher:
        assert launcher.wait() == 0
    assert len(losses(run)) == steps


def test_a_killed_rank_is_named_and_training_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    options = ("--checkpoint.interval", 5)
    with launch(tmp_path / "run", 60, *options, restarts=1) as launcher:
        launcher.wait_for(" 12/60 ")
        os.kill(worker(tmp_path / "run", 1), signal.SIGKILL)
        assert launcher.wait() == 0
        killed = "pangu: rank 1 (pp 0, dp_replicate 0, dp_shard 0, cp 0, tp 1) on node 0 ("
        assert killed in launcher.said
        assert ") was killed by SIGKILL" in launcher.said
    with launch(tmp_path / "straight", 60, *options) as launcher:
        assert launcher.wait() == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_layout_that_does_not_fit_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pangu", "launch", "--nproc", "4", "train", "debug", "--parallel.tp", "3"]
    ended = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr.startswith("pangu: parallel: 4 ranks are not a multiple of")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
