"""Training through the genuine torch_npu on an emulated CANN gives the CPU's losses and weights."""

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
