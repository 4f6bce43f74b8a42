"""Environment variables: what is set, what Pangu would set, and what cannot work."""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from pangu.config import Config
from pangu.device.environment import npu_environment
from pangu.doctor.findings import Finding, Status

SECTION = "environment"
_PREFIXES = (
    "ASCEND_",
    "HCCL_",
    "P2P_HCCL_",
    "PYTORCH_",
    "TASK_QUEUE_",
    "TORCH_HCCL_",
    "TORCH_DEVICE_",
    "MULTI_STREAM_",
)
_NAMES = ("CPU_AFFINITY_CONF", "CLOSE_MATMUL_K_SHIFT", "OMP_NUM_THREADS", "RANK_TABLE_FILE", "STREAMS_PER_DEVICE")


def examine(config: Config, environ: Mapping[str, str], uses_npu: bool) -> list[Finding]:
    """Without an NPU, what is said of its variables is for information."""
    if not uses_npu:
        found = npu_environment(config, environ).errors
        return [Finding(SECTION, "NPU", "warn", error) for error in found] + [
            Finding(SECTION, "NPU", "info", "variables of NPUs are not used on this machine")
        ]
    return [*_recommended(config, environ), *_files_and_interfaces(environ)]


def relevant(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a report shows: those of CANN, HCCL and PyTorch, and none of the user's."""
    return {name: environ[name] for name in sorted(environ) if name.startswith(_PREFIXES) or name in _NAMES}


def _recommended(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    errors = {error.partition("=")[0]: error for error in npu_environment(config, environ).errors}
    for name, error in errors.items():
        yield Finding(SECTION, name, "fail", error, "mend it: Pangu refuses to train like this")
    for name in [setting.name for setting in npu_environment(config, environ).settings if setting.name not in errors]:
        others = {other: value for other, value in environ.items() if other != name}
        setting = next(setting for setting in npu_environment(config, others).settings if setting.name == name)
        current = environ.get(name)
        status: Status = "pass" if current in (None, setting.value) else "warn"
        found = f"{current}" if current is not None else f"not set; Pangu sets {setting.value}"
        fix = f"recommended: {setting.value} ({setting.reason})" if status == "warn" else ""
        yield Finding(SECTION, setting.name, status, found, fix)
    if "CPU_AFFINITY_CONF" not in environ:
        yield Finding(
            SECTION,
            "CPU_AFFINITY_CONF",
            "info",
            "not set",
            "on a node of your own, 1 keeps the threads of a rank on the cores next to its NPU",
        )


def _files_and_interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    table = environ.get("RANK_TABLE_FILE")
    if table is not None:
        path = Path(table)
        good = path.is_file() and not path.is_symlink()
        fix = "" if good else "HCCL wants an existing file that is not a symbolic link; unset it to do without"
        yield Finding(SECTION, "RANK_TABLE_FILE", "pass" if good else "fail", table, fix)
    chosen = environ.get("HCCL_SOCKET_IFNAME")
    if chosen is not None:
        interfaces = [name for _, name in socket.if_nameindex()]
        exact, names = chosen.startswith("="), chosen.lstrip("^=").split(",")
        there = any(name == n if exact else name.startswith(n) for name in interfaces for n in names)
        fix = "" if there else f"this machine has {', '.join(interfaces)}"
        yield Finding(SECTION, "HCCL_SOCKET_IFNAME", "pass" if there else "fail", chosen, fix)
