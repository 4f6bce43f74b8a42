"""What a program gets of a chip's published rates: few constants per chip family, each a physical quantity.

`efficiency.toml` beside this file holds them, fitted to published measurements by `benchmarks/planner_accuracy.py
--fit`; docs/planning.md says how. A cluster file's own `[efficiency]` stands before them.
"""

from functools import cache
from pathlib import Path

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from pangu.config import read_toml

FITTED = Path(__file__).with_name("efficiency.toml")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Efficiency:
    matmul: float = Field(gt=0, le=1)
    """Share of the matmul peak that a large, well-shaped matmul keeps up."""
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
    """Time of starting and ending one operator, whatever its size, microseconds."""
    step_ms: float = Field(ge=0)
    """Time of one optimizer step beyond what is modelled, milliseconds."""


@cache
def fitted() -> dict[str, dict[str, float]]:
    """All fitted constants, by chip family, and those of other software under "software"."""
    return read_toml(FITTED)


def efficiency_of(family: str) -> Efficiency:
    """Constants of a chip family. Of a CPU nothing is known: its rates are measured ones."""
    if family == "cpu":
        return Efficiency(
            matmul=1.0,
            attention_forward=0.5,
            attention_backward=0.5,
            memory=1.0,
            intra_node=1.0,
            inter_node=1.0,
            overlap=0.0,
            operator_us=10.0,
            step_ms=1.0,
        )
    return Efficiency(**fitted()["a100" if family == "v100" else family])
