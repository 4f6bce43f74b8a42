"""Training through the genuine torch_npu on an emulated CANN gives the CPU's losses and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pangu.train.events import read_events
from pangu.train.run import load_model

pytestmark = pytest.mark.ascend


def pangu_train(run: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pangu", "train", "debug", "--output", str(run), "--metrics.tensorboard", "false"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def test_losses_and_weights_are_those_of_the_cpu_and_resume_goes_on(tmp_path: Path) -> None:
    pangu_train(tmp_path / "cpu", "--train.steps", "6")
    npu = ("--device", "npu", "--emulate")
    pangu_train(tmp_path / "npu", *npu, "--train.steps", "3", "--metrics.statistics_interval", "3")
    pangu_train(tmp_path / "npu", *npu, "--train.steps", "6", "--resume", "--train.validation_interval", "6")
    ours, theirs = (
        [event for event in read_events(tmp_path / name) if event["kind"] == "step"] for name in ("npu", "cpu")
    )
    assert [event["loss"] for event in ours] == pytest.approx([event["loss"] for event in theirs], rel=1e-5)
    assert [event["grad_norm"] for event in ours] == pytest.approx([e["grad_norm"] for e in theirs], rel=1e-4)
    reference = dict(load_model(tmp_path / "cpu").named_parameters())
    for name, parameter in load_model(tmp_path / "npu").named_parameters():
        torch.testing.assert_close(parameter, reference[name], rtol=1e-3, atol=1e-4, msg=name)


RANKS = {
    "2, asynchronous, task queue": (2, "1", ["--emulate-asynchronous", "--parallel.zero_stage", "3"]),
    "4, synchronous, task queue": (4, "1", ["--parallel.tp", "2", "--emulate-soc", "Ascend910B3"]),
    "4, asynchronous": (4, "0", ["--emulate-asynchronous", "--parallel.pp", "2", "--parallel.cp", "2"]),
}


@pytest.mark.parametrize("case", RANKS)
def test_torchrun_on_several_emulated_npus(case: str, tmp_path: Path) -> None:
    """A checkpoint is written by and resumed on the ranks, with the losses of one CPU."""
    ranks, task_queue, options = RANKS[case]
    batch = ("--phases.0.batch_size", "8")
    pangu_train(tmp_path / "cpu", *batch, "--train.steps", "4")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
    command = [*torchrun, "pangu", "train", "debug", "--output", str(tmp_path / "npu"), "--device", "npu", "--emulate"]
    environment = {**os.environ, "TASK_QUEUE_ENABLE": task_queue, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    for steps in ("2", "4"):
        arguments = [*command, *batch, *options, "--train.steps", steps, "--resume", "--metrics.tensorboard", "false"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = (read_events(tmp_path / name) for name in ("npu", "cpu"))
    assert [event["step"] for event in ours] == [1, 2, 3, 4]
    for field in ("loss", "grad_norm"):
        assert [event[field] for event in ours] == pytest.approx([event[field] for event in theirs], rel=1e-5)
