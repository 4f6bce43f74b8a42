"""Curves of the planner: panels of lines over one quantity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pangu.train.plot import COLORS, MARKERS


@dataclass(frozen=True)
class Panel:
    """Lines over the same x. NaN leaves a gap."""

    title: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    log_y: bool = False


def draw_curves(path: Path, panels: Sequence[Panel], x_label: str, title: str, log_x: bool = False) -> Path:
    """A row of panels into the PNG `path`, whose folder is made."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state shared between figures

    figure = Figure(figsize=(max(7.0, 5.2 * len(panels)), 4.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for index, (label, values) in enumerate(panel.lines.items()):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            axes.plot(panel.x, values, color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(panel.x, [f"{value:g}" for value in panel.x], rotation=45, minor=False)
        if panel.log_y:
            axes.set_yscale("log")
        else:
            largest = max(
                (value for line in panel.lines.values() for value in line if math.isfinite(value)), default=1.0
            )
            axes.set_ylim(0, 1.08 * largest)
        if len(panel.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    return temporary.replace(path)
