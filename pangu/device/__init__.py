"""What differs between CPU, CUDA and Ascend and is not an operator, on top of `torch.accelerator`."""

from pangu.device.flight_recorder import recorded_collectives
from pangu.device.memory import memory_bytes
from pangu.device.peak import peak_flops
from pangu.device.select import collective_backend, resolve, select, synchronize

__all__ = [
    "collective_backend",
    "memory_bytes",
    "peak_flops",
    "recorded_collectives",
    "resolve",
    "select",
    "synchronize",
]
