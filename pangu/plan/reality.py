"""Plan versus reality: what a step should take beside what it took, and a machine's constants from a run.

A step has stages: `data` (waiting for batches), `forward_backward` (all micro-batches, with the pipeline's bubble and
the exposed communication of tensor and context parallelism), `gradient_reduction` (what is exposed of the data-parallel
collectives) and `optimizer`; `other` is the rest.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pangu.config import Config
from pangu.data.schedule import Position
from pangu.errors import PanguError
from pangu.model.count import flops_per_token
from pangu.parallel.layout import Layout, make_layout
from pangu.plan.hardware import Cluster, load_cluster
from pangu.plan.job import job_of
from pangu.plan.memory import memory
from pangu.plan.time import step_time
from pangu.train.events import Event, read_events
from pangu.train.meter import Predict
from pangu.train.run import run_config

STAGES = ("data", "forward_backward", "gradient_reduction", "optimizer", "other")
WARM_UP_STEPS = 3
"""Steps at a run's start that say nothing about its rate: first launches, allocations."""
ROUNDS = 6
"""Times that the constants are fitted one after the other."""


@dataclass(frozen=True)
class Expectation:
    """Of one optimizer step."""

    seconds: float
    stages: dict[str, float]
    """Seconds by stage; they add up to `seconds`."""
    memory_bytes: float
    """Peak of the allocator on the fullest device."""
    mfu: float

    def fields(self, measured: Mapping[str, float] | None = None) -> dict[str, Any]:
        """For a step's event: predicted_seconds, predicted_stage_seconds, predicted_memory_bytes, predicted_mfu.

        With `measured` seconds by stage also difference_seconds: measured minus predicted, by stage. Where the gradient
        reduction was not measured on its own, it counts as part of forward_backward.
        """
        result = {
            "predicted_seconds": self.seconds,
            "predicted_stage_seconds": self.stages,
            "predicted_memory_bytes": round(self.memory_bytes),
            "predicted_mfu": self.mfu,
        }
        if measured is None:
            return result
        predicted = _as_measured(self.stages, measured)
        return {**result, "difference_seconds": {name: measured[name] - predicted[name] for name in measured}}


def expectation(
    config: Config,
    layout: Layout,
    cluster: Cluster,
    *,
    phase: int = 0,
    batch_size: int | None = None,
    peak_flops: float | None = None,
) -> Expectation:
    """What a step of `config` in `phase` takes under `layout`. Cheap enough for every change of phase or batch size.

    batch_size: sequences of the step; default: of the phase's end. peak_flops: per device, what the measured MFU is
    divided by; default: the chip's published peak.
    """
    job = job_of(config, layout, phase)
    if batch_size is not None:
        job = dataclasses.replace(job, batch_size=batch_size)
    time = step_time(job, cluster)
    constant = cluster.efficiency.step_ms * 1e-3
    stages = {
        "data": 0.0,
        "forward_backward": time.pipeline,
        "gradient_reduction": time.step - time.pipeline - time.optimizer - constant,
        "optimizer": time.optimizer,
        "other": constant,
    }
    peak = peak_flops or cluster.chip.peak_flops(job.precision)
    flops = job.tokens * flops_per_token(config.model, job.sequence_length)
    return Expectation(
        seconds=time.step,
        stages=stages,
        memory_bytes=max(rank.allocated for rank in memory(job, cluster)),
        mfu=flops / (time.step * layout.world_size * peak),
    )


def predictor(config: Config) -> Predict | None:
    """What the trainer writes into a step's event beside its measurements; None without metrics.cluster.

    Raises `ConfigError` for a cluster file that cannot be used.
    """
    if not config.metrics.cluster:
        return None
    cluster = load_cluster(config.metrics.cluster)
    expect = cache(partial(expectation, config, cluster=cluster))

    def predict(layout: Layout, position: Position, peak_flops: float, measured: Mapping[str, float]) -> dict[str, Any]:
        expected = expect(
            layout=layout, phase=position.phase_index, batch_size=position.batch_size, peak_flops=peak_flops
        )
        return expected.fields(measured)

    return predict


@dataclass(frozen=True)
class Observation:
    """The median step of a run at one phase and batch size."""

    phase: int
    batch_size: int
    steps: int
    seconds: float
    stages: dict[str, float]
    """Seconds by stage as far as the run measured them."""


@dataclass(frozen=True)
class Calibration:
    """A cluster whose constants were fitted to a run, and how well they fit."""

    cluster: Cluster
    observations: list[Observation]
    before: list[Expectation]
    after: list[Expectation]
    fitted: tuple[str, ...]
    """Names of the constants that the run could tell."""


def calibrate(run: Path, cluster: Cluster, devices: int | None = None) -> Calibration:
    """Fit `cluster.efficiency` to the events of `run`, as far as they can tell the constants apart.

    The rates of matmuls and of attention are scaled together until forward_backward takes what it took, the memory rate
    until the optimizer does, the links' and the network's until the gradient reduction does, where a run measures it on
    its own; step_ms is what no stage explains. Without stages a run tells the first, and with two batch sizes the last.
    Waiting for data is not modelled and stays a difference. devices: of the run; default: what its config names, with
    one data-parallel rank where that says 0. Raises `PanguError` for a run with too few steps.
    """
    config = run_config(run)
    layout = make_layout(config, devices or _named_devices(config))
    observations = observe(read_events(run), config)
    if not observations:
        raise PanguError(f"{run} has no more than {WARM_UP_STEPS} steps of any phase and batch size; train it further")

    def expect(candidate: Cluster) -> list[Expectation]:
        return [
            expectation(config, layout, candidate, phase=each.phase, batch_size=each.batch_size)
            for each in observations
        ]

    fitted = _fit(cluster, observations, expect, distributed=layout.dp * layout.cp > 1)
    names = tuple(
        field.name
        for field in dataclasses.fields(cluster.efficiency)
        if getattr(cluster.efficiency, field.name) != getattr(fitted.efficiency, field.name)
    )
    return Calibration(fitted, observations, expect(cluster), expect(fitted), names)


def observe(events: Sequence[Event], config: Config) -> list[Observation]:
    """Median steps by phase and batch size, the first steps and skipped ones left out."""
    phases = {phase.name: index for index, phase in enumerate(config.phases)}
    groups: dict[tuple[int, int], list[Event]] = {}
    steps = [event for event in events if event["kind"] == "step"]
    for event in steps[WARM_UP_STEPS:]:
        if event.get("seconds") and not event.get("skipped") and event.get("phase") in phases:
            groups.setdefault((phases[event["phase"]], event["batch_size"]), []).append(event)
    observations = []
    for (phase, batch_size), members in groups.items():
        measured = [event["stage_seconds"] for event in members if event.get("stage_seconds")]
        names = [name for name in STAGES if measured and all(name in stages for stages in measured)]
        stages = {name: statistics.median(stages[name] for stages in measured) for name in names}
        seconds = statistics.median(event["seconds"] for event in members)
        observations.append(Observation(phase, batch_size, len(members), seconds, stages))
    return observations


def _fit(
    cluster: Cluster,
    observations: Sequence[Observation],
    expect: Callable[[Cluster], list[Expectation]],
    distributed: bool,
) -> Cluster:
    """Coordinate by coordinate: every constant has one stage that it decides."""
    knobs: list[tuple[tuple[str, ...], str]] = [
        (("matmul", "attention_forward", "attention_backward"), "forward_backward")
    ]
    if all("optimizer" in each.stages for each in observations):
        knobs.append((("memory",), "optimizer"))
    if distributed and all("gradient_reduction" in each.stages for each in observations):
        knobs.append((("intra_node", "inter_node"), "gradient_reduction"))
    for _ in range(ROUNDS):
        for names, stage in knobs:
            cluster = _solved(cluster, names, partial(_excess_on, observations, expect, stage))
        rest = _unexplained(observations, expect(cluster))
        if rest is not None:
            step_ms = max(0.0, cluster.efficiency.step_ms + rest * 1e3)
            cluster = _with(cluster, {"step_ms": step_ms})
    return cluster


def _excess_on(
    observations: Sequence[Observation], expect: Callable[[Cluster], list[Expectation]], stage: str, cluster: Cluster
) -> float:
    """Log of predicted over measured seconds of a stage on `cluster`, mean over observations."""
    total = 0.0
    for each, prediction in zip(observations, expect(cluster), strict=True):
        if stage in each.stages:
            total += math.log(max(_as_measured(prediction.stages, each.stages)[stage], 1e-12) / each.stages[stage])
        else:
            total += math.log(prediction.seconds / each.seconds)
    return total / len(observations)


def _unexplained(observations: Sequence[Observation], expected: Sequence[Expectation]) -> float | None:
    """Seconds per step that stages do not explain; None when the run cannot tell them from its computation."""
    if all("other" in each.stages for each in observations):
        rest = [each.stages["other"] for each in observations]
        return statistics.mean(rest) - statistics.mean(prediction.stages["other"] for prediction in expected)
    if len(observations) < 2:
        return None
    # measured = a x predicted computation + b: the intercept is what does not grow with the batch.
    x = [prediction.seconds - prediction.stages["other"] for prediction in expected]
    slope, intercept = statistics.linear_regression(x, [each.seconds for each in observations])
    return intercept - expected[0].stages["other"] if slope > 0 else None


def _solved(cluster: Cluster, names: tuple[str, ...], excess: Callable[[Cluster], float]) -> Cluster:
    """`cluster` with these constants scaled by one factor until the excess is 0, or as far as they may go."""
    values = {name: getattr(cluster.efficiency, name) for name in names}
    low, high = math.log(1e-4 / max(values.values())), -math.log(max(values.values()))

    def scaled(log_factor: float) -> Cluster:
        return _with(cluster, {name: min(1.0, value * math.exp(log_factor)) for name, value in values.items()})

    if excess(scaled(high)) >= 0:
        return scaled(high)  # slower than the run even at the published rate
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(scaled(middle)) > 0 else (low, middle)
    return scaled(high)


def _with(cluster: Cluster, values: Mapping[str, float]) -> Cluster:
    return dataclasses.replace(cluster, efficiency=dataclasses.replace(cluster.efficiency, **values))


def _as_measured(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Predicted stages as a run measures them: an unmeasured gradient reduction is part of forward_backward."""
    result = {**dict.fromkeys(measured, 0.0), **predicted}
    if "gradient_reduction" not in measured:
        result["forward_backward"] += result.pop("gradient_reduction", 0.0)
    return result


def _named_devices(config: Config) -> int:
    parallel = config.parallel
    return parallel.pp * parallel.dp_replicate * max(parallel.dp_shard, 1) * parallel.cp * parallel.tp
