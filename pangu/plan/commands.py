"""The command line of `pangu plan`."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from pangu import config as configuration
from pangu.config import Config
from pangu.errors import ConfigError
from pangu.files import write_atomically
from pangu.plan.evaluate import Plan
from pangu.plan.hardware import Cluster, load_cluster
from pangu.plan.report import print_plan, print_search
from pangu.plan.search import Search, search, smallest_cluster
from pangu.plan.space import FREE, parse_layout

_WIDTH_OF_FILES = 160

_DESCRIPTION = """\
Find the layout in which CONFIG trains fastest on a cluster, and what a step will cost. --section.field value overrides
a field of CONFIG. `pangu plan predict --help`: predictions for published measurements.
"""


def run(arguments: Sequence[str]) -> int:
    """`pangu plan ARGUMENTS`. Raises `PanguError` for what the user can mend."""
    if arguments and arguments[0] == "predict":
        from pangu.plan.predict import run as predict

        return predict(arguments[1:])
    options, overrides = _parser().parse_known_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    if options.calibrate:
        return _calibrate(options, console)
    if not options.config:
        raise ConfigError("pangu plan needs a CONFIG: a TOML file, or the name of one in configs/")
    config = configuration.load(options.config, overrides)
    planned = one_phase(config, options.phase)
    cluster = load_cluster(options.cluster)
    if options.scale:
        return _scale(options, planned, cluster, console)
    devices = _devices(options, cluster)
    if options.sweep:
        return _sweep(options, planned, cluster, devices, console)
    constraints = parse_layout(options.explain) if options.explain else FREE
    with _progress(console) as progress:
        found = search(planned, cluster, devices, constraints, progress=progress)
        if not found.plans:
            raise ConfigError(_nothing(planned, cluster, devices, found, options.explain, progress))
    best = found.plans[0]
    if options.explain:
        print_plan(console, best)
    else:
        print_search(console, found)
    _write_files(options, config, best, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pangu plan", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a TOML file, or the name of one in configs/")
    parser.add_argument("--cluster", required=True, help="a TOML file, or the name of one in launch/clusters/")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--nodes", type=int, help="nodes of the cluster (default: 1)")
    size.add_argument("--devices", type=int, help="devices instead, also fewer than a node has")
    parser.add_argument("--phase", default="0", help="number or name of the phase to plan for (default: 0)")
    parser.add_argument(
        "--explain", metavar="LAYOUT", help="one layout in full, such as tp8,pp8,dp128,v6; the rest is chosen"
    )
    parser.add_argument("--write", metavar="FILE", type=Path, help="CONFIG with the best layout, as TOML")
    parser.add_argument("--timeline", metavar="FOLDER", type=Path, help="picture and Chrome trace of the best pipeline")
    parser.add_argument(
        "--sweep", metavar="FIELD=A,B,C", help="plan again for values of p2p_bandwidth or a cluster's field"
    )
    parser.add_argument("--scale", metavar="A..B", help="weak and strong scaling from A to B devices")
    parser.add_argument(
        "--output", metavar="PATH", type=Path, help="picture of --sweep and --scale, cluster of --calibrate"
    )
    parser.add_argument("--calibrate", metavar="RUN", type=Path, help="fit the cluster's constants to a run's events")
    _add_failures(parser)
    return parser


def _add_failures(parser: argparse.ArgumentParser) -> None:
    from pangu.plan.scale import Failures

    group = parser.add_argument_group("failures, for --scale")
    helps = {
        "device_hours": "mean hours between failures of one device",
        "restart_seconds": "from a failure to loading the checkpoint",
        "storage_gb_per_s": "of one node to shared storage",
        "storage_total_gb_per_s": "of all nodes together",
        "copy_gb_per_s": "of one device to host memory",
    }
    for field in dataclasses.fields(Failures):
        name = f"--{field.name.replace('_', '-')}"
        text = f"{helps[field.name]} (default: {field.default:g})"
        group.add_argument(name, type=float, default=field.default, help=text)


def one_phase(config: Config, wanted: str) -> Config:
    """`config` with one phase, at the batch size that it ends with."""
    names = [phase.name for phase in config.phases]
    index = int(wanted) if wanted.isdigit() else names.index(wanted) if wanted in names else len(names)
    if index >= len(names):
        listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        raise ConfigError(f"--phase {wanted}: the config has phases {listed}")
    phase = config.phases[index]
    if phase.batch_size_ramp:
        phase = dataclasses.replace(phase, batch_size=phase.batch_size_ramp[-1].batch_size, batch_size_ramp=())
    return dataclasses.replace(config, phases=(phase,))


def _devices(options: argparse.Namespace, cluster: Cluster) -> int:
    devices = options.devices if options.devices is not None else (options.nodes or 1) * cluster.node.devices
    if devices < 1 or (options.nodes is not None and options.nodes < 1):
        raise ConfigError("--nodes and --devices must be at least 1")
    if devices > cluster.node.devices:
        cluster.require_network()
        if devices % cluster.node.devices:
            raise ConfigError(f"--devices {devices} is not a multiple of {cluster.node.devices} devices per node")
    return devices


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[float, str], None]]:
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, text: progress.update(task, completed=share, description=text)


def _nothing(
    config: Config,
    cluster: Cluster,
    devices: int,
    found: Search,
    layout: str | None,
    progress: Callable[[float, str], None],
) -> str:
    """Why there is no plan, and what would help."""
    where = f"{devices:,} x {cluster.chip.name} with {cluster.chip.memory_gib:g} GiB"
    if layout and not found.considered:
        return (
            f"layout {layout!r} cannot run on {devices:,} devices: its sizes do not multiply to that, or heads, layers,"
            f" sequence or batch ({config.phases[0].batch_size} sequences) cannot be dealt over them"
        )
    if layout:
        return f"layout {layout!r} does not fit {where}, whatever is recomputed"
    if not found.considered:
        batch = config.phases[0].batch_size
        return f"no layout deals {batch} sequences over {devices:,} devices; change the phase's batch_size or --nodes"
    progress(0.0, "looking for the smallest cluster that fits")
    smallest = smallest_cluster(config, cluster, devices)
    if smallest is None:
        grow = "its batch can use" if cluster.network else "there can be: the cluster has no [network]"
        return f"the model does not fit {where} under any layout, nor on any larger number of them that {grow}"
    nodes = -(-smallest // cluster.node.devices)
    return (
        f"the model does not fit {where} under any layout; the smallest cluster of this kind it fits on has {nodes:,} "
        f"nodes ({smallest:,} devices)"
    )


def _write_files(options: argparse.Namespace, config: Config, plan: Plan, console: Console) -> None:
    if options.timeline:
        from pangu.plan.timeline import timeline_of, write_timeline

        for path in write_timeline(timeline_of(plan.job, plan.cluster), options.timeline, str(plan.shape)):
            console.print(f"wrote {path}")
    if options.write:
        try:
            whole = plan.configured(config)
        except ConfigError as error:
            whole = plan.configured(one_phase(config, options.phase))
            console.print(f"wrote only phase {options.phase!r} to {options.write}, for in another {error}")
        write_atomically(options.write, configuration.show(whole))
        console.print(f"wrote {options.write}")


def _sweep(options: argparse.Namespace, config: Config, cluster: Cluster, devices: int, console: Console) -> int:
    from pangu.plan.sweep import curves_of, parse_sweep, print_sweep, sweep

    field, values = parse_sweep(options.sweep, cluster)
    with _progress(console) as progress:
        curves = curves_of(cluster, field, options.explain)
        points = sweep(config, cluster, devices, field, values, curves, progress)
    print_sweep(console, field, points, options.output or Path(f"sweep_{field.replace('.', '_')}.png"))
    return 0


def _scale(options: argparse.Namespace, config: Config, cluster: Cluster, console: Console) -> int:
    from pangu.plan.scale import Failures, parse_sizes, print_scale, scale

    failures = Failures(*(getattr(options, field.name) for field in dataclasses.fields(Failures)))
    if min(dataclasses.astuple(failures)) <= 0:
        raise ConfigError("the figures of failures must be positive")
    sizes = parse_sizes(options.scale, cluster.node.devices)
    if max(sizes) > cluster.node.devices:
        cluster.require_network()
    given = options.devices or options.nodes
    reference = _devices(options, cluster) if given else sizes[0]
    scalings = {}
    with _progress(console) as progress:
        for mode in ("strong", "weak"):
            scalings[mode] = scale(config, cluster, sizes, mode, reference, failures, progress)
    print_scale(console, scalings, failures, options.output or Path("scaling.png"))
    return 0


def _calibrate(options: argparse.Namespace, console: Console) -> int:
    from pangu.plan.reality import calibrate

    cluster = load_cluster(options.cluster)
    given = options.devices or options.nodes
    result = calibrate(options.calibrate, cluster, _devices(options, cluster) if given else None)
    table = Table(
        "phase, batch, stage of the step",
        Column("measured, s", justify="right"),
        Column("planned before", justify="right"),
        Column("planned after", justify="right"),
    )
    for at, before, after in zip(result.observations, result.before, result.after, strict=True):
        name = f"{at.phase}, {at.batch_size}"
        table.add_row(
            f"{name}, step", f"{at.seconds:.4g}", f"{before.seconds:.4g}", f"{after.seconds:.4g}", style="bold"
        )
        for stage, seconds in at.stages.items():
            table.add_row(
                f"{name}, {stage}", f"{seconds:.4g}", f"{before.stages[stage]:.4g}", f"{after.stages[stage]:.4g}"
            )
    console.print(table)
    for name in result.fitted:
        old, new = (getattr(each.efficiency, name) for each in (cluster, result.cluster))
        console.print(f"{name}: {old:.4g} -> {new:.4g}")
    path = options.output or Path(f"{options.calibrate.name}_cluster.toml")
    write_atomically(path, configuration.show(result.cluster))
    console.print(f"wrote {path}")
    return 0
