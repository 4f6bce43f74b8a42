"""Which rank does what: the arithmetic of a parallel layout, done before any process group or tensor exists.

Ranks are numbered with `tp` innermost and `pp` outermost, so that a tensor-parallel group is a run of neighbouring
devices inside a node and pipeline neighbours are as far apart as they can be:

    rank = (((pp * dp_replicate + ...) * dp_shard + ...) * cp + ...) * tp + ...
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pangu.config import Config, ModelConfig, ParallelConfig
from pangu.data.schedule import Schedule
from pangu.errors import ConfigError
from pangu.model.count import layer_parameters
from pangu.parallel.context_layout import check_context_parallel

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the outermost to the innermost."""

V_SHAPED = ("zero_bubble_v", "dualpipe_v")
"""Schedules in which a rank's second stage mirrors its first: rank 0 holds the first and the last stage."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the dimensions, and the layers of every pipeline stage in the model's order."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    stage_layers: tuple[int, ...]
    v_shaped: bool
    devices_per_node: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of `DIMENSIONS`."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def dp(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_stages(self) -> int:
        return len(self.stage_layers)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index along every dimension of `rank`."""
        result = {}
        for name, size in zip(reversed(DIMENSIONS), reversed(self.sizes), strict=True):
            rank, result[name] = divmod(rank, size)
        return {name: result[name] for name in DIMENSIONS}

    def dp_rank(self, rank: int) -> int:
        """Which share of a batch `rank` reads."""
        at = self.coordinates(rank)
        return at["dp_replicate"] * self.dp_shard + at["dp_shard"]

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """Numbers, in the model's order, of the stages that a pipeline rank holds."""
        if self.v_shaped:
            return pp_rank, self.num_stages - 1 - pp_rank
        return tuple(range(pp_rank, self.num_stages, self.pp))

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        return self.num_stages - 1 - stage if self.v_shaped and stage >= self.pp else stage % self.pp

    def layers_of_stage(self, stage: int) -> range:
        """Numbers of a stage's layers."""
        start = sum(self.stage_layers[:stage])
        return range(start, start + self.stage_layers[stage])

    def groups(self, dimension: str) -> Iterator[list[int]]:
        """The ranks of every group along a dimension, in order."""
        axis = DIMENSIONS.index(dimension)
        stride = math.prod(self.sizes[axis + 1 :])
        for first in range(self.world_size):
            if first // stride % self.sizes[axis] == 0:
                yield [first + index * stride for index in range(self.sizes[axis])]

    def nodes_of(self, ranks: list[int]) -> int:
        """How many nodes a group spans."""
        return len({rank // self.devices_per_node for rank in ranks})

    def describe(self) -> list[str]:
        """A table of the dimensions: sizes, one group's ranks, and how many nodes a group spans."""
        rows = [("dimension", "size", "ranks of the first group", "nodes a group spans")]
        for name in DIMENSIONS:
            first = next(self.groups(name))
            shown = ", ".join(map(str, first[:8])) + (", ..." if len(first) > 8 else "")
            rows.append((name, str(len(first)), shown, str(max(map(self.nodes_of, self.groups(name))))))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.pp > 1:
            per_rank = [[self.stage_layers[stage] for stage in self.stages_of(rank)] for rank in range(self.pp)]
            lines.append("layers per pipeline rank: " + ", ".join("+".join(map(str, part)) for part in per_rank))
        return lines


def make_layout(config: Config, world_size: int, first_step: int = 0) -> Layout:
    """The layout of `config` on `world_size` ranks, for its steps from `first_step` on: a run may go on in another.

    Raises `ConfigError` with the arithmetic of what does not fit.
    """
    parallel = config.parallel
    dp_shard = parallel.dp_shard or _remaining_ranks(parallel, world_size)
    sizes = {**{name: getattr(parallel, name) for name in DIMENSIONS}, "dp_shard": dp_shard}
    if math.prod(sizes.values()) != world_size:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"parallel: {product} = {math.prod(sizes.values())} ranks, but {world_size} were started; change one of "
            "them, or set parallel.dp_shard to 0 for all that remain"
        )
    _check_tensor_parallel(config.model, parallel)
    check_context_parallel(config.model, parallel.cp)
    _check_pipeline(config, parallel)
    _check_recompute(parallel)
    layout = Layout(
        **sizes,
        stage_layers=parallel.pipeline_layers or balanced_layers(config.model, num_stages(parallel)),
        v_shaped=parallel.pp > 1 and parallel.pipeline_schedule in V_SHAPED,
        devices_per_node=parallel.devices_per_node,
    )
    _check_data(config, layout, first_step)
    _check_nodes(parallel, layout)
    return layout


def num_stages(parallel: ParallelConfig) -> int:
    """Stages of the whole pipeline, virtual ones included."""
    return parallel.pp * parallel.pipeline_stages_per_rank


def balanced_layers(model: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers per stage so that the heaviest stage is as light as possible, an embedding or head counting by its size.

    Of equally loaded stages later ones get the next layer: early ones hold more micro-batches' activations.
    """
    table = model.vocab_size * model.hidden_size / layer_parameters(model)
    loads = [1.0] * stages
    loads[0] += table
    loads[-1] += table
    layers = [1] * stages
    for _ in range(model.num_layers - stages):
        lightest = min(range(stages), key=lambda stage: (loads[stage], -stage))
        layers[lightest] += 1
        loads[lightest] += 1
    return tuple(layers)


def _remaining_ranks(parallel: ParallelConfig, world_size: int) -> int:
    others = parallel.pp * parallel.dp_replicate * parallel.cp * parallel.tp
    if world_size % others:
        raise ConfigError(
            f"parallel: {world_size} ranks are not a multiple of pp {parallel.pp} x dp_replicate "
            f"{parallel.dp_replicate} x cp {parallel.cp} x tp {parallel.tp} = {others}"
        )
    return world_size // others


def _check_tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    tp = parallel.tp
    if tp == 1:
        return
    for field in ("num_attention_heads", "intermediate_size", "vocab_size"):
        _check_divisible(f"model.{field}", getattr(model, field), "parallel.tp", tp)
    heads = model.num_key_value_heads
    if heads % tp and tp % heads:
        raise ConfigError(
            f"model.num_key_value_heads {heads} can neither be dealt over parallel.tp {tp} ranks nor be shared by "
            "them: one must be a multiple of the other"
        )
    if model.local_filter not in ("none", "two_convolutions", "two_convolutions_norm"):
        raise ConfigError(
            f"model.local_filter {model.local_filter!r} has no tensor-parallel form; set parallel.tp to 1"
        )
    if model.local_filter != "none":
        _check_divisible("half of model.hidden_size", model.hidden_size // 2, "parallel.tp", tp)


def _check_pipeline(config: Config, parallel: ParallelConfig) -> None:
    stages, layers = num_stages(parallel), config.model.num_layers
    schedule, per_rank = parallel.pipeline_schedule, parallel.pipeline_stages_per_rank
    if parallel.pp == 1:
        if per_rank > 1 or parallel.pipeline_layers:
            raise ConfigError("parallel.pipeline_stages_per_rank and pipeline_layers need parallel.pp of at least 2")
        return
    wanted = 1 if schedule == "1f1b" else 2 if schedule in V_SHAPED else max(2, per_rank)
    if per_rank != wanted:
        raise ConfigError(
            f"parallel.pipeline_schedule {schedule!r} needs parallel.pipeline_stages_per_rank {wanted}, got {per_rank}"
        )
    if stages > layers:
        raise ConfigError(
            f"parallel.pp {parallel.pp} x pipeline_stages_per_rank {per_rank} = {stages} stages, but the model has "
            f"only {layers} layers"
        )
    given = parallel.pipeline_layers
    if given and (len(given) != stages or sum(given) != layers or min(given) < 1):
        raise ConfigError(
            f"parallel.pipeline_layers must be {stages} positive numbers with the sum {layers} (model.num_layers), got "
            f"{len(given)} with the sum {sum(given)}: {list(given)}"
        )


def _check_recompute(parallel: ParallelConfig) -> None:
    mode, layers = parallel.recompute.mode, parallel.recompute.layers
    counts = {"mode": 1 if isinstance(mode, str) else len(mode), "layers": len(layers) or 1}
    for field, count in counts.items():
        if count not in (1, parallel.pp):
            raise ConfigError(
                f"parallel.recompute.{field} has {count} entries for parallel.pp {parallel.pp} ranks of a pipeline; "
                "give one for each, or one for all"
            )
    if min(layers, default=0) < 0:
        raise ConfigError(f"parallel.recompute.layers {list(layers)} must not be negative")


def _check_data(config: Config, layout: Layout, first_step: int) -> None:
    micro_batch = config.train.micro_batch_size
    shards = layout.cp * (layout.tp if config.parallel.sequence_parallel else 1)
    for stretch in Schedule(config).stretches(first_step):
        phase = f"phases.{stretch.phase_index}"
        length = stretch.sequence_length
        where = f"{phase}.sequence_length {length} x train.micro_batch_size {micro_batch} ="
        _check_divisible(where, length * micro_batch, "parallel.cp x tp", shards)
        name, unit = f"{phase}.batch_size", micro_batch * layout.dp
        factors = f"train.micro_batch_size {micro_batch} x {layout.dp} data-parallel ranks ="
        _check_divisible(name, stretch.batch_size, factors, unit)
        _check_micro_batches(config, layout, name, stretch.batch_size)


def _check_micro_batches(config: Config, layout: Layout, name: str, batch_size: int) -> None:
    schedule, pp = config.parallel.pipeline_schedule, layout.pp
    count = batch_size // (config.train.micro_batch_size * layout.dp)
    arithmetic = (
        f"{name} {batch_size} / (train.micro_batch_size {config.train.micro_batch_size} x {layout.dp} data-parallel "
        f"ranks) = {count} micro-batches"
    )
    if pp == 1:
        return
    least = {"1f1b": ("parallel.pp", pp), "dualpipe_v": ("2 x parallel.pp", 2 * pp)}
    if schedule in least and count < least[schedule][1]:
        what, number = least[schedule]
        raise ConfigError(f"{arithmetic}, but {schedule!r} needs at least {what} = {number}")
    rounds = max(1, count // pp)  # torch.distributed.pipelining interleaves whole rounds of micro-batches
    if schedule.startswith("interleaved") and count % rounds:
        raise ConfigError(f"{arithmetic}, which {schedule!r} cannot deal over {rounds} rounds; try {rounds * pp}")


def _check_nodes(parallel: ParallelConfig, layout: Layout) -> None:
    if parallel.tp_across_nodes or layout.world_size <= layout.devices_per_node:
        return
    spread = next((group for group in layout.groups("tp") if layout.nodes_of(group) > 1), None)
    if spread:
        raise ConfigError(
            f"parallel.tp {layout.tp} with {layout.devices_per_node} devices per node: ranks {spread[0]} to "
            f"{spread[-1]} would span nodes; choose a tp that divides devices_per_node, or set "
            "parallel.tp_across_nodes to true"
        )


def _check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(f"{name} {value} is not divisible by {divisor_name} {divisor} (remainder {value % divisor})")
