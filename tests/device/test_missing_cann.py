"""A machine without torch_npu, or with it and without CANN: all but the NPU works, and the NPU says what is missing.

In processes of their own, without the variable that the test session sets for itself.
"""

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TRAIN = ("train", "debug", "--train.steps", "1", "--metrics.tensorboard", "false")
MISSING_TORCH_NPU = "pangu: device 'npu' needs torch_npu, which is not installed; run: pip install 'pangu[npu]'\n"
MISSING_CANN = "pangu: device 'npu': torch_npu is installed but does not load (lib"


def has_cann() -> bool:
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return False
    return True


without_torch_npu = pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")
without_cann = (
    pytest.mark.ascend,
    pytest.mark.skipif(find_spec("torch_npu") is None, reason="torch_npu is not installed"),
    pytest.mark.skipif(has_cann(), reason="this machine has CANN"),
)
ENVIRONMENTS = [
    pytest.param(marks=without_torch_npu, id="without_torch_npu"),
    pytest.param(marks=without_cann, id="without_cann"),
]


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize((), ENVIRONMENTS)
def test_importing_and_computing_on_the_cpu() -> None:
    code = "import pangu, pangu.train.trainer, pangu_kernels, torch; print(pangu_kernels.swiglu(torch.zeros(1, 2)))"
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0, "tensor([[0.]])\n"), done.stderr


@pytest.mark.parametrize((), ENVIRONMENTS)
def test_help() -> None:
    done = python("-m", "pangu", "--help")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize((), ENVIRONMENTS)
def test_training_on_the_cpu(tmp_path: Path) -> None:
    done = python("-m", "pangu", *TRAIN, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/events.jsonl").exists()


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(MISSING_TORCH_NPU, marks=without_torch_npu, id="without_torch_npu"),
        pytest.param(MISSING_CANN, marks=without_cann, id="without_cann"),
    ],
)
def test_the_npu_says_what_is_missing(message: str, tmp_path: Path) -> None:
    done = python("-m", "pangu", *TRAIN, "--output", str(tmp_path / "run"), "--device", "npu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    if message == MISSING_CANN:
        assert "install the CANN toolkit of the same release and run `source set_env.sh`" in done.stderr
