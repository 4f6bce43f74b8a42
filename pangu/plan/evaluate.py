"""Estimates and plans of single shapes: what the search compares."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pangu.config import Config, ModelConfig, RecomputeConfig
from pangu.errors import ConfigError
from pangu.model.count import flops_per_token
from pangu.parallel.layout import V_SHAPED
from pangu.plan.balance import deal_layers, split_among_stages
from pangu.plan.hardware import Cluster, Network
from pangu.plan.job import Job, Recompute, job_of
from pangu.plan.memory import RankMemory, memory
from pangu.plan.space import Constraints, Shape, configured
from pangu.plan.time import StageTime, StepTime, step_time

MOVES = 120
"""Single layers moved on trial per plan."""


Kind = tuple[object, ...]
"""Shapes of one kind compete for one place among the plans."""


@dataclass(frozen=True)
class Level:
    """How much a rank recomputes: a mode for this share of every stage's layers."""

    mode: Recompute
    share: float = 1.0

    def limit(self, stage_layers: Iterable[int]) -> int:
        """The first so many layers of each of a rank's stages: RecomputeConfig.layers."""
        return math.ceil(self.share * max(stage_layers))


LEVELS = (
    Level("none"),
    Level("selective", 0.5),
    Level("selective"),
    Level("full", 0.25),
    Level("full", 0.5),
    Level("full", 0.75),
    Level("full"),
)


@dataclass(frozen=True)
class Plan:
    """A layout that fits, and what it costs."""

    shape: Shape
    model: ModelConfig
    job: Job
    cluster: Cluster
    memory: tuple[RankMemory, ...]
    """Per pipeline rank."""
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.job.tokens / self.time.step

    @property
    def peak_flops(self) -> float:
        """FLOP/s of one device that MFU divides by."""
        return self.cluster.chip.peak_flops(self.job.precision)

    @property
    def mfu(self) -> float:
        """tokens/s x model FLOPs per token (causal attention, no recomputation) / (devices x peak): `pangu train`'s."""
        flops = flops_per_token(self.model, self.job.sequence_length)
        return self.tokens_per_second * flops / (self.shape.world_size * self.peak_flops)

    @property
    def largest_memory(self) -> float:
        """Bytes on a device of the fullest pipeline rank."""
        return max(rank.total for rank in self.memory)

    def configured(self, config: Config) -> Config:
        """`config` with this layout: what `pangu train` runs. Raises `ConfigError` when it would refuse it."""
        job = self.job
        mode = job.recompute[0] if len(job.recompute) == 1 else job.recompute
        recompute = RecomputeConfig(mode=mode, layers=job.recompute_layers)  # type: ignore[arg-type]  # of LEVELS
        devices = self.cluster.node.devices
        return configured(config, self.shape, job.layout.stage_layers, recompute, devices)


@dataclass(frozen=True)
class Units:
    """Seconds of the parts of which every stage of one (tp, cp, micro-batch size) is made."""

    layer: dict[Recompute, StageTime]
    embedding: float
    head: float


@dataclass(frozen=True)
class _Costs:
    """Seconds of a shape with even layers and the recomputation it needs."""

    layer: float
    """All passes of one micro-batch through one layer."""
    after_passes: float
    """From the last pass to the optimizer."""
    optimizer: float


class Space:
    """Estimates and plans of shapes, with a memory for what shapes have in common."""

    def __init__(self, config: Config, cluster: Cluster, constraints: Constraints) -> None:
        self.config = config
        self.cluster = cluster
        self.constraints = constraints
        self.num_layers = config.model.num_layers
        self.limit = cluster.chip.memory_bytes
        mode = constraints.recompute
        self.levels = [level for level in LEVELS if mode is None or level == Level(mode)]
        self._units: dict[tuple[int, int, int], Units] = {}
        self._known_costs: dict[tuple[Shape, int], _Costs | None] = {}

    def kind(self, shape: Shape) -> Kind:
        """Sizes of the dimensions, so that plans differ in more than a stage; every shape when they are given."""
        return (shape.tp, shape.cp, shape.pp, shape.dp) if self.constraints.pp is None else (shape,)

    def estimate(self, shape: Shape) -> float:
        """Seconds of a step by closed forms, on the low side, as if nothing were recomputed or sharded."""
        return self._passes(shape, self.units(shape).layer["none"].total)

    def estimate_with_memory(self, shape: Shape) -> float:
        """`estimate` with as much recomputation as the average rank needs, and with data-parallel communication.

        Infinite when the shape cannot fit.
        """
        costs = self._costs(shape)
        if costs is None:
            return math.inf
        return self._passes(shape, costs.layer) + costs.after_passes / shape.stages_per_rank + costs.optimizer

    def _passes(self, shape: Shape, layer: float) -> float:
        """From the first pass to the last, sends free: the longer of two things that a step cannot do without.

        One is the slowest rank's passes, and the time in which it waits for the pipeline to fill and drain: a forward
        and a backward pass of a stage of every other rank, a forward pass only where weight gradients fill the rest.
        Ranks of interleaved schedules take turns, so that a stage made longer by the head holds up the others; counted
        by half, which stays below what simulation finds. The other is the way of the first micro-batch through all
        stages and back, with the other micro-batches behind it.
        """
        plain, extra = self.units(shape).layer["none"], self._extra_seconds(shape)
        count, stage = self._micro_batches(shape), self.num_layers / shape.num_stages
        slowest = _slowest_rank(self.num_layers, layer, extra, shape.stages_per_rank)
        if shape.schedule.startswith("interleaved"):
            slowest += max(0.0, max(extra) + (1 - stage) * layer) / 2
        fills = plain.total if shape.schedule in ("1f1b", "interleaved_1f1b") else plain.forward
        there_and_back = layer * (plain.forward + plain.backward_input) / plain.total
        return max(
            count * slowest + (shape.pp - 1) * stage * fills,
            (self.num_layers + (count - 1) * stage) * there_and_back,
        )

    def evaluate(self, shape: Shape) -> Plan | None:
        """The best plan of a shape; None when it does not fit."""
        base = self.job(shape, self._even_layers(shape))
        seconds = [[math.inf] * (self.num_layers + 1) for _ in range(shape.pp)]
        shares = [[math.inf] * (self.num_layers + 1) for _ in range(shape.pp)]
        chosen: list[dict[int, Level]] = [{} for _ in range(shape.pp)]
        for counts in self._counts(base):
            for level in self._by_time(shape):
                job = self._with(base, self._stage_layers(shape, counts), [level] * shape.pp)
                for rank, (n, used) in enumerate(zip(counts, memory(job, self.cluster), strict=True)):
                    if n not in chosen[rank] and used.total <= self.limit:
                        chosen[rank][n] = level
                        shares[rank][n] = used.total / self.limit
                        seconds[rank][n] = self._rank_seconds(job, rank, level)
                if all(n in of_rank for n, of_rank in zip(counts, chosen, strict=True)):
                    break
        dealt = deal_layers(self.num_layers, seconds, shares)
        if not dealt:
            return None
        levels = [of_rank[n] for n, of_rank in zip(dealt, chosen, strict=True)]
        return self.plan(shape, self._with(base, self._stage_layers(shape, dealt), levels))

    def polish(self, plan: Plan) -> Plan:
        """Move single layers between stages as long as the simulated step gets shorter."""
        trials = 0
        while trials < MOVES:
            for layers in self._moves(plan):
                trials += 1
                layout = dataclasses.replace(plan.job.layout, stage_layers=layers)
                job = dataclasses.replace(plan.job, layout=layout)
                if step_time(job, self.cluster).step < plan.time.step * (1 - 1e-6):
                    better = self.plan(plan.shape, job)
                    if better:
                        plan = better
                        break
                if trials == MOVES:
                    break
            else:
                break
        return plan

    def plan(self, shape: Shape, job: Job) -> Plan | None:
        """The plan of a job; None when it does not fit."""
        used = memory(job, self.cluster)
        if max(rank.total for rank in used) > self.limit:
            return None
        return Plan(shape, self.config.model, job, self.cluster, used, step_time(job, self.cluster))

    def accepted(self, plan: Plan) -> bool:
        """Whether `pangu train` would start with it."""
        try:
            plan.configured(self.config)
        except ConfigError:
            return False
        return True

    def units(self, shape: Shape) -> Units:
        """From a pipeline of three stages of one layer each: embedding and head are what its ends take longer."""
        key = shape.tp, shape.cp, shape.micro_batch_size
        if key not in self._units:
            three = dataclasses.replace(shape, pp=3, dp=1, dp_shard=1, stages_per_rank=1, schedule="1f1b", zero_stage=1)
            job = self.job(three, (1, 1, 1))
            model = dataclasses.replace(job.model, num_layers=3)
            job = dataclasses.replace(job, model=model, batch_size=3 * shape.micro_batch_size)
            modes: tuple[Recompute, ...] = ("none", "selective", "full")
            cluster = self.cluster
            if cluster.network is None:  # the sends of this pipeline are of no interest
                cluster = dataclasses.replace(cluster, network=Network(device_gbit_per_s=1, rails=1, latency_us=0))
            stages = {mode: step_time(dataclasses.replace(job, recompute=(mode,)), cluster).stages for mode in modes}
            first, middle, last = (stage.total for stage in stages["none"])
            layers = {mode: of_mode[1] for mode, of_mode in stages.items()}
            self._units[key] = Units(layers, first - middle, last - middle)
        return self._units[key]

    def job(self, shape: Shape, stage_layers: tuple[int, ...]) -> Job:
        """Of a shape, without recomputation."""
        parallel = dataclasses.replace(
            self.config.parallel,
            pipeline_schedule=shape.schedule,  # type: ignore[arg-type]
            pipeline_stages_per_rank=shape.stages_per_rank,
            zero_stage=shape.zero_stage,  # type: ignore[arg-type]
            recompute=RecomputeConfig(),
        )
        train = dataclasses.replace(self.config.train, micro_batch_size=shape.micro_batch_size)
        config = dataclasses.replace(self.config, parallel=parallel, train=train)
        return job_of(config, shape.layout(stage_layers, self.cluster.node.devices))

    def _with(self, job: Job, stage_layers: tuple[int, ...], levels: Sequence[Level]) -> Job:
        """`job` with these layers, and one level per pipeline rank."""
        layout = dataclasses.replace(job.layout, stage_layers=stage_layers)
        modes = tuple(level.mode for level in levels)
        limits = tuple(
            level.limit(stage_layers[stage] for stage in layout.stages_of(rank)) for rank, level in enumerate(levels)
        )
        return dataclasses.replace(
            job,
            layout=layout,
            recompute=modes[:1] if len(set(modes)) == 1 else modes,
            recompute_layers=() if all(level.share == 1 for level in levels) else limits,
        )

    def _rank_seconds(self, job: Job, rank: int, level: Level) -> float:
        """Of all passes of one micro-batch on a pipeline rank."""
        shape_units = self._units[job.layout.tp, job.layout.cp, job.micro_batch_size]
        stages = job.layout.stages_of(rank)
        layers = [job.layout.stage_layers[stage] for stage in stages]
        again = sum(min(level.limit(layers), n) for n in layers)
        seconds = again * shape_units.layer[level.mode].total + (sum(layers) - again) * shape_units.layer["none"].total
        return (
            seconds
            + (shape_units.embedding if 0 in stages else 0)
            + (shape_units.head if job.layout.num_stages - 1 in stages else 0)
        )

    def _by_time(self, shape: Shape) -> list[Level]:
        """Levels from the fastest to the slowest."""
        layer = self.units(shape).layer
        return sorted(
            self.levels, key=lambda at: at.share * layer[at.mode].total + (1 - at.share) * layer["none"].total
        )

    def _costs(self, shape: Shape) -> "_Costs | None":
        """Judged on 1F1B and even layers: of all schedules it holds the fewest micro-batches. None: does not fit."""
        micro_batches = self._micro_batches(shape)
        if micro_batches >= shape.pp:
            shape = dataclasses.replace(shape, schedule="1f1b", stages_per_rank=1)
            micro_batches = shape.pp
        key = (shape, micro_batches)
        if key not in self._known_costs:
            self._known_costs[key] = self._average_costs(shape, micro_batches)
        return self._known_costs[key]

    def _average_costs(self, shape: Shape, micro_batches: int) -> "_Costs | None":
        """With the least recomputation under which the memory of all ranks together suffices."""
        base = self.job(shape, self._even_layers(shape))
        base = dataclasses.replace(base, batch_size=micro_batches * shape.micro_batch_size * shape.dp)
        for level in self._by_time(shape):
            job = self._with(base, base.layout.stage_layers, [level] * shape.pp)
            if sum(rank.total for rank in memory(job, self.cluster)) <= self.limit * shape.pp:
                time = step_time(job, self.cluster)
                passes = sum(stage.total for stage in time.stages) - sum(self._extra_seconds(shape))
                return _Costs(passes / self.num_layers, time.step - time.pipeline - time.optimizer, time.optimizer)
        return None

    def _extra_seconds(self, shape: Shape) -> list[float]:
        """Per pipeline rank, what the embedding and the head add."""
        units, extra = self.units(shape), [0.0] * shape.pp
        extra[0] += units.embedding
        extra[0 if shape.schedule in V_SHAPED else -1] += units.head
        return extra

    def _counts(self, job: Job) -> Iterator[list[int]]:
        """Layers per rank to look at: the same number on every rank, near the mean."""
        pp = job.layout.pp
        if self.constraints.stage_layers or pp == 1:
            layers = job.layout.stage_layers
            yield [sum(layers[stage] for stage in job.layout.stages_of(rank)) for rank in range(pp)]
            return
        mean, fewest = self.num_layers / pp, job.layout.num_stages // pp
        most = self.num_layers - fewest * (pp - 1)
        for n in range(max(fewest, math.floor(mean) - 3), min(most, math.ceil(mean) + 2) + 1):
            yield [n] * pp

    def _even_layers(self, shape: Shape) -> tuple[int, ...]:
        """The given layers, or about the same number on every rank."""
        if self.constraints.stage_layers:
            return self.constraints.stage_layers
        each, more = divmod(self.num_layers, shape.pp)
        return self._stage_layers(shape, [each + (rank < more) for rank in range(shape.pp)])

    def _stage_layers(self, shape: Shape, per_rank: Sequence[int]) -> tuple[int, ...]:
        """The layers of ranks dealt over their stages, with embedding and head counted in layers."""
        if self.constraints.stage_layers:
            return self.constraints.stage_layers
        units = self.units(shape)
        layer = units.layer["none"].total
        layers = [0] * shape.num_stages
        layout = shape.layout(tuple(layers), self.cluster.node.devices)
        for rank, count in enumerate(per_rank):
            stages = layout.stages_of(rank)
            loads = [
                (units.embedding if stage == 0 else 0) / layer + (units.head if stage == len(layers) - 1 else 0) / layer
                for stage in stages
            ]
            for stage, n in zip(stages, split_among_stages(count, loads), strict=True):
                layers[stage] = n
        return tuple(layers)

    def _moves(self, plan: Plan) -> Iterator[tuple[int, ...]]:
        """Layer lists with one layer moved, from the stages of the busiest rank first."""
        layout, layers = plan.job.layout, plan.job.layout.stage_layers
        if layout.pp == 1 or self.constraints.stage_layers:
            return
        busy = {stage: seconds.total for stage, seconds in enumerate(plan.time.stages)}
        ranks = sorted(range(layout.pp), key=lambda rank: -sum(busy[stage] for stage in layout.stages_of(rank)))
        order = [stage for rank in ranks for stage in layout.stages_of(rank)]
        for source in order:
            for target in reversed(order):
                if source != target and layers[source] > 1:
                    moved = list(layers)
                    moved[source] -= 1
                    moved[target] += 1
                    yield tuple(moved)

    def _micro_batches(self, shape: Shape) -> int:
        return self.config.phases[0].batch_size // (shape.dp * shape.micro_batch_size)


def _slowest_rank(num_layers: int, layer: float, extra: Sequence[float], at_least: int) -> float:
    """Seconds of the slowest rank in the best dealing of whole layers, `at_least` so many on each."""
    mean = math.floor(num_layers / len(extra))
    candidates = sorted({n * layer + more for n in range(mean, mean + at_least + 3) for more in {*extra, 0.0}})
    for seconds in candidates:
        room = [math.floor((seconds - more) / layer + 1e-9) for more in extra]
        if min(room) >= at_least and sum(room) >= num_layers:
            return seconds
    return at_least * layer + max(extra)
