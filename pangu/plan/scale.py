"""What growing costs: the best layout at every size of the cluster, and the time lost to checkpoints and failures.

Strong scaling keeps the batch, weak scaling the batch per device. Failures are independent, so that n devices fail n
times as often as one. Checkpoints follow one another at the interval that loses the least (Young, CACM 17, 1974,
refined by Daly, FGCS 22, 2006), and what remains is the effective training time ratio, of Daly's model of wall time.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from pangu.config import Config
from pangu.errors import ConfigError
from pangu.model.count import num_parameters
from pangu.plan.evaluate import Plan
from pangu.plan.figures import Panel, draw_curves
from pangu.plan.hardware import Cluster
from pangu.plan.search import search

STATE_BYTES = 12
"""Of a parameter in a checkpoint: fp32 weight and both moments."""
EVALUATIONS = 150
"""Layouts simulated per size: half of a minute for twenty sizes is worth more than the last per mille."""


@dataclass(frozen=True)
class Failures:
    """How often devices fail, and what checkpoints and restarts take."""

    device_hours: float = 50_700.0
    """Mean time between failures that stop the job, of one device with its share of everything else. Default: 419
    unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, section 3.3.4)."""
    restart_seconds: float = 600.0
    """From a failure until the job loads its checkpoint: noticing it, replacing the node, starting. An assumption."""
    storage_gb_per_s: float = 2.0
    """Rate at which one node writes to and reads from shared storage, GB/s. An assumption."""
    storage_total_gb_per_s: float = 2000.0
    """Most that the storage takes from all nodes, GB/s. Default: Llama 3's sustained 2 TB/s (its section 3.3.1)."""
    copy_gb_per_s: float = 20.0
    """Rate at which one device copies its share to host memory while training waits, GB/s. An assumption (PCIe 4)."""


@dataclass(frozen=True)
class Overhead:
    """Seconds, and the share of time that trains."""

    mean_time_between_failures: float
    checkpoint_seconds: float
    """For which training waits."""
    interval: float
    """Of training between checkpoints: whole steps, and no shorter than a checkpoint takes to be written."""
    effective: float
    """Effective training time ratio."""


@dataclass(frozen=True)
class Point:
    devices: int
    batch_size: int
    plan: Plan | None
    """None: nothing fits, or no layout deals the batch."""
    overhead: Overhead


def parse_sizes(text: str, devices_per_node: int) -> list[int]:
    """`128..100000` as numbers of devices: doubling from the first, and the largest of the form 3 x 2^k x first."""
    first, dots, last = text.partition("..")
    if not (dots and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise ConfigError(f"--scale {text!r}: expected SMALLEST..LARGEST number of devices, such as 128..100000")
    smallest, largest = int(first), int(last)
    if smallest % devices_per_node:
        raise ConfigError(f"--scale {text!r}: {smallest} is not a multiple of {devices_per_node} devices per node")
    sizes = [smallest << k for k in range((largest // smallest).bit_length())]
    between = sizes[-1] * 3 // 2
    return [*sizes, between] if between <= largest and between % devices_per_node == 0 else sizes


def optimal_interval(checkpoint: float, between_failures: float) -> float:
    """Seconds of training between checkpoints that lose the least time (Daly 2006)."""
    if checkpoint >= 2 * between_failures:
        return between_failures
    ratio = checkpoint / (2 * between_failures)
    return math.sqrt(2 * checkpoint * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def effective_ratio(interval: float, checkpoint: float, restart: float, between_failures: float) -> float:
    """Share of time that trains when failures come at random at a constant rate (Daly 2006).

    Failures during checkpoints and restarts count; a restart takes `restart` seconds.
    """
    wall = (
        between_failures * math.exp(restart / between_failures) * math.expm1((interval + checkpoint) / between_failures)
    )
    return interval / wall


def overhead(config: Config, cluster: Cluster, devices: int, failures: Failures, step: float = 0.0) -> Overhead:
    """Of a job on so many devices whose steps take `step` seconds; checkpoints are written as its config says."""
    between = failures.device_hours * 3600 / devices
    state = num_parameters(config.model) * STATE_BYTES
    nodes = math.ceil(devices / cluster.node.devices)
    copy = state / (devices * failures.copy_gb_per_s * 1e9)
    transfer = state / (min(nodes * failures.storage_gb_per_s, failures.storage_total_gb_per_s) * 1e9)
    blocking = copy if config.checkpoint.asynchronous else transfer
    interval = max(optimal_interval(blocking, between), transfer)
    if step:
        interval = max(round(interval / step), math.ceil(transfer / step), 1) * step
    # A checkpoint counts only once written, so a failure costs that much more of what was trained since.
    restart = failures.restart_seconds + transfer + (transfer if config.checkpoint.asynchronous else 0)
    return Overhead(between, blocking, interval, effective_ratio(interval, blocking, restart, between))


def scale(
    config: Config,
    cluster: Cluster,
    sizes: Sequence[int],
    mode: Literal["strong", "weak"],
    reference: int,
    failures: Failures,
    progress: Callable[[float, str], None],
) -> list[Point]:
    """Plans the first phase of `config` at every size. Weak scaling: its batch is that of `reference` devices."""
    points = []
    for index, devices in enumerate(sizes):
        phase = config.phases[0]
        batch = phase.batch_size if mode == "strong" else phase.batch_size * devices // reference
        at_size = dataclasses.replace(config, phases=(dataclasses.replace(phase, batch_size=max(batch, 1)),))

        def report(share: float, text: str, done: int = index, count: int = devices) -> None:
            progress((done + share) / len(sizes), f"{mode} scaling, {count:,} devices: {text}")

        plans = search(at_size, cluster, devices, keep=1, progress=report, evaluations=EVALUATIONS).plans
        plan = plans[0] if plans else None
        lost = overhead(config, cluster, devices, failures, plan.time.step if plan else 0.0)
        points.append(Point(devices, max(batch, 1), plan, lost))
    return points


def print_scale(console: Console, scalings: dict[str, list[Point]], failures: Failures, path: Path) -> None:
    """A table per kind of scaling, and the curves in `path`."""
    for mode, points in scalings.items():
        console.print(_table(mode, points))
    console.print(
        f"One device fails every {failures.device_hours:,.0f} hours; a restart takes {failures.restart_seconds:g} s "
        f"and reading the checkpoint at {failures.storage_gb_per_s:g} GB/s per node, at most "
        f"{failures.storage_total_gb_per_s:g} GB/s in all. Checkpoints stop training for the copy to the host, at "
        f"{failures.copy_gb_per_s:g} GB/s per device, and follow at the interval of Daly (2006). "
        "Efficiency: tokens/s per device, failures included, relative to the first row that has a layout.",
        style="dim",
    )
    x = [point.devices for point in next(iter(scalings.values()))]
    trained = {mode: [_trained(point) for point in points] for mode, points in scalings.items()}
    mfu = {mode: [point.plan.mfu if point.plan else math.nan for point in points] for mode, points in scalings.items()}
    ratio = {"effective training time": [point.overhead.effective for point in next(iter(scalings.values()))]}
    panels = [
        Panel("tokens/s, failures included", x, trained, log_y=True),
        Panel("MFU", x, mfu),
        Panel("share of time that trains", x, ratio),
    ]
    console.print(
        str(draw_curves(path, panels, "devices", "scaling, the layout planned anew at each size", log_x=True))
    )


def _table(mode: str, points: Sequence[Point]) -> Table:
    titles = ("devices", "batch", "step, s", "MFU", "efficiency", "checkpoint every", "effective", "tokens/s")
    table = Table("layout", title=f"{mode} scaling", title_justify="left")
    for title in titles:
        table.add_column(title, justify="right")
    base = next((_trained(point) / point.devices for point in points if point.plan), math.nan)
    for point in points:
        lost = point.overhead
        cells = [f"{point.devices:,}", f"{point.batch_size:,}", "", "", ""]
        if point.plan:
            per_device = _trained(point) / point.devices
            cells[2:] = f"{point.plan.time.step:.3f}", f"{point.plan.mfu:.1%}", f"{per_device / base:.1%}"
        speed = f"{_trained(point):,.0f}" if point.plan else ""
        layout = str(point.plan.shape) if point.plan else "no layout fits and deals the batch"
        table.add_row(layout, *cells, _interval(point), f"{lost.effective:.1%}", speed)
    return table


def _interval(point: Point) -> str:
    seconds = point.overhead.interval
    duration = f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
    return f"{seconds / point.plan.time.step:.0f} steps, {duration}" if point.plan else duration


def _trained(point: Point) -> float:
    """Tokens per second that count, failures included."""
    return point.plan.tokens_per_second * point.overhead.effective if point.plan else math.nan
