"""Pictures of a simulated pipeline: a PNG, and a trace for chrome://tracing or ui.perfetto.dev."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.files import write_atomically
from pangu.plan.hardware import Cluster
from pangu.plan.job import Job
from pangu.plan.operators import Operators
from pangu.plan.simulate import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    KINDS,
    Durations,
    Timeline,
    simulate,
)
from pangu.plan.time import data_parallel, pipeline_order, step_time
from pangu.train.plot import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One hue per kind of pass, darker for the later of a rank's stages.
_COLORMAPS = {FORWARD: "Blues", BACKWARD: "Oranges", BACKWARD_INPUT: "Reds", BACKWARD_WEIGHT: "Greens"}
_COLLECTIVE_COLOR = "#8d8d8d"
_SHOWN_ROUNDS = 4  # micro-batches shown per pipeline rank
_MOST_LABELS = 400  # passes above which micro-batch numbers would be unreadable


def timeline_of(job: Job, cluster: Cluster) -> Timeline:
    """One step of a job; of a long one its first and last micro-batches, as many as show the steady state."""
    time = step_time(job, cluster)
    gathers, reductions, _ = data_parallel(Operators(job, cluster), time.stages)
    durations = Durations(
        [stage.forward for stage in time.stages],
        [stage.backward_input for stage in time.stages],
        [stage.backward_weight for stage in time.stages],
        [time.p2p] * len(time.stages),
        gathers,
        reductions,
    )
    shown = _SHOWN_ROUNDS * job.layout.pp
    count = job.num_micro_batches
    return simulate(pipeline_order(job, count if count <= shown else shown + count % job.layout.pp), durations)


def write_timeline(timeline: Timeline, folder: Path, title: str, name: str = "pipeline") -> list[Path]:
    """Write NAME.png and NAME.json (Chrome trace) into `folder` and return their paths. Durations are in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name}.json"
    write_atomically(trace, json.dumps(chrome_trace(timeline, title)))
    return [_draw(timeline, folder / f"{name}.png", title), trace]


def chrome_trace(timeline: Timeline, title: str) -> dict[str, Any]:
    """Trace events: one process per pipeline rank; passes, collectives and a counter of micro-batches in flight."""
    order = timeline.order
    events: list[dict[str, Any]] = []
    for rank in range(order.pp):
        events += [
            _metadata("process_name", rank, 0, f"pipeline rank {rank}"),
            _metadata("thread_name", rank, 0, "computation"),
            _metadata("thread_name", rank, 1, "data-parallel collectives"),
        ]
        for moment, held in timeline.in_flight(rank):
            counts = {f"stage {stage}": count for stage, count in zip(order.stages_of(rank), held, strict=True)}
            events.append({"name": "in flight", "ph": "C", "pid": rank, "ts": moment * 1e6, "args": counts})
    for rank, (kind, stage, micro_batch), start, end in timeline.passes():
        details = {"stage": stage, "micro_batch": micro_batch}
        events.append(_complete(f"{KINDS[kind]} {micro_batch}, stage {stage}", rank, 0, start, end, details))
    for name, intervals in (("gather parameters", timeline.gathers), ("reduce gradients", timeline.reductions)):
        for stage, (start, end) in intervals.items():
            label = f"{name}, stage {stage}"
            events.append(_complete(label, order.rank_of(stage), 1, start, end, {"stage": stage}))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title}}


def _metadata(name: str, rank: int, thread: int, text: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": thread, "args": {"name": text}}


def _complete(name: str, rank: int, thread: int, start: float, end: float, details: dict[str, int]) -> dict[str, Any]:
    """Times in microseconds, as the format wants."""
    span = {"ts": start * 1e6, "dur": (end - start) * 1e6}
    return {"name": name, "cat": name.split(" ")[0], "ph": "X", "pid": rank, "tid": thread, **span, "args": details}


def _draw(timeline: Timeline, path: Path, title: str) -> Path:
    """Ranks over time: above who computes what, below the micro-batches whose activations each rank holds."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state shared between figures

    pp = timeline.order.pp
    figure = Figure(figsize=(14, 2.6 + 0.34 * pp), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[0.34 * pp + 0.6, 1.5])
    _draw_passes(above, timeline)
    _draw_in_flight(below, timeline)
    above.set_title(
        f"{title}\n{timeline.seconds:.3g} s; bubble {timeline.bubble_of_step:.1%} of the step, "
        f"{timeline.bubble_of_ideal:.1%} of the ideal time",
        fontsize=10,
        loc="left",
    )
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    return temporary.replace(path)


def _draw_passes(axes: "Axes", timeline: Timeline) -> None:
    import matplotlib
    from matplotlib.patches import Patch

    order = timeline.order
    local = {stage: index for rank in range(order.pp) for index, stage in enumerate(order.stages_of(rank))}

    def color(kind: int, stage: int) -> Any:
        return matplotlib.colormaps[_COLORMAPS[kind]](0.35 + 0.5 * local[stage] / max(order.stages_per_rank - 1, 1))

    bars: dict[tuple[int, int], tuple[list[tuple[float, float]], list[Any]]] = {}
    labelled = len(order.steps) <= _MOST_LABELS
    for rank, (kind, stage, micro_batch), start, end in timeline.passes():
        spans, colors = bars.setdefault((rank, 0), ([], []))
        spans.append((start, end - start))
        colors.append(color(kind, stage))
        if labelled:
            axes.text((start + end) / 2, rank, str(micro_batch), ha="center", va="center", fontsize=5)
    for stage, (start, end) in [*timeline.gathers.items(), *timeline.reductions.items()]:
        spans, colors = bars.setdefault((order.rank_of(stage), 1), ([], []))
        spans.append((start, end - start))
        colors.append(_COLLECTIVE_COLOR)
    for (rank, lane), (spans, colors) in bars.items():
        bottom, height = (rank - 0.4, 0.7) if lane == 0 else (rank + 0.32, 0.14)
        axes.broken_barh(spans, (bottom, height), facecolors=colors, edgecolor="white", linewidth=0.2)
    kinds = dict.fromkeys(action.kind for actions in order.ranks for action in actions)
    handles = [Patch(color=matplotlib.colormaps[_COLORMAPS[kind]](0.6), label=KINDS[kind]) for kind in kinds]
    if timeline.gathers or timeline.reductions:
        handles.append(Patch(color=_COLLECTIVE_COLOR, label="data-parallel collective"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    axes.set_xlim(0, timeline.seconds)
    axes.set_ylabel("pipeline rank")
    axes.set_yticks(range(order.pp))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _draw_in_flight(axes: "Axes", timeline: Timeline) -> None:
    for rank in range(timeline.order.pp):
        moments = timeline.in_flight(rank)
        totals = [sum(held) / timeline.order.stages_per_rank for _, held in moments]
        color = COLORS[rank % len(COLORS)]
        axes.step(
            [moment for moment, _ in moments], totals, where="post", color=color, linewidth=1, label=f"rank {rank}"
        )
    if timeline.order.pp <= len(COLORS):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)
    axes.set_ylabel("micro-batches\nin flight")
    axes.set_xlabel("seconds")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
