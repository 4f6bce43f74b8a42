"""Seconds of single operators: matmuls by shape, attention, element-wise passes over memory, collectives.

Equations and their sources are in docs/planning.md.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pangu.plan.hardware import Cluster
from pangu.plan.job import Job

MATMUL_TILES = ((128, 256), (256, 128))
"""Rows and columns of the result that one core computes at a time: what cuBLAS and the Ascend cube (whose L0C holds
128 x 256 fp32 values) use for large matmuls."""
MATMUL_FILL = 200
"""Depth K that costs as much as filling and draining a core's pipeline."""
MATMUL_BURST = 0.85
"""Share of the peak that a core reaches when few of them work, so that power does not limit the clock."""
WEIGHT_GRADIENT_COST = 1.06
"""Of a weight gradient that adds up in fp32, relative to a forward matmul."""
# The four figures above: least squares on 183 matmuls measured on an A100 (SimuMax's system file a100_pcie.json, mean
# deviation 3.2 %); MATMUL_BURST also on 514 on a B200.

PARTIAL_LINES = 0.9
"""Of a matmul's rate where rows are not whole lines of 128 bytes but multiples of 16 bytes (tensor cores' minimum)."""
UNALIGNED = 0.25
"""Of a matmul's rate where they are neither. Both: after NVIDIA's guide to matmul performance, not fitted."""

ATTENTION_ROWS = 128
"""Queries that one core handles at a time."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of fused attention's backward relative to forward: five matmuls instead of two."""


def alignment(*lengths: float) -> float:
    """Share of a matmul's rate that rows of such lengths allow: full lines of 128 bytes, or parts of them."""
    if all(length % 64 == 0 for length in lengths):
        return 1.0
    if all(length % 8 == 0 for length in lengths):
        return PARTIAL_LINES
    return UNALIGNED


@dataclass(frozen=True)
class Operators:
    """Costs of operators for one job on one cluster."""

    job: Job
    cluster: Cluster

    @cached_property
    def peak(self) -> float:
        """FLOP/s of matmuls."""
        return self.cluster.chip.peak_flops(self.job.precision)

    @cached_property
    def attention_peak(self) -> float:
        """FLOP/s of attention, which stays in bf16 when the linear layers run in fp8."""
        return self.cluster.chip.peak_flops("bf16" if self.job.precision == "fp8" else self.job.precision)

    def matmul(self, m: float, n: float, k: float, weight_gradient: bool = False) -> float:
        """`[m, k] x [k, n]`: the slowest of power, of the cores' tiles, and of memory."""
        efficiency, cores = self.cluster.efficiency, self.cluster.chip.cores
        power = 2 * m * n * k / (self.peak * efficiency.matmul * self.cluster.chip.power_factor)
        waves = min(math.ceil(math.ceil(m / a) * math.ceil(n / b) / cores) * a * b for a, b in MATMUL_TILES)
        tiles = waves * cores * 2 * (k + MATMUL_FILL) / (self.peak * MATMUL_BURST)
        moved = 2 * (m * k + n * k + m * n) + (6 * m * n if weight_gradient else 0)
        compute = max(power, tiles) / alignment(n, k) * (WEIGHT_GRADIENT_COST if weight_gradient else 1)
        return max(compute, self.moving(moved))

    def moving(self, size: float) -> float:
        """Reading and writing `size` bytes of device memory."""
        return size / (self.cluster.chip.memory_bandwidth * self.cluster.efficiency.memory)

    def attention(self, flops: float, blocks: float, backward: bool = False) -> float:
        """Fused causal attention of `flops` forward FLOPs in `blocks` independent runs of queries.

        Runs differ in length, so the last ones leave cores idle: two more runs per core than there are.
        """
        efficiency = self.cluster.efficiency
        rate = efficiency.attention_backward if backward else efficiency.attention_forward
        work = flops * (ATTENTION_BACKWARD if backward else 1)
        rate *= self.cluster.chip.power_factor
        return work / (self.attention_peak * rate) * (1 + 2 * self.cluster.chip.cores / blocks)

    def members_per_node(self, dimension: Literal["tp", "cp", "dp", "pp"], size: int) -> int:
        """How many of a group of `size` ranks along a dimension share a node."""
        layout = self.job.layout
        stride = {
            "tp": 1,
            "cp": layout.tp,
            "dp": layout.tp * layout.cp,
            "pp": layout.tp * layout.cp * layout.dp,
        }[dimension]
        return max(1, min(size, self.cluster.node.devices // stride))

    def bandwidth(self, size: int, members: int, flows: int = 0) -> float:
        """Bytes per second at which a device exchanges with a group of which `members` share its node."""
        efficiency, node = self.cluster.efficiency, self.cluster.node
        inside = node.group_bandwidth(members) * efficiency.intra_node if members > 1 else math.inf
        if size <= members:
            return inside
        network = self.cluster.require_network()
        ports = min(members * network.rails / node.devices, flows or math.inf)
        outside = ports * network.device_bandwidth * node.devices / network.rails * efficiency.inter_node
        return min(inside, outside)

    def gather(self, size: int, members: int, full_bytes: float, flows: int = 0) -> float:
        """All-gather or reduce-scatter of `full_bytes` over a group."""
        if size == 1:
            return 0.0
        return self.latency(size, members) + (size - 1) / size * full_bytes / self.bandwidth(size, members, flows)

    def latency(self, size: int, members: int) -> float:
        """Of one collective, a ring: a message inside the node, and one for every other node."""
        seconds = self.cluster.node.latency_us if members > 1 else 0.0
        if size > members:
            seconds += self.cluster.require_network().latency_us * (math.ceil(size / members) - 1)
        return seconds * 1e-6

    def send(self, size: float, across_nodes: bool) -> float:
        """One message to one other rank, while all ranks of the node send."""
        efficiency, cluster = self.cluster.efficiency, self.cluster
        if across_nodes:
            network = cluster.require_network()
            return network.latency_us * 1e-6 + size / (network.device_bandwidth * efficiency.inter_node)
        link = cluster.node.group_bandwidth(2) * efficiency.intra_node
        return cluster.node.latency_us * 1e-6 + size / link

    def beside(self, transfer: float, compute: float) -> float:
        """What remains exposed of a transfer with `compute` beside it."""
        return transfer - self.cluster.efficiency.overlap * min(transfer, compute)
