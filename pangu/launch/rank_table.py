"""Ascend's rank table: which device of which server is which rank, for HCCL's RANK_TABLE_FILE.

Version 1.0 is for Atlas A2, version 1.2, with the devices' and servers' places in super pods, for Atlas A3; every value
is a string. Sources: HCCL's documentation of the rank table file, and the ascend-operator of Ascend/mind-cluster, which
writes the same on Kubernetes. How a machine tells of its devices was read in documentation, and tried on no machine.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu.errors import LaunchError

HCCN_CONF = Path("/etc/hccn.conf")
"""Where Ascend's driver keeps the devices' addresses, as `address_0=192.168.100.100`."""


@dataclass(frozen=True)
class Device:
    """One NPU of a server."""

    device_id: str
    device_ip: str
    super_device_id: str = ""
    super_pod_id: str = ""
    """Empty on A2, which has no super pods."""


def devices_of_node(nproc: int) -> list[Device]:
    """The first `nproc` devices of this machine: local rank N drives device N.

    Raises `LaunchError` when the driver's file is missing or has too few devices.
    """
    try:
        text = HCCN_CONF.read_text()
    except OSError as error:
        raise LaunchError(f"--rank-table needs the devices' addresses of {HCCN_CONF}: {error.strerror}") from None
    addresses = dict(re.findall(r"^\s*address_(\d+)\s*=\s*(\S+)", text, flags=re.MULTILINE))
    missing = [str(number) for number in range(nproc) if str(number) not in addresses]
    if missing:
        raise LaunchError(
            f"--rank-table: {HCCN_CONF} has no address_{missing[0]}, but --nproc is {nproc}; set it with hccn_tool"
        )
    super_pods = _super_pods(nproc)
    return [
        Device(str(number), addresses[str(number)], *(super_pods[number] if super_pods else ()))
        for number in range(nproc)
    ]


def _super_pods(nproc: int) -> list[tuple[str, str]] | None:
    """(super device id, super pod id) of each device by npu-smi; None where there are no super pods, or no npu-smi.

    An A3 module holds two chips: device N is chip N % 2 of module N // 2.
    """
    found = []
    for number in range(nproc):
        command = ["npu-smi", "info", "-t", "spod-info", "-i", str(number // 2), "-c", str(number % 2)]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        facts = dict(re.findall(r"^\s*(SDID|Super Pod ID)\s*:\s*(\S+)", output, flags=re.MULTILINE))
        if facts.keys() != {"SDID", "Super Pod ID"}:
            return None
        found.append((facts["SDID"], facts["Super Pod ID"]))
    return found


def rank_table(servers: Sequence[tuple[str, Sequence[Device]]]) -> dict[str, Any]:
    """The table of (address, devices) of every node in the order of node ranks."""
    version = "1.2" if any(device.super_pod_id for _, devices in servers for device in devices) else "1.0"
    rank = 0
    server_list: list[dict[str, Any]] = []
    super_pods: dict[str, list[dict[str, str]]] = {}
    for address, devices in servers:
        entries = []
        for device in devices:
            entry = {"device_id": device.device_id, "device_ip": device.device_ip, "rank_id": str(rank)}
            if version == "1.2":
                if not device.super_pod_id:
                    raise LaunchError(f"--rank-table: device {device.device_id} of {address} is in no super pod")
                entry["super_device_id"] = device.super_device_id
            entries.append(entry)
            rank += 1
        server_list.append({"server_id": address, "host_ip": address, "device": entries})
        if version == "1.2":
            super_pods.setdefault(devices[0].super_pod_id, []).append({"server_id": address})
    table = {
        "status": "completed",
        "version": version,
        "server_count": str(len(server_list)),
        "server_list": server_list,
    }
    if version == "1.2":
        table["super_pod_list"] = [{"super_pod_id": name, "server_list": list_} for name, list_ in super_pods.items()]
    return table


def write(path: Path, servers: Sequence[dict[str, Any]]) -> None:
    """Write the table of what the nodes told of themselves: `{"address", "devices"}` each.

    A symbolic link is refused, as HCCL does not follow any.
    """
    if path.is_symlink():
        raise LaunchError(f"--rank-table {path} is a symbolic link, which HCCL refuses; name a file")
    table = rank_table([(server["address"], [Device(**device) for device in server["devices"]]) for server in servers])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not under one temporary name: on shared storage all nodes write at once, and all the same.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(json.dumps(table, indent=2) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
