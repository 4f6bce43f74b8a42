"""Choosing a device, and saying what is missing when it is not there."""

import importlib.util
from pathlib import Path

import torch

from pangu.errors import DeviceError

_COLLECTIVE_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def select(name: str = "auto", index: int = 0) -> torch.device:
    """The device called "cpu", "cuda" or "npu", made current; "auto" takes an accelerator if there is one.

    torch_npu is imported here and nowhere else, and only when the NPU is chosen.
    Raises `DeviceError` saying what to install or to change.
    """
    name = resolve(name)
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        _require_cuda()
    elif name == "npu":
        _require_npu()
    else:
        raise DeviceError(f"device {name!r} is not one of auto, cpu, cuda, npu")
    count = torch.accelerator.device_count()
    if index >= count:
        raise DeviceError(f"{name}:{index} does not exist, this machine shows {count}; start fewer processes per node")
    device = torch.device(name, index)
    torch.accelerator.set_device_index(index)
    return device


def resolve(name: str) -> str:
    """The device that "auto" stands for on this machine, found without loading torch_npu; any other name as it is."""
    if name != "auto":
        return name
    return "npu" if _has_npu() else "cuda" if torch.cuda.is_available() else "cpu"


def collective_backend(device: torch.device) -> str:
    """The torch.distributed backend that moves tensors of this device."""
    return _COLLECTIVE_BACKENDS[device.type]


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on the device; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _has_npu() -> bool:
    return importlib.util.find_spec("torch_npu") is not None and Path("/dev/davinci_manager").exists()


def _require_cuda() -> None:
    if torch.version.cuda is None:
        raise DeviceError(
            f"device 'cuda' needs a CUDA build of PyTorch, this one is {torch.__version__}; "
            "install one, or use --train.device cpu"
        )
    if not torch.cuda.is_available():
        raise DeviceError("device 'cuda': PyTorch finds no GPU; check the driver with nvidia-smi")


def _require_npu() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        raise DeviceError("device 'npu' needs torch_npu, which is not installed; run: pip install 'pangu[npu]'")
    try:
        import torch_npu  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            f"device 'npu': torch_npu is installed but does not load ({error}); install the CANN toolkit of the same "
            "release and run `source set_env.sh` of its folder first"
        ) from None
    if torch.accelerator.device_count() == 0:
        raise DeviceError("device 'npu': torch_npu finds no NPU; check the driver with npu-smi info")
