"""Memory of every pipeline rank in bytes, in closed form."""

from dataclasses import dataclass

from pangu.plan.hardware import Cluster
from pangu.plan.job import Job


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one device of a pipeline rank at its fullest moment, by kind."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of all micro-batches in flight."""
    logits: float
    """The head's logits and loss, whole or in chunks."""
    workspace: float
    """Temporary tensors of the layer at work: gathered weights, recomputed activations, their gradients."""
    communication: float
    """Buffers of the communicators, outside the allocator."""
    overhead: float
    """What the allocator keeps beyond what is in use."""

    @property
    def allocated(self) -> float:
        """What the framework's allocator reports as its peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.workspace

    @property
    def total(self) -> float:
        """What the device must have."""
        return self.allocated + self.communication + self.overhead


def memory(job: Job, cluster: Cluster) -> tuple[RankMemory, ...]:
    """Peak memory of one device of every pipeline rank."""
    raise NotImplementedError


def fits(job: Job, cluster: Cluster) -> bool:
    """Whether every rank stays within the device's memory."""
    return max(rank.total for rank in memory(job, cluster)) <= cluster.chip.memory_bytes
