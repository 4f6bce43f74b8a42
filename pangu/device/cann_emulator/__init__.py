"""An emulated CANN: the genuine torch_npu runs on a CPU, with no NPU and no CANN installed.

torch_npu's host code is the real one (allocator, streams, events, ProcessGroupHCCL, operator checks, autograd). Under
it, `src/` puts a runtime whose device memory is host memory, an HCCL over shared memory, and operator functions that
are recorded but compute nothing. Values come from PyTorch's CPU kernels (`src/cpu_fallback.cpp`) and, for torch_npu's
own operators, from plain PyTorch (`fused_ops.py`). Speed and rounding are those of the CPU: what a real NPU does to
them is not shown.
"""

import contextlib
import ctypes
import io
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pangu.device.cann_emulator.libraries import build_libraries
from pangu.errors import DeviceError

SOCS = ("Ascend910B2", "Ascend910B3", "Ascend910_9392")  # Atlas A2 twice, and A3


@dataclass(frozen=True)
class EmulatorConfig:
    """What the emulated machine is like."""

    soc: str = "Ascend910B2"
    """What the device says that it is: one of SOCS."""
    num_devices: int = 8
    asynchronous: bool = False
    """Every stream works on a thread of its own. Otherwise whatever is put on one is done at once, and torch_npu's task
    queue is off too, unless TASK_QUEUE_ENABLE says otherwise."""
    strict: bool = True
    """An operator whose values the emulator cannot compute is an error. Otherwise its outputs hold arbitrary values."""
    memory_bytes: int = 64 << 30
    """Memory of one device; more allocated is an out-of-memory error."""


class Call(NamedTuple):
    """A call into CANN. kind: aclnn or aclop (operators, by name), hccl (by function)."""

    kind: str
    name: str


class Emulator:
    """The emulated CANN of this process."""

    def __init__(self, config: EmulatorConfig, runtime: ctypes.CDLL, operators: object) -> None:
        self.config = config
        self._runtime = runtime
        self._operators = operators  # registered for as long as this exists

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Call]]:
        """Collects the CANN calls made inside; the list is filled when the block ends.

        While recording, torch_npu's host code runs for aten operators too, so that the list holds what a real device
        would be asked to do: every operator, including those that host code adds around the one called.
        """
        import torch

        calls: list[Call] = []
        torch.accelerator.synchronize()
        self._runtime.emulator_record(1)
        try:
            yield calls
            torch.accelerator.synchronize()
            lines = self._runtime.emulator_calls().decode().splitlines()
            calls.extend(Call(*line.split(":", 1)) for line in lines)
        finally:
            self._runtime.emulator_record(0)


# torch_npu initializes itself once per process, so there is at most one emulator.
_installed: Emulator | None = None


def install(
    soc: str = "Ascend910B2",
    num_devices: int = 8,
    asynchronous: bool = False,
    strict: bool = True,
    memory_bytes: int = 64 << 30,
) -> Emulator:
    """Loads the emulated CANN and, on it, torch_npu. The parameters are EmulatorConfig's.

    Call it before anything imports torch_npu, in every process. A second call with the same parameters changes nothing.
    Raises DeviceError if torch_npu or a C++ compiler is missing, and if torch_npu is loaded already in another way.
    """
    global _installed
    config = EmulatorConfig(soc, num_devices, asynchronous, strict, memory_bytes)
    _validate(config)
    if _installed is not None:
        if _installed.config != config:
            raise DeviceError(
                f"this process already emulates {_installed.config}, not {config}: torch_npu can be loaded only once "
                "per process; start another process for other parameters"
            )
        return _installed
    if "torch_npu" in sys.modules:
        raise DeviceError(
            "torch_npu is already imported, on the CANN that it found: install the emulator before the first import, "
            "and set TORCH_DEVICE_BACKEND_AUTOLOAD=0 so that `import torch` does not import it"
        )
    libraries = build_libraries()
    # Found by name, these are the ones that torch_npu will be linked against, wherever another CANN may be.
    handles = {path.name: ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in libraries.cann}
    runtime, hccl = handles["libascendcl.so"], handles["libhccl.so"]
    runtime.emulator_calls.restype = ctypes.c_char_p
    runtime.emulator_configure(soc.encode(), num_devices, ctypes.c_size_t(memory_bytes), int(asynchronous), int(strict))
    _remove_stale_segments()
    if not asynchronous:
        os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    _import_torch_npu(libraries.cpu_fallback)

    from pangu.device.cann_emulator.registration import register  # which imports torch

    _installed = Emulator(config, runtime, register(runtime, hccl))
    return _installed


@contextlib.contextmanager
def emulated_npu(**parameters: Any) -> Iterator[Emulator]:
    """`install`, with its parameters, as a block at whose end everything that was started is done.

    torch_npu stays loaded after it.
    """
    emulator = install(**parameters)
    yield emulator
    import torch

    torch.accelerator.synchronize()


def _validate(config: EmulatorConfig) -> None:
    if config.soc not in SOCS:
        raise DeviceError(f"soc: {config.soc!r} is not emulated; choose one of {', '.join(SOCS)}")
    if config.num_devices < 1:
        raise DeviceError(f"num_devices: {config.num_devices} must be at least 1")
    if config.memory_bytes < 1 << 20:
        raise DeviceError(f"memory_bytes: {config.memory_bytes} must be at least {1 << 20} (1 MiB)")


def _import_torch_npu(cpu_fallback: Path) -> None:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # for processes that this one starts, which install again
    import torch

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # about missing parts of CANN
        warnings.simplefilter("ignore")
        import torch_npu  # noqa: F401
    torch.ops.load_library(str(cpu_fallback))
    torch.ops.cann_emulator.replace_kernels()


def _remove_stale_segments() -> None:
    """Communicators' shared memory whose maker was killed in the moment before all ranks had opened it."""
    for path in Path("/dev/shm").glob("pangu-cann-emulator.*"):
        process = path.name.split(".")[1]
        if not Path("/proc", process).exists():
            path.unlink(missing_ok=True)
