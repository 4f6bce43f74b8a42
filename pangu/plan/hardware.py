"""What a cluster is made of, read from `launch/clusters/*.toml`.

Published figures stand in the files, each with its source; what a program gets of them is in `Efficiency`
(pangu/plan/efficiency.py), which a file may override under `[efficiency]` with values fitted to one machine.
Units are in the fields' names; the properties give SI units.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from pangu.config import did_you_mean, read_toml, validate
from pangu.errors import ConfigError
from pangu.plan.efficiency import Efficiency, efficiency_of

CLUSTERS = Path(__file__).resolve().parent.parent.parent / "launch" / "clusters"

GIB = 2**30

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PeakTflops:
    bf16: float | None = Field(default=None, gt=0)
    """Dense bf16 matmul rate, TFLOP/s. Not given: the chip has none."""
    fp16: float | None = Field(default=None, gt=0)
    """Dense fp16 matmul rate. Not given: as bf16."""
    fp8: float | None = Field(default=None, gt=0)
    """Dense fp8 matmul rate. Not given: the chip has none."""
    fp32: float | None = Field(default=None, gt=0)
    """fp32 matmul rate. Not given: the vector rate."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Chip:
    name: str = Field(min_length=1)
    """As the device reports it."""
    family: Literal["ascend", "a100", "h100", "b200", "v100", "cpu"]
    """Chips that share fitted efficiencies."""
    cores: int = Field(gt=0)
    """Matmul engines that work on one tile each at a time: AI cores, streaming multiprocessors."""
    peak_tflops: PeakTflops
    """Published matmul rates per dtype."""
    vector_tflops: float = Field(gt=0)
    """Rate of operations outside the matmul engines, TFLOP/s."""
    power_w: float | None = Field(default=None, gt=0)
    """Power limit, watts, where it is below `rated_power_w`."""
    rated_power_w: float | None = Field(default=None, gt=0)
    """Power limit of the chip as sold."""
    memory_gib: float = Field(gt=0)
    """Device memory an allocator can get, GiB."""
    memory_gb_per_s: float = Field(gt=0)
    """Memory bandwidth, GB/s."""

    def peak_flops(self, precision: str) -> float:
        """Published matmul rate in FLOP/s. Raises `ConfigError` for a precision the chip does not have."""
        peaks = self.peak_tflops
        rate = {"bf16": peaks.bf16, "fp16": peaks.fp16 or peaks.bf16, "fp8": peaks.fp8}.get(precision)
        if precision == "fp32":
            rate = peaks.fp32 or self.vector_tflops
        if rate is None:
            raise ConfigError(f"chip {self.name!r} has no {precision} rate; add chip.peak_tflops.{precision}")
        return rate * 1e12

    @property
    def power_factor(self) -> float:
        """Clock under a lowered power limit: dynamic power grows with frequency times voltage squared, about f^3."""
        if self.power_w is None or self.rated_power_w is None:
            return 1.0
        return min(1.0, (self.power_w / self.rated_power_w) ** (1 / 3))

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second."""
        return self.memory_gb_per_s * 1e9


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Node:
    devices: int = Field(gt=0)
    """Devices that share the fast links."""
    topology: Literal["full_mesh", "switch"]
    """full_mesh: one link between every pair, so that a group of t devices uses t - 1 of a device's links.
    switch: any group gets a device's whole bandwidth."""
    link_gb_per_s: float = Field(gt=0)
    """One direction, GB/s: of one pair's link (full_mesh), or of one device into the switch (switch)."""
    latency_us: float = Field(ge=0)
    """Of one message inside the node, microseconds, launch included."""

    def group_bandwidth(self, size: int) -> float:
        """Bytes per second, one direction, that a device has to the others of a group of `size` in the node."""
        links = min(size, self.devices) - 1 if self.topology == "full_mesh" else 1
        return max(links, 1) * self.link_gb_per_s * 1e9


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Network:
    device_gbit_per_s: float = Field(gt=0)
    """Share of one device in the node's network ports, one direction, Gbit/s."""
    rails: int = Field(gt=0)
    """Network ports of a node: a single flow uses one."""
    latency_us: float = Field(ge=0)
    """Of one message between nodes, microseconds, launch included."""

    @property
    def device_bandwidth(self) -> float:
        """Bytes per second of one device when all of a node's devices send."""
        return self.device_gbit_per_s * 1e9 / 8


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Cluster:
    name: str = Field(min_length=1)
    """Shown in tables."""
    chip: Chip
    """One device."""
    node: Node
    """Devices with fast links between them."""
    network: Network | None = None
    """Between nodes. Not given: there is one node only."""
    efficiency: Efficiency = Field(default=None)  # type: ignore[assignment]
    """Fitted to this machine. Not given: what was fitted to published measurements of the chip's family."""

    def __post_init__(self) -> None:
        if self.efficiency is None:
            object.__setattr__(self, "efficiency", efficiency_of(self.chip.family))

    def bandwidth(self, size: int, members_per_node: int) -> float:
        """Bytes per second, one direction, at which a device exchanges with a group of `size` devices of which
        `members_per_node` share its node, while every device of the cluster does the same."""
        inside = self.node.group_bandwidth(members_per_node) if members_per_node > 1 else math.inf
        if size <= members_per_node:
            return inside
        return min(inside, members_per_node * self.require_network().device_bandwidth)

    def require_network(self) -> Network:
        if self.network is None:
            raise ConfigError(
                f"cluster {self.name!r} has no [network]: it is one node of {self.node.devices} devices; add "
                "network.device_gbit_per_s, rails and latency_us, or plan for one node"
            )
        return self.network


_ADAPTER: TypeAdapter[Cluster] = TypeAdapter(Cluster)


def load_cluster(source: str | Path) -> Cluster:
    """Read a cluster by path or by the name of a file in `launch/clusters/`.

    Raises `ConfigError` naming the field and the fix.
    """
    path = Path(source)
    if not path.is_file():
        path = CLUSTERS / f"{source}.toml"
    if not path.is_file():
        known = sorted(entry.stem for entry in CLUSTERS.glob("*.toml"))
        raise ConfigError(
            f"no cluster file {str(source)!r}{did_you_mean(Path(source).stem, known)}; give a path, or one of: "
            + ", ".join(known)
        )
    return validate(_ADAPTER, Cluster, read_toml(path), str(source))
