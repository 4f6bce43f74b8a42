"""The layouts that `pangu plan` considers, and the short form in which one is written: tp8,pp8,dp128,v6."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pangu.config import Config, ModelConfig, RecomputeConfig
from pangu.errors import ConfigError
from pangu.parallel.layout import V_SHAPED, Layout, make_layout
from pangu.plan.job import Recompute

SCHEDULES = ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zero_bubble_v", "dualpipe_v")
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MOST_STAGES_PER_RANK = 12
"""Virtual stages beyond which sends would dominate; six are the most that a report names (Pangu Ultra)."""

FEWEST_TOKENS = 1024
"""Of a sequence on one context-parallel rank: dealing shorter pieces is considered only when asked for."""

_SHORT_NAMES = {
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "dp": "dp",
    "shard": "dp_shard",
    "v": "stages_per_rank",
    "mb": "micro_batch_size",
    "z": "zero_stage",
}


@dataclass(frozen=True)
class Shape:
    """Everything about a layout but its layer list and its recomputation, which follow from time and memory."""

    tp: int
    cp: int
    pp: int
    dp: int
    dp_shard: int
    schedule: str
    stages_per_rank: int
    micro_batch_size: int
    zero_stage: int

    @property
    def num_stages(self) -> int:
        return self.pp * self.stages_per_rank

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def __str__(self) -> str:
        parts = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}"]
        if self.cp > 1:
            parts.insert(1, f"cp{self.cp}")
        if self.dp_shard != self.dp:
            parts.append(f"shard{self.dp_shard}")
        if self.stages_per_rank > 1:
            parts.append(f"v{self.stages_per_rank}")
        parts += [f"mb{self.micro_batch_size}", f"z{self.zero_stage}"]
        return ",".join(parts if self.pp == 1 else [*parts, self.schedule])

    def layout(self, stage_layers: tuple[int, ...], devices_per_node: int) -> Layout:
        return Layout(
            pp=self.pp,
            dp_replicate=self.dp // self.dp_shard,
            dp_shard=self.dp_shard,
            cp=self.cp,
            tp=self.tp,
            stage_layers=stage_layers,
            v_shaped=self.schedule in V_SHAPED,
            devices_per_node=devices_per_node,
        )


@dataclass(frozen=True)
class Constraints:
    """What `--explain LAYOUT` fixes; None: free."""

    tp: int | frozenset[int] | None = None
    cp: int | None = None
    pp: int | None = None
    dp: int | None = None
    dp_shard: int | None = None
    stages_per_rank: int | None = None
    micro_batch_size: int | None = None
    zero_stage: int | None = None
    schedule: str | None = None
    recompute: Recompute | None = None
    stage_layers: tuple[int, ...] = ()

    def allows(self, name: str, value: object) -> bool:
        wanted = getattr(self, name)
        return wanted is None or (value in wanted if isinstance(wanted, frozenset) else value == wanted)


FREE = Constraints()


def parse_layout(text: str) -> Constraints:
    """`tp8,pp8,dp128,v6` and the like; see docs/planning.md. Raises `ConfigError` naming the part that is wrong."""
    values: dict[str, object] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        number = re.fullmatch(r"([a-z]+)(\d+)", part)
        if number and number[1] in _SHORT_NAMES and int(number[2]) > 0:
            given: tuple[str, object] = (_SHORT_NAMES[number[1]], int(number[2]))
        elif part in SCHEDULES:
            given = "schedule", part
        elif part in ("none", "selective", "full"):
            given = "recompute", part
        elif re.fullmatch(r"\d+(-\d+)+", part):
            given = "stage_layers", tuple(map(int, part.split("-")))
        else:
            raise ConfigError(
                f"layout {text!r}: {part!r} is not understood; parts are tpN, cpN, ppN, dpN, shardN (ranks that share "
                f"optimizer state), vN (stages per rank), mbN (micro-batch), zN (ZeRO), a schedule "
                f"({', '.join(SCHEDULES)}), none | selective | full (recomputation), or layers of every stage such as "
                "2-2-3-3-4-4-4-2"
            )
        if given[0] in values:
            raise ConfigError(f"layout {text!r} gives {given[0]} twice")
        values.update([given])
    return Constraints(**values)  # type: ignore[arg-type]


def shapes(config: Config, world_size: int, devices_per_node: int, constraints: Constraints) -> Iterator[Shape]:
    """Every shape of the first phase of `config` that could run on `world_size` devices, memory aside."""
    phase, model = config.phases[0], config.model
    for tp in _divisors(world_size):
        if not (constraints.allows("tp", tp) and _tensor_parallel(model, tp, devices_per_node)):
            continue
        for cp in _divisors(world_size // tp):
            tokens = phase.sequence_length // cp
            if not constraints.allows("cp", cp) or (cp > 1 and constraints.cp is None and tokens < FEWEST_TOKENS):
                continue
            for pp in _divisors(world_size // (tp * cp)):
                dp = world_size // (tp * cp * pp)
                if pp > model.num_layers or phase.batch_size % dp:
                    continue
                if constraints.allows("pp", pp) and constraints.allows("dp", dp):
                    yield from _pipelines(config, tp, cp, pp, dp, constraints)


def _pipelines(config: Config, tp: int, cp: int, pp: int, dp: int, constraints: Constraints) -> Iterator[Shape]:
    phase = config.phases[0]
    for size in MICRO_BATCH_SIZES:
        tokens = size * phase.sequence_length
        if (phase.batch_size // dp) % size or tokens % (tp * cp) or not constraints.allows("micro_batch_size", size):
            continue
        for schedule, per_rank in _schedules(pp, config.model.num_layers, phase.batch_size // (dp * size)):
            if not (constraints.allows("schedule", schedule) and constraints.allows("stages_per_rank", per_rank)):
                continue
            for zero_stage in (1, 2, 3):
                if constraints.allows("zero_stage", zero_stage):
                    shard = constraints.dp_shard or dp
                    if dp % shard == 0:
                        yield Shape(tp, cp, pp, dp, shard, schedule, per_rank, size, zero_stage)


def _schedules(pp: int, num_layers: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """Schedules and stages per rank that torch.distributed.pipelining accepts for so many micro-batches."""
    if micro_batches >= pp:
        yield "1f1b", 1
    if pp == 1:
        return
    for per_rank in range(2, min(num_layers // pp, MOST_STAGES_PER_RANK) + 1):
        if micro_batches % max(1, micro_batches // pp) == 0:
            yield "interleaved_1f1b", per_rank
            yield "interleaved_zero_bubble", per_rank
        if per_rank == 2:
            yield "zero_bubble_v", 2
            if micro_batches >= 2 * pp:
                yield "dualpipe_v", 2


def _tensor_parallel(model: ModelConfig, tp: int, devices_per_node: int) -> bool:
    heads = model.num_key_value_heads
    whole = all(size % tp == 0 for size in (model.num_attention_heads, model.intermediate_size, model.vocab_size))
    filters = model.local_filter == "none" or (
        model.local_filter.startswith("two_") and model.hidden_size // 2 % tp == 0
    )
    shared = heads % tp == 0 or tp % heads == 0
    return tp == 1 or (devices_per_node % tp == 0 and whole and shared and filters)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def configured(
    config: Config,
    shape: Shape,
    stage_layers: tuple[int, ...],
    recompute: RecomputeConfig,
    devices_per_node: int,
) -> Config:
    """`config` with the layout in its [parallel] section and the micro-batch size in [train].

    Raises `ConfigError` when `pangu train` would refuse it.
    """
    parallel = dataclasses.replace(
        config.parallel,
        pp=shape.pp,
        dp_replicate=shape.dp // shape.dp_shard,
        dp_shard=shape.dp_shard,
        cp=shape.cp,
        tp=shape.tp,
        zero_stage=shape.zero_stage,  # type: ignore[arg-type]
        pipeline_schedule=shape.schedule,  # type: ignore[arg-type]
        pipeline_stages_per_rank=shape.stages_per_rank,
        pipeline_layers=stage_layers if shape.pp > 1 else (),
        devices_per_node=devices_per_node,
        recompute=recompute,
    )
    train = dataclasses.replace(config.train, micro_batch_size=shape.micro_batch_size)
    result = dataclasses.replace(config, parallel=parallel, train=train)
    make_layout(result, shape.world_size)
    return result
