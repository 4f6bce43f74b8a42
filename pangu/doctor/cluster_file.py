"""What was measured, as a cluster description for `pangu plan` (the format of launch/clusters/*.toml)."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pangu.device.peak import published_peak
from pangu.doctor.deep import Measurements
from pangu.errors import ConfigError
from pangu.files import write_atomically
from pangu.plan.efficiency import efficiency_of
from pangu.plan.hardware import load_cluster

_FAMILIES = {"Ascend": "ascend", "A100": "a100", "A800": "a100", "H100": "h100", "H800": "h100", "H200": "h100"}
_FAMILIES |= {"B200": "b200", "V100": "v100"}
_CORES = {"ascend": 24, "a100": 108, "h100": 132, "b200": 148, "v100": 80}
"""Of the usual chip of a family, where the device does not say."""


def write(path: Path, measured: Measurements) -> None:
    """Write the file, and read it as the planner does. Raises `ConfigError` when a rate that it needs is missing."""
    write_atomically(path, describe(measured))
    load_cluster(path)


def describe(measured: Measurements) -> str:
    """TOML with the rates of this machine. A known chip has its published peak, and what was reached of it as an
    efficiency; any other what was reached. Memory and links have what was reached."""
    if measured.emulated:
        raise ConfigError("an emulated device has no rates: leave out --cluster-file or --emulate")
    if not all(measured.of(part) for part in ("device", "matmul", "memory")):
        raise ConfigError("no rates for --cluster-file: " + ("; ".join(measured.failures) or "nothing was measured"))
    device, memory = measured.of("device")[0], measured.of("memory")[0]
    name = device["name"] or platform.processor() or platform.machine()
    family = "cpu" if measured.device == "cpu" else _family(name)
    reached = {dtype: _best(measured, dtype) for dtype in ("fp32", "bf16")}
    published = None if family == "cpu" else published_peak(name)
    peaks = reached if published is None else {"bf16": published, "fp32": reached["fp32"]}
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory_bytes = device["memory_bytes"] or host_bytes / measured.world_size
    link, latency, topology = _links(measured, name, memory["copy"])
    efficiency = dataclasses.replace(
        efficiency_of(family),
        matmul=min(1.0, reached["bf16"] / published) if published else 1.0,
        memory=1.0,
        intra_node=1.0,
    )
    tables: dict[str, Mapping[str, Any]] = {
        "chip": {
            "name": name,
            "family": family,
            "cores": device["threads"] if family == "cpu" else _CORES[family],
            "memory_gib": _rounded(memory_bytes / 2**30),
            "memory_gb_per_s": _rounded(memory["copy"] / 1e9),
            "vector_tflops": _rounded(memory["vector_flops_per_second"] / 1e12),
        },
        "chip.peak_tflops": {dtype: _rounded(rate / 1e12) for dtype, rate in peaks.items()},
        "node": {
            "devices": measured.world_size,
            "topology": topology,
            "link_gb_per_s": _rounded(link / 1e9),
            "latency_us": _rounded(latency * 1e6),
        },
        "efficiency": dataclasses.asdict(efficiency),
    }
    lines = [f"# Measured by `pangu doctor --deep` on {date.today()}.", 'name = "this machine"']
    for table, fields in tables.items():
        lines += ["", f"[{table}]", *(f"{field} = {json.dumps(value)}" for field, value in fields.items())]
    return "\n".join(lines) + "\n"


def _family(name: str) -> str:
    family = next((family for part, family in _FAMILIES.items() if part in name), None)
    if family is None:
        raise ConfigError(f"--cluster-file: the planner knows no chip like {name!r}")
    return family


def _best(measured: Measurements, dtype: str) -> float:
    return float(max(row["flops_per_second"] for row in measured.of("matmul") if row["dtype"] == dtype))


def _links(measured: Measurements, name: str, copy: float) -> tuple[float, float, str]:
    """(bytes per second of a link, seconds of a small message, topology) from the largest group of neighbours; for a
    single device, which has no link, what it copies."""
    topology = "full_mesh" if "Ascend910B" in name else "switch"  # Atlas A2 servers; A3 and NVIDIA have switches
    rows = [row for row in measured.of("exchange") if row["dimension"] == "node"]
    rows = [row for row in rows if row["size"] == max(row["size"] for row in rows)]
    gathers = [row for row in rows if row["collective"] in ("all_gather", "reduce_scatter")]
    if not gathers:
        return copy / 2, 0.0, topology
    rate = max(row["bytes_per_second"] for row in gathers)
    links = gathers[0]["size"] - 1 if topology == "full_mesh" else 1
    return rate / links, min(row["latency_seconds"] for row in rows), topology


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
