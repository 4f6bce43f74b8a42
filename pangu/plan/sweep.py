"""How the best layouts change with one figure of the hardware: the bandwidth study of Yuan 2.0, for any field."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pangu.config import Config, did_you_mean
from pangu.errors import ConfigError
from pangu.plan.evaluate import Plan
from pangu.plan.figures import Panel, draw_curves
from pangu.plan.hardware import Cluster
from pangu.plan.search import search
from pangu.plan.space import FREE, Constraints, parse_layout
from pangu.plan.yuan import Setting, method_1, method_2

P2P_BANDWIDTH = "p2p_bandwidth"
"""GB/s between two devices of a node, both directions together as vendors print it: twice node.link_gb_per_s."""


QUICK = 150
"""Layouts simulated per value and curve."""


@dataclass(frozen=True)
class Point:
    """The best layout of every curve at one value; None where nothing fits."""

    value: float
    plans: dict[str, Plan | None]


def parse_sweep(text: str, cluster: Cluster) -> tuple[str, list[float]]:
    """`p2p_bandwidth=100,200,400` as the dotted field of a cluster file, or P2P_BANDWIDTH, and the values.

    Raises `ConfigError` for a field that no cluster has and for what is not a number.
    """
    name, equals, numbers = text.partition("=")
    fields = _fields(cluster)
    matching = [field for field in fields if field == name or field.rpartition(".")[2] == name]
    if name != P2P_BANDWIDTH and len(matching) != 1:
        choices = ", ".join(matching or [P2P_BANDWIDTH, *fields])
        hint = did_you_mean(name, [P2P_BANDWIDTH, *fields])
        raise ConfigError(f"--sweep {text!r}: {name!r} is not one hardware field{hint}; one of: {choices}")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep {text!r}: expected {name}=NUMBER,NUMBER,...") from None
    if not equals or len(set(values)) < 2 or not all(math.isfinite(value) and value > 0 for value in values):
        raise ConfigError(f"--sweep {text!r}: expected at least two different positive numbers after =")
    return matching[0] if name != P2P_BANDWIDTH else name, sorted(set(values))


def with_field(cluster: Cluster, field: str, value: float) -> Cluster:
    """`cluster` with one figure changed. Raises `ConfigError` when the value is impossible."""
    if field == P2P_BANDWIDTH:
        field, value = "node.link_gb_per_s", value / 2
    try:
        return _replaced(cluster, field.split("."), value)
    except ValueError as error:
        raise ConfigError(f"--sweep: {field} = {value:g} is not possible: {error}") from None


def curves_of(cluster: Cluster, field: str, layout: str | None) -> dict[str, Constraints]:
    """What to plan at every value: `layout` and the best one, or with and without tensor parallelism.

    The latter are Yuan's methods 1 and 2, which in the study of p2p_bandwidth have no context parallelism.
    """
    if layout:
        return {layout: parse_layout(layout), "best": FREE}
    cp = 1 if field == P2P_BANDWIDTH else None
    tensor = frozenset(range(2, cluster.node.devices + 1))
    return {"tensor parallelism": Constraints(tp=tensor, cp=cp), "none": Constraints(tp=1, cp=cp)}


def sweep(
    config: Config,
    cluster: Cluster,
    world_size: int,
    field: str,
    values: Sequence[float],
    curves: Mapping[str, Constraints],
    progress: Callable[[float, str], None],
) -> list[Point]:
    """Plans every curve anew at every value."""
    points = []
    searches = len(values) * len(curves)
    for index, value in enumerate(values):
        changed = with_field(cluster, field, value)
        plans: dict[str, Plan | None] = {}
        for number, (name, constraints) in enumerate(curves.items(), start=index * len(curves)):

            def report(share: float, text: str, done: int = number, at: float = value, curve: str = name) -> None:
                progress((done + share) / searches, f"{field} = {at:g}, {curve}: {text}")

            found = search(config, changed, world_size, constraints, keep=1, progress=report, evaluations=QUICK).plans
            plans[name] = found[0] if found else None
        points.append(Point(value, plans))
    return points


def print_sweep(console: Console, field: str, points: Sequence[Point], path: Path) -> None:
    """A table of the points, and their curves in `path`."""
    names = list(points[0].plans)
    table = Table(Column(field, justify="right"))
    for name in names:
        table.add_column(name, overflow="fold")
        for title in ("step, s", "MFU", "Yuan's model, s"):
            table.add_column(title, justify="right")
    for point in points:
        cells = [f"{point.value:g}"]
        for plan in point.plans.values():
            cells += _cells(plan) if plan else ["nothing fits", "", "", ""]
        table.add_row(*cells)
    console.print(table)
    console.print(
        "Planned anew at every value. Yuan's closed forms (equation 2 with tensor parallelism, 4 without) are of the "
        "same layout with every layer recomputed and F the rate of large matmuls.",
        style="dim",
    )
    x = [point.value for point in points]
    seconds = {name: [plan.time.step if plan else math.nan for plan in _of(points, name)] for name in names}
    mfu = {name: [plan.mfu if plan else math.nan for plan in _of(points, name)] for name in names}
    for name, (first, *_, last) in seconds.items():
        console.print(f"{name}: a step takes {first / last - 1:+.1%} at {x[0]:g} against {x[-1]:g}")
    if field == P2P_BANDWIDTH:
        console.print(
            "Yuan 2.0, table 6 (102B on 96 A100, 100 against 400): +84.7% with tensor parallelism, +0.4% without",
            style="dim",
        )
    panels = [Panel("seconds of a step", x, seconds), Panel("MFU", x, mfu)]
    console.print(str(draw_curves(path, panels, field, f"best layouts over {field}", log_x=True)))


def _of(points: Sequence[Point], name: str) -> list[Plan | None]:
    return [point.plans[name] for point in points]


def yuan_setting(plan: Plan) -> Setting:
    """The symbols of Yuan's closed forms for a plan. The link counts both directions, as the paper's factors need."""
    job, cluster = plan.job, plan.cluster
    network = cluster.network.device_bandwidth if cluster.network else math.inf
    return Setting(
        accumulation_steps=job.num_micro_batches,
        micro_batch_size=job.micro_batch_size,
        num_layers=job.model.num_layers,
        sequence_length=job.sequence_length,
        hidden_size=job.model.hidden_size,
        vocab_size=job.model.vocab_size,
        pp=job.layout.pp,
        tp=job.layout.tp,
        dp=job.layout.dp,
        chip_flops=plan.peak_flops * cluster.efficiency.matmul,
        link_bandwidth=2 * cluster.node.group_bandwidth(max(job.layout.tp, 2)) * cluster.efficiency.intra_node,
        network_bandwidth=network * cluster.efficiency.inter_node,
    )


def _cells(plan: Plan) -> list[str]:
    setting = yuan_setting(plan)
    closed = method_1(setting) if setting.tp > 1 else method_2(setting)
    return [str(plan.shape), f"{plan.time.step:.3f}", f"{plan.mfu:.1%}", f"{closed.total:.3f}"]


def _fields(node: Any, prefix: str = "") -> list[str]:
    """Dotted names of the positive numbers of a cluster."""
    names = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            names += _fields(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float):
            names.append(prefix + field.name)
    return names


def _replaced(node: Any, path: Sequence[str], value: float) -> Any:
    field, *rest = path
    old = getattr(node, field)
    new = _replaced(old, rest, value) if rest else type(old)(value)
    return dataclasses.replace(node, **{field: new})
