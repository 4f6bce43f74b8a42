"""What a program gets of a chip's published rates: few constants per chip family, each a physical quantity.

The values were fitted to published measurements by `benchmarks/planner_accuracy.py --fit`; docs/planning.md says how.
"""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Efficiency:
    matmul: float = Field(gt=0, le=1)
    """Share of the matmul peak that a large, well-shaped matmul keeps up."""
    burst: float = 0.85
    fill: float = 200.0
    wgrad: float = 1.06
    partial: float = 0.9
    attention_forward: float = Field(gt=0, le=1)
    """Share of the matmul peak that fused attention reaches with enough heads and tokens."""
    attention_backward: float = Field(gt=0, le=1)
    """The same of its backward."""
    memory: float = Field(gt=0, le=1)
    """Share of the memory bandwidth that element-wise operators reach."""
    intra_node: float = Field(gt=0, le=1)
    """Share of the links' bandwidth that collectives inside a node reach."""
    inter_node: float = Field(gt=0, le=1)
    """Share of the network's bandwidth that transfers between nodes reach."""
    overlap: float = Field(ge=0, le=1)
    """Share of a transfer's time that is hidden when enough computation runs beside it."""
    operator_us: float = Field(ge=0)
    """Time the host needs to start one operator, microseconds."""
    step_ms: float = Field(ge=0)
    """Time of one optimizer step beyond what is modelled, milliseconds."""


_NVIDIA = {"intra_node": 0.7, "inter_node": 0.7, "overlap": 0.8, "operator_us": 8.0, "step_ms": 20.0}

FITTED = {
    "ascend": Efficiency(
        matmul=0.75,
        attention_forward=0.5,
        attention_backward=0.45,
        memory=0.5,
        intra_node=0.62,
        inter_node=0.7,
        overlap=0.7,
        operator_us=20.0,
        step_ms=50.0,
    ),
    "a100": Efficiency(matmul=0.82, attention_forward=0.56, attention_backward=0.49, memory=0.85, **_NVIDIA),
    "h100": Efficiency(matmul=0.68, attention_forward=0.5, attention_backward=0.4, memory=0.8, **_NVIDIA),
    "b200": Efficiency(matmul=0.48, attention_forward=0.5, attention_backward=0.4, memory=0.666, **_NVIDIA),
}
"""By chip family."""
FITTED["v100"] = FITTED["a100"]
FITTED["cpu"] = Efficiency(
    matmul=1.0,
    attention_forward=0.5,
    attention_backward=0.5,
    memory=0.8,
    intra_node=0.5,
    inter_node=0.5,
    overlap=0.0,
    operator_us=10.0,
    step_ms=1.0,
)


def efficiency_of(family: str) -> Efficiency:
    """Constants of a chip family."""
    return FITTED[family]
