"""Figures of one or several runs from their events: loss, gradient norm, learning rate, and statistics over depth."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.errors import PanguError
from pangu.train.events import FILE_NAME, Event, read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f5fa8", "#d1495b", "#2e8b57", "#e09f3e", "#7b5ea7", "#3aa6b9", "#8c564b", "#555555")
MARKERS = "osD^vP*X"
SMOOTHED_FROM = 200  # steps from which noisy curves are drawn behind their running median
MOMENTS_OF_ONE_RUN = 5  # in figures over depth


@dataclass(frozen=True)
class Run:
    """What the figures need of a run's events. Values that were not finite are NaN."""

    label: str
    steps: dict[str, np.ndarray]  # tokens, loss, grad_norm, lr: [steps] each
    validation: dict[str, tuple[list[float], list[float]]]  # domain: tokens and losses
    statistics: list[tuple[float, Event]]  # tokens and event


def plot(runs: Sequence[Path], output: Path) -> list[Path]:
    """Draw `runs` over one another into PNGs in the folder `output`, and return their paths.

    Figures over depth are left out when no run has layer statistics.
    Raises `PanguError` for a folder that is no run, and for a run without steps.
    """
    names = {path: path.resolve().name for path in runs}
    distinct = len(set(names.values())) == len(names)
    loaded = [_load(path, name if distinct else str(path)) for path, name in names.items()]
    figures = {
        "loss": _draw_loss(loaded),
        "gradient_norm": _draw_over_tokens(loaded, "grad_norm", "gradient norm", log=True),
        "learning_rate": _draw_over_tokens(loaded, "lr", "learning rate"),
    }
    if any(run.statistics for run in loaded):
        titles = {"std": "standard deviation", "max": "largest absolute value"}
        figures["activations"] = _draw_over_depth(loaded, "activations", titles)
        figures["norm_gains"] = _draw_over_depth(loaded, "gains", {"mean": "mean", "std": "standard deviation"})
    output.mkdir(parents=True, exist_ok=True)
    return [_save(figure, output / f"{name}.png") for name, figure in figures.items()]


def _load(path: Path, label: str) -> Run:
    events = read_events(path)
    steps = [event for event in events if event["kind"] == "step"]
    if not steps:
        raise PanguError(f"{path / FILE_NAME} has no steps; leave {path} out, or plot it once it has taken some")
    tokens: dict[int, float] = {event["step"]: event["tokens"] for event in steps}
    validation: defaultdict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for event in events:
        for domain, loss in event["losses"].items() if event["kind"] == "validation" else ():
            validation[domain][0].append(tokens.get(event["step"], math.nan))
            validation[domain][1].append(_number(loss))
    return Run(
        label=label,
        steps={name: _numbers(event[name] for event in steps) for name in ("tokens", "loss", "grad_norm", "lr")},
        validation=dict(validation),
        statistics=[(tokens.get(e["step"], math.nan), e) for e in events if e["kind"] == "statistics"],
    )


def _draw_loss(runs: Sequence[Run]) -> "Figure":
    """Training loss, and beside it the validation loss of every domain."""
    domains = sorted({domain for run in runs for domain in run.validation})
    figure, panels = _panels(1, 2 if domains else 1)
    _draw_steps(panels[0], runs, "loss")
    _finish_over_tokens(panels[0], "training loss")
    if domains:
        for (i, run), (j, domain) in itertools.product(enumerate(runs), enumerate(domains)):
            if domain in run.validation:
                panels[1].plot(
                    *run.validation[domain],
                    label=domain if len(runs) == 1 else f"{run.label}: {domain}",
                    color=_color(j if len(runs) == 1 else i),
                    marker=MARKERS[j % len(MARKERS)],
                    markersize=4,
                    linewidth=1.2,
                )
        panels[1].legend(frameon=False)
        _finish_over_tokens(panels[1], "validation loss")
    return figure


def _draw_over_tokens(runs: Sequence[Run], name: str, title: str, log: bool = False) -> "Figure":
    figure, (axes,) = _panels(1, 1)
    _draw_steps(axes, runs, name)
    _finish_over_tokens(axes, title)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
    return figure


def _draw_steps(axes: "Axes", runs: Sequence[Run], name: str) -> None:
    for i, run in enumerate(runs):
        tokens, values = run.steps["tokens"], run.steps[name]
        if len(values) >= SMOOTHED_FROM and name != "lr":
            axes.plot(tokens, values, color=_color(i), alpha=0.25, linewidth=0.8)
            parts = min(len(values) // 5, 150)
            tokens, values = _medians(tokens, parts), _medians(values, parts)
        marker = "o" if len(values) == 1 else ""
        axes.plot(tokens, values, color=_color(i), linewidth=1.4, marker=marker, label=run.label)
    if len(runs) > 1:
        axes.legend(frameon=False)


def _draw_over_depth(runs: Sequence[Run], group: str, titles: dict[str, str]) -> "Figure":
    """Rows of panels by measure, columns by sub-layer or norm: moments of one run, or the last one of each run."""
    from matplotlib.ticker import MaxNLocator

    if len(runs) == 1:
        curves = [(f"{_count(tokens)} tokens", event) for tokens, event in _evenly(runs[0].statistics)]
        colors = _shades(len(curves))
    else:
        curves = [(run.label, run.statistics[-1][1]) for run in runs if run.statistics]
        colors = [_color(i) for i, run in enumerate(runs) if run.statistics]
    columns = list(dict.fromkeys(name for _, event in curves for name in event[group]))
    figure, panels = _panels(len(titles), len(columns))
    for index, (panel, (measure, column)) in enumerate(zip(panels, itertools.product(titles, columns), strict=True)):
        drawn: list[float] = []
        for (label, event), color in zip(curves, colors, strict=True):
            if column in event[group]:
                values = _numbers(event[group][column][measure])
                panel.plot(event["layers"], values, color=color, linewidth=1.3, marker="o", markersize=3, label=label)
                drawn.extend(values[np.isfinite(values)])
        first_row, first_column = index < len(columns), index % len(columns) == 0
        _finish(panel, column.replace("_", " ") if first_row else "", "layer")
        panel.set_ylabel(titles[measure] if first_column else "")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if drawn and 0 < 20 * min(drawn) < max(drawn):
            panel.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves), frameon=False)
    return figure


def _evenly(moments: list[tuple[float, Event]]) -> list[tuple[float, Event]]:
    """The first, the last, and some between them."""
    chosen = np.linspace(0, len(moments) - 1, min(len(moments), MOMENTS_OF_ONE_RUN)).round().astype(int)
    return [moments[i] for i in chosen]


def _panels(rows: int, columns: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure  # without pyplot: no window, no state shared between figures

    width, height = max(7.0, min(4.6 * columns, 13.6)), 4.2 if rows == 1 else 3.2 * rows  # inches
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _finish_over_tokens(axes: "Axes", title: str) -> None:
    _finish(axes, title, "tokens")
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))


def _finish(axes: "Axes", title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    return temporary.replace(path)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _shades(count: int) -> list[Any]:
    """Light to dark, for moments in their order."""
    import matplotlib

    return [matplotlib.colormaps["viridis_r"](0.15 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def _medians(values: np.ndarray, parts: int) -> np.ndarray:
    """Median of the finite values in each of `parts` stretches of equal length: spikes do not move it."""
    stretches = [part[np.isfinite(part)] for part in np.array_split(values, parts)]
    return np.array([np.median(stretch) if stretch.size else math.nan for stretch in stretches])


def _numbers(values: Any) -> np.ndarray:
    return np.array([_number(value) for value in values])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _count(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:g}"
