"""Ascend's rank table against its documented form, of made-up driver files; no NPU is there to ask."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pangu.errors import LaunchError
from pangu.launch import rank_table
from pangu.launch.rank_table import Device

A2 = """{
  "status": "completed",
  "version": "1.0",
  "server_count": "2",
  "server_list": [
    {
      "server_id": "10.0.0.1",
      "host_ip": "10.0.0.1",
      "device": [
        {"device_id": "0", "device_ip": "192.168.1.8", "rank_id": "0"},
        {"device_id": "1", "device_ip": "192.168.1.9", "rank_id": "1"}
      ]
    },
    {
      "server_id": "10.0.0.2",
      "host_ip": "10.0.0.2",
      "device": [
        {"device_id": "0", "device_ip": "192.168.2.8", "rank_id": "2"},
        {"device_id": "1", "device_ip": "192.168.2.9", "rank_id": "3"}
      ]
    }
  ]
}"""

A3 = """{
  "status": "completed",
  "version": "1.2",
  "server_count": "2",
  "server_list": [
    {
      "server_id": "10.0.0.1",
      "host_ip": "10.0.0.1",
      "device": [
        {"device_id": "0", "device_ip": "192.168.1.8", "super_device_id": "0", "rank_id": "0"},
        {"device_id": "1", "device_ip": "192.168.1.9", "super_device_id": "65537", "rank_id": "1"}
      ]
    },
    {
      "server_id": "10.0.0.2",
      "host_ip": "10.0.0.2",
      "device": [
        {"device_id": "0", "device_ip": "192.168.2.8", "super_device_id": "4194304", "rank_id": "2"},
        {"device_id": "1", "device_ip": "192.168.2.9", "super_device_id": "4259841", "rank_id": "3"}
      ]
    }
  ],
  "super_pod_list": [
    {"super_pod_id": "0", "server_list": [{"server_id": "10.0.0.1"}, {"server_id": "10.0.0.2"}]}
  ]
}"""

HCCN_CONF = "address_0=192.168.1.8\nnetmask_0=255.255.255.0\naddress_1=192.168.1.9\naddress_10=192.168.1.18\n"

Machine = Callable[[str, str], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this a machine with the given hccn.conf and, if any, the given npu-smi (a shell script)."""

    def make(hccn_conf: str, npu_smi: str = "") -> None:
        (tmp_path / "hccn.conf").write_text(hccn_conf)
        monkeypatch.setattr(rank_table, "HCCN_CONF", tmp_path / "hccn.conf")
        if npu_smi:
            (tmp_path / "npu-smi").write_text(f"#!/bin/sh\n{npu_smi}\n")
            (tmp_path / "npu-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return make


def test_a2(tmp_path: Path) -> None:
    servers = [
        {"address": f"10.0.0.{node}", "devices": [device(0, f"192.168.{node}.8"), device(1, f"192.168.{node}.9")]}
        for node in (1, 2)
    ]
    rank_table.write(tmp_path / "table.json", servers)
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(A2)
    assert not_strings(json.loads(A2)) == []


def test_a3() -> None:
    servers = [
        ("10.0.0.1", [Device("0", "192.168.1.8", "0", "0"), Device("1", "192.168.1.9", "65537", "0")]),
        ("10.0.0.2", [Device("0", "192.168.2.8", "4194304", "0"), Device("1", "192.168.2.9", "4259841", "0")]),
    ]
    table = rank_table.rank_table(servers)
    assert table == json.loads(A3)
    assert not_strings(table) == []
    far = [servers[0], ("10.0.0.2", [Device("0", "192.168.2.8", "0", "1")])]
    assert [pod["super_pod_id"] for pod in rank_table.rank_table(far)["super_pod_list"]] == ["0", "1"]


def test_the_drivers_file_is_read(machine: Machine) -> None:
    machine(HCCN_CONF, "exit 1")
    assert rank_table.devices_of_node(2) == [Device("0", "192.168.1.8"), Device("1", "192.168.1.9")]


def test_super_pods_are_asked_of_npu_smi(machine: Machine) -> None:
    answer = 'test "$*" = "info -t spod-info -i 0 -c $7" && printf "\\tSDID : 40$7\\n\\tSuper Pod ID : 3\\n"'
    machine(HCCN_CONF, answer)
    assert rank_table.devices_of_node(2) == [
        Device("0", "192.168.1.8", "400", "3"),
        Device("1", "192.168.1.9", "401", "3"),
    ]


def test_what_is_missing_is_named(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(HCCN_CONF, "exit 1")
    with pytest.raises(LaunchError, match="has no address_2, but --nproc is 3"):
        rank_table.devices_of_node(3)
    monkeypatch.setattr(rank_table, "HCCN_CONF", tmp_path / "missing.conf")
    with pytest.raises(LaunchError, match=r"missing\.conf: No such file"):
        rank_table.devices_of_node(1)
    mixed = [("10.0.0.1", [Device("0", "192.168.1.8", "0", "0"), Device("1", "192.168.1.9")])]
    with pytest.raises(LaunchError, match=r"device 1 of 10\.0\.0\.1 is in no super pod"):
        rank_table.rank_table(mixed)
    (tmp_path / "link").symlink_to(tmp_path / "table.json")
    with pytest.raises(LaunchError, match="symbolic link"):
        rank_table.write(tmp_path / "link", [])


def device(number: int, address: str) -> dict[str, str]:
    return {"device_id": str(number), "device_ip": address, "super_device_id": "", "super_pod_id": ""}


def not_strings(value: Any) -> list[Any]:
    """Every leaf of the table that is not a string."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in not_strings(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in not_strings(item)]
    return [] if isinstance(value, str) else [value]
