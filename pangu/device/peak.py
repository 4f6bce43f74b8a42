"""The rate MFU divides by."""

import time

import torch

# Dense bf16 matmul rates in FLOP/s by the name the device reports. Ascend: cube rates as Huawei's torchtitan plugin
# lists them (A3 dies are two to a package); NVIDIA: datasheets, dense.
_PUBLISHED_PEAKS = {
    "Ascend910B1": 373.88e12,
    "Ascend910B2": 353.8944e12,
    "Ascend910B3": 294.912e12,
    "Ascend910B4": 245.76e12,
    "Ascend910_9362": 353.8944e12,
    "Ascend910_9392": 353.8944e12,
    "Ascend950PR": 432e12,
    "Ascend950DT": 486e12,
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure is from.

    Accelerators: the published dense bf16 rate (nan for an unknown chip, so that no MFU is claimed). A CPU: the rate
    of a 1024 x 1024 x 1024 fp32 matmul measured now with the threads in use.
    """
    if device.type == "cpu":
        return _measured_matmul_rate(device), f"measured fp32 matmul rate, {torch.get_num_threads()} threads"
    name = torch.get_device_module(device).get_device_name(device)
    rate = published_peak(name)
    if rate is None:
        return float("nan"), f"no published peak known for {name!r}; set metrics.peak_flops"
    return rate, f"published bf16 peak of {next(chip for chip in _PUBLISHED_PEAKS if chip in name)}"


def published_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that reports this name, if it is a known one."""
    return next((rate for chip, rate in _PUBLISHED_PEAKS.items() if chip in name), None)


def _measured_matmul_rate(device: torch.device, size: int = 1024, seconds: float = 0.3) -> float:
    left, right = torch.ones(2, size, size, device=device)
    product = left @ right
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
