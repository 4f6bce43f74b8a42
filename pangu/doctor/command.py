"""The command `pangu doctor`: table, report and exit code."""

import dataclasses
import json
import math
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from pangu import __version__
from pangu import config as configuration
from pangu.config import Config
from pangu.doctor import cluster_file, deep, surface, variables
from pangu.doctor.findings import Finding, failed, show
from pangu.errors import ConfigError
from pangu.files import write_atomically


def diagnose(
    config: Config,
    *,
    look_deep: bool,
    emulate: bool = False,
    nproc: int | None = None,
    json_file: Path | None = None,
    cluster: Path | None = None,
) -> int:
    """Print what is found for runs of `config`, and return the exit code: 1 if something fails, else 0.

    Raises `ConfigError` for options that do not go together, before anything is measured.
    """
    _check(config, look_deep, emulate, nproc, json_file, cluster)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    findings = surface.examine(config)
    show(findings, console)
    measured = None
    if look_deep:
        measured = _measure(config, emulate, nproc, console)
        judged = list(deep.judge(config, measured))
        show(judged, console)
        findings += judged
    if json_file is not None:
        write_atomically(json_file, json.dumps(report(config, findings, measured), indent=2) + "\n")
        console.print(f"wrote {json_file}", highlight=False)
    if cluster is not None and measured is not None:
        cluster_file.write(cluster, measured)
        console.print(f"wrote {cluster}", highlight=False)
    return 1 if failed(findings) else 0


def report(config: Config, findings: list[Finding], measured: deep.Measurements | None) -> dict[str, Any]:
    """All that was found, to send: no paths of data, no variables but those of CANN, HCCL and PyTorch."""
    tree = configuration.to_tree(config)
    return {
        "pangu": __version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "config": {section: tree[section] for section in ("model", "train", "parallel")},
        "environment": variables.relevant(os.environ),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "measurements": None if measured is None else _without_nan(dataclasses.asdict(measured)),
    }


def _check(
    config: Config, look_deep: bool, emulate: bool, nproc: int | None, json_file: Path | None, cluster: Path | None
) -> None:
    if not look_deep and (emulate or nproc is not None or cluster is not None):
        raise ConfigError("--emulate, --nproc and --cluster-file are for --deep; add it")
    if emulate and config.train.device != "npu":
        raise ConfigError(f"--emulate is for --device npu, not for {config.train.device!r}")
    if emulate and cluster is not None:
        raise ConfigError("an emulated device has no rates: leave out --cluster-file or --emulate")
    if nproc is not None and nproc < 1:
        raise ConfigError(f"--nproc {nproc} must be at least 1")
    for path in (json_file, cluster):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} is not there; make it first")


def _measure(config: Config, emulate: bool, nproc: int | None, console: Console) -> deep.Measurements:
    from pangu import device

    name = device.resolve(config.train.device)
    world_size = nproc or _local_devices(name, emulate)
    with console.status("") as status:
        return deep.measure(config, name, emulate=emulate, world_size=world_size, say=status.update)


def _local_devices(name: str, emulate: bool) -> int:
    """Devices of this node; two processes where there are none to count."""
    if name == "cuda":
        import torch

        return torch.cuda.device_count()
    if name == "npu" and not emulate:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        return len(visible.split(",")) if visible else max(1, len(surface.Machine().npu_nodes))
    return 2


def _without_nan(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
