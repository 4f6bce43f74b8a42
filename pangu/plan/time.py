"""Seconds of one optimizer step, from the shapes of its operators and the rates of the hardware."""

from dataclasses import dataclass

from pangu.plan.hardware import Cluster
from pangu.plan.job import Job


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch in one pipeline stage, communication that is not hidden included."""

    forward: float
    backward_input: float
    """Gradients of activations, and what is computed again for them."""
    backward_weight: float
    """Gradients of weights."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    step: float
    stages: tuple[StageTime, ...]
    p2p: float
    """Of one activation from a stage to the next."""
    pipeline: float
    """First forward to last backward, bubble included."""
    bubble: float
    """Idle share of `pipeline` on the average rank: the paper's (p-1)/(m+p-1) for 1f1b."""
    optimizer: float
    exposed: dict[str, float]
    """Communication that delays the step, by dimension (tp, cp, pp, dp)."""
    hidden: dict[str, float]
    """Communication behind computation, by dimension."""

    @property
    def bubble_over_ideal(self) -> float:
        """Megatron's convention: idle time over busy time."""
        return self.bubble / (1 - self.bubble)


def step_time(job: Job, cluster: Cluster) -> StepTime:
    """Time of one optimizer step of `job` on `cluster`."""
    raise NotImplementedError
