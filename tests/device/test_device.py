"""Choosing a device: what is there works, what is missing is named with what to install."""

import subprocess
import sys

import pytest
import torch

from pangu import device
from pangu.device import peak
from pangu.errors import DeviceError


def test_auto_finds_the_cpu_where_there_is_nothing_else() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert device.select("auto") == torch.device("cpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_cuda_without_a_cuda_build_says_what_to_install() -> None:
    with pytest.raises(DeviceError, match=r"needs a CUDA build of PyTorch"):
        device.select("cuda")


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(DeviceError, match="'tpu' is not one of auto, cpu, cuda, npu"):
        device.select("tpu")


def test_npu_without_torch_npu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'pangu\[npu\]'"):
        device.select("npu")


def test_importing_pangu_loads_no_backend() -> None:
    # Of Triton no kernels of ours: PyTorch's own parallel modules import the package where it is installed.
    code = (
        "import sys, pangu, pangu.device, pangu.model, pangu.train.trainer;"
        "print([name for name in sys.modules if name == 'torch_npu' or name.endswith('.triton_kernel')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_collective_backends() -> None:
    assert [device.collective_backend(torch.device(name)) for name in ("cpu", "cuda")] == ["gloo", "nccl"]


def test_memory_rises_with_what_is_allocated() -> None:
    cpu = torch.device("cpu")
    before = device.memory_bytes(cpu)
    block = torch.ones(before // 4 + 2**26)
    assert device.memory_bytes(cpu) >= before + 2**26
    del block


def test_the_cpu_peak_is_a_matmul_rate() -> None:
    rate, source = device.peak_flops(torch.device("cpu"))
    assert 1e8 < rate < 1e14
    assert "measured" in source


@pytest.mark.parametrize(
    ("name", "rate"),
    [("Ascend910B2", 353.8944e12), ("Ascend910_9392", 353.8944e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_published_peaks_are_found_by_the_name_the_driver_reports(
    monkeypatch: pytest.MonkeyPatch, name: str, rate: float
) -> None:
    class Module:
        @staticmethod
        def get_device_name(chosen: torch.device) -> str:
            return name

    monkeypatch.setattr(torch, "get_device_module", lambda chosen: Module)
    assert peak.peak_flops(torch.device("cuda", 0))[0] == rate
