"""Event simulation of a pipeline: when every forward and backward pass of every rank starts and ends.

The order of passes on each rank is that of torch.distributed.pipelining, whose schedule classes are asked for their
tables without any process group. Given the order, a step is the longest path through a graph: a pass starts when its
rank is free and its input has arrived, as under the library's asynchronous sends and receives. The time unit is that of
the durations given; whole numbers and fractions stay exact.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pangu.errors import ConfigError
from pangu.parallel.layout import V_SHAPED

FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
KINDS = ("forward", "backward", "backward_input", "backward_weight")
"""Names of the kinds of passes. `backward` is backward_input and backward_weight in one."""

_LIBRARY_NAMES = {
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zero_bubble_v": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: int
    stage: int
    micro_batch: int


class Moments(NamedTuple):
    """What a rank holds after each of its passes, the same twice left out."""

    held: npt.NDArray[np.int64]
    """`[moments, stages of the rank, 4]`: micro-batches whose activations wait for backward; those of which only the
    weights' gradients are to come; 1 while gradients are summed up, from the first that comes to the last; 1 after."""
    at_head: npt.NDArray[np.bool_]
    """`[moments]`: whether the pass was forward through the last stage."""


class _Step(NamedTuple):
    """An action as the simulation reads it. -1: none."""

    rank: int
    duration: int  # kind * num_stages + stage
    source: int  # index of the step whose output this one needs
    boundary: int  # the lower of the two stages between which that output travels
    gate: int  # the stage, for its first forward pass


@dataclass(frozen=True)
class Order:
    """Which rank does what, one after the other."""

    schedule: str
    pp: int
    stages_per_rank: int
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return self.pp * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        if self.schedule in V_SHAPED and stage >= self.pp:
            return self.num_stages - 1 - stage
        return stage % self.pp

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """A rank's stages in the model's order."""
        return self._stages[rank]

    @cached_property
    def _stages(self) -> tuple[tuple[int, ...], ...]:
        held: list[list[int]] = [[] for _ in range(self.pp)]
        for stage in range(self.num_stages):
            held[self.rank_of(stage)].append(stage)
        return tuple(map(tuple, held))

    @cached_property
    def steps(self) -> tuple[_Step, ...]:
        """All actions, each after what it waits for. Raises `ConfigError` when the ranks wait for one another."""
        steps: list[_Step] = []
        done: dict[Action, int] = {}
        position = [0] * self.pp
        total = sum(map(len, self.ranks))
        while len(steps) < total:
            before = len(steps)
            for rank, actions in enumerate(self.ranks):
                while position[rank] < len(actions):
                    action = actions[position[rank]]
                    sources = self._sources(action)
                    source = next((done[wanted] for wanted in sources if wanted in done), -1)
                    if sources and source < 0:
                        break
                    steps.append(self._step(rank, action, source))
                    done[action] = len(steps) - 1
                    position[rank] += 1
            if len(steps) == before:
                raise ConfigError(f"schedule {self.schedule!r}: ranks wait for one another at {position}")
        return tuple(steps)

    @cached_property
    def moments(self) -> tuple[Moments, ...]:
        """Per rank. They do not depend on durations: they follow from the rank's order alone."""
        return tuple(
            _moments(actions, self.stages_of(rank), self.num_stages - 1) for rank, actions in enumerate(self.ranks)
        )

    def _sources(self, action: Action) -> list[Action]:
        """What must have ended before: any one of these, on another stage or on this one."""
        kind, stage, micro_batch = action
        if kind == FORWARD:
            return [Action(FORWARD, stage - 1, micro_batch)] if stage else []
        if kind == BACKWARD_WEIGHT:
            return [Action(BACKWARD_INPUT, stage, micro_batch)]
        if stage == self.num_stages - 1:
            return [Action(FORWARD, stage, micro_batch)]
        return [Action(other, stage + 1, micro_batch) for other in (BACKWARD, BACKWARD_INPUT)]

    def _step(self, rank: int, action: Action, source: int) -> _Step:
        kind, stage, micro_batch = action
        boundary = -1
        if kind == FORWARD:
            boundary = stage - 1
        elif kind in (BACKWARD, BACKWARD_INPUT) and stage < self.num_stages - 1:
            boundary = stage
        if boundary >= 0 and self.rank_of(boundary) == self.rank_of(boundary + 1):
            boundary = -1
        gate = stage if kind == FORWARD and micro_batch == 0 else -1
        return _Step(rank, kind * self.num_stages + stage, source, boundary, gate)


@lru_cache(maxsize=512)
def schedule_order(schedule: str, pp: int, stages_per_rank: int, micro_batches: int) -> Order:
    """The order in which torch.distributed.pipelining runs `micro_batches` through pp x stages_per_rank stages.

    `schedule` is a value of parallel.pipeline_schedule. Raises `ConfigError` for what the library refuses.
    """
    if pp == 1 or schedule == "1f1b":
        if stages_per_rank != 1:
            raise ConfigError(f"pipeline schedule '1f1b' has one stage per rank, got {stages_per_rank}")
        if micro_batches < pp:
            raise ConfigError(f"pipeline schedule '1f1b' needs at least pp = {pp} micro-batches, got {micro_batches}")
        return one_forward_one_backward(pp, micro_batches)
    if schedule not in _LIBRARY_NAMES:
        raise ConfigError(f"unknown pipeline schedule {schedule!r}; one of: 1f1b, {', '.join(_LIBRARY_NAMES)}")
    ranks = _library_order(_LIBRARY_NAMES[schedule], pp, stages_per_rank, micro_batches)
    return Order(schedule, pp, stages_per_rank, micro_batches, tuple(map(tuple, ranks)))


def one_forward_one_backward(pp: int, micro_batches: int) -> Order:
    """1F1B of any number of micro-batches: Megatron and DeepSpeed also run fewer than there are ranks."""
    ranks = [tuple(_one_forward_one_backward(rank, pp, micro_batches)) for rank in range(pp)]
    return Order("1f1b", pp, 1, micro_batches, tuple(ranks))


def _one_forward_one_backward(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """What Schedule1F1B executes: the table it can print numbers the last rank's forward passes from 1."""
    ahead = min(pp - 1 - rank, micro_batches)
    actions = [Action(FORWARD, rank, index) for index in range(ahead)]
    for index in range(micro_batches):
        if index + ahead < micro_batches:
            actions.append(Action(FORWARD, rank, index + ahead))
        actions.append(Action(BACKWARD, rank, index))
    return actions


def _library_order(name: str, pp: int, stages_per_rank: int, micro_batches: int) -> list[list[Action]]:
    from torch.distributed.pipelining.schedules import get_schedule_class

    library_class: Any = get_schedule_class(name)

    class WithoutSends(library_class):
        def _prepare_schedule_with_comms(self, actions: Any, format: str = "compute_only") -> None:
            """The order of computation is all that is asked for."""

    num_stages = pp * stages_per_rank
    stages = [
        SimpleNamespace(stage_index=index, num_stages=num_stages, group_size=pp, group_rank=0, submod=None)
        for index in range(stages_per_rank)
    ]
    try:
        table = WithoutSends(stages, micro_batches).pipeline_order
    except ValueError as error:
        raise ConfigError(f"torch.distributed.pipelining: {error}") from None
    kinds = {"F": FORWARD, "B": BACKWARD, "I": BACKWARD_INPUT, "W": BACKWARD_WEIGHT}

    def flat(actions: Sequence[Any]) -> list[Action]:
        """Overlapped pairs one after the other: so the library's runtime runs them."""
        passes = [part for action in actions if action for part in action.sub_actions or (action,)]
        return [Action(kinds[p.computation_type.value], p.stage_index, p.microbatch_index) for p in passes]

    return [flat(table[rank]) for rank in range(pp)]


def _moments(actions: Sequence[Action], stages: Sequence[int], last_stage: int) -> Moments:
    place = {stage: index for index, stage in enumerate(stages)}
    to_come = Counter(stage for kind, stage, _ in actions if kind in (BACKWARD, BACKWARD_WEIGHT))
    splits = any(kind == BACKWARD_INPUT for kind, *_ in actions)
    held = [[0, 0, 0, 0] for _ in stages]
    seen: dict[tuple[tuple[tuple[int, ...], ...], bool], None] = {}
    for kind, stage, _ in actions:
        counts = held[place[stage]]
        if kind == FORWARD:
            counts[0] += 1
        if splits and kind in (BACKWARD, BACKWARD_INPUT):  # a whole backward pass is one half after the other
            counts[0], counts[1] = counts[0] - 1, counts[1] + 1
            seen[tuple(map(tuple, held)), False] = None
        if kind in (BACKWARD, BACKWARD_WEIGHT):
            counts[splits] -= 1
            to_come[stage] -= 1
            counts[2:] = (1, 0) if to_come[stage] else (0, 1)
        seen[tuple(map(tuple, held)), kind == FORWARD and stage == last_stage] = None
    return Moments(np.array([counts for counts, _ in seen]), np.array([at_head for _, at_head in seen]))


@dataclass(frozen=True)
class Durations:
    """How long each (virtual) stage takes, in the model's order, for one micro-batch.

    Embedding and head are part of the first and the last stage's times, recomputation of backward_input.
    """

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    send: Sequence[float] = ()
    """Of one micro-batch's activations, or their gradients, from stage s to s + 1; empty: nothing. Stages on one rank
    send nothing, whatever is given."""
    gather: Sequence[float] = ()
    """Collectives that must end before a stage's first forward pass (sharded parameters). They run one after the other
    in the model's order from the start of the step, beside other stages' computation."""
    reduce: Sequence[float] = ()
    """Collectives that follow a stage's last backward pass (gradients), beside other stages' computation."""


@dataclass(frozen=True)
class Timeline:
    """Start and end of every pass; `order.steps` and these lists run in parallel."""

    order: Order
    start: list[float]
    end: list[float]
    compute_seconds: list[float]
    """Per rank, all its passes."""
    compute_end: list[float]
    """Per rank, when its last pass ends."""
    finish: list[float]
    """Per rank, when its last gradient collective ends too."""
    gathers: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Per stage, start and end of the collective before its first forward pass."""
    reductions: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Per stage, start and end of the collective after its last backward pass."""

    @property
    def seconds(self) -> float:
        """From the start of the step until every rank has finished."""
        return max(self.finish)

    @property
    def pipeline_seconds(self) -> float:
        """Until every rank has ended its last pass: the step without the tail of gradient collectives."""
        return max(self.compute_end)

    @property
    def ideal_seconds(self) -> float:
        """Of a pipeline without any waiting and with the work dealt evenly over the ranks."""
        return sum(self.compute_seconds) / len(self.compute_seconds)

    @property
    def bubble_of_step(self) -> float:
        """Idle share of the passes' time, all ranks together: (p-1)/(p-1+m) for 1F1B and even stages.

        The convention of the Pangu Ultra report. Uneven stages, waiting for sends and for gathered parameters count.
        """
        return 1 - self.ideal_seconds / self.pipeline_seconds

    @property
    def bubble_of_ideal(self) -> float:
        """Idle time over `ideal_seconds`: (p-1)/m for 1F1B and even stages, Megatron's convention."""
        return self.pipeline_seconds / self.ideal_seconds - 1

    def passes(self) -> Iterator[tuple[int, Action, float, float]]:
        """(rank, action, start, end) of every pass, a rank's in their order."""
        upcoming = [iter(actions) for actions in self.order.ranks]
        for step, start, end in zip(self.order.steps, self.start, self.end, strict=True):
            yield step.rank, next(upcoming[step.rank]), start, end

    def in_flight(self, rank: int) -> list[tuple[float, tuple[int, ...]]]:
        """(time, micro-batches whose activations each of the rank's stages holds) at every change."""
        held = dict.fromkeys(self.order.stages_of(rank), 0)
        moments: list[tuple[float, tuple[int, ...]]] = []
        for at, (kind, stage, _), start, end in self.passes():
            if at == rank and kind != BACKWARD_INPUT:
                held[stage] += 1 if kind == FORWARD else -1
                moments.append((start if kind == FORWARD else end, tuple(held.values())))
        return moments


def simulate(order: Order, durations: Durations) -> Timeline:
    """Run `order` once. Costs well under a microsecond per pass."""
    num_stages = order.num_stages
    forward, first, second = durations.forward, durations.backward_input, durations.backward_weight
    for name in ("forward", "backward_input", "backward_weight"):
        if len(getattr(durations, name)) != num_stages:
            raise ValueError(f"durations.{name} has {len(getattr(durations, name))} numbers for {num_stages} stages")
    seconds = [*forward, *(a + b for a, b in zip(first, second, strict=True)), *first, *second]
    sends = [*(durations.send or [0] * num_stages)][:num_stages]
    sends[-1] = 0  # index -1: nothing is sent
    gathers = _gathers(order, durations.gather)
    gates = [gathers[stage][1] if stage in gathers else 0 for stage in range(num_stages)] + [0]
    clock: list[float] = [0] * order.pp
    start: list[float] = []
    end: list[float] = []
    for rank, duration, source, boundary, gate in order.steps:
        begin = clock[rank]
        if source >= 0:
            arrival = end[source] + sends[boundary]
            if arrival > begin:
                begin = arrival
        if gates[gate] > begin:
            begin = gates[gate]
        start.append(begin)
        begin += seconds[duration]
        end.append(begin)
        clock[rank] = begin
    compute: list[float] = [0] * order.pp
    for stage in range(num_stages):
        compute[order.rank_of(stage)] += order.micro_batches * (forward[stage] + first[stage] + second[stage])
    reductions = _reductions(order, end, durations.reduce)
    finish = list(clock)
    for stage, (_, stop) in reductions.items():
        finish[order.rank_of(stage)] = max(finish[order.rank_of(stage)], stop)
    return Timeline(order, start, end, compute, clock, finish, gathers, reductions)


def _gathers(order: Order, seconds: Sequence[float]) -> dict[int, tuple[float, float]]:
    intervals: dict[int, tuple[float, float]] = {}
    clock: dict[int, float] = defaultdict(int)
    for stage, duration in enumerate(seconds):
        rank = order.rank_of(stage)
        intervals[stage] = clock[rank], clock[rank] + duration
        clock[rank] += duration
    return intervals


def _reductions(order: Order, end: Sequence[float], seconds: Sequence[float]) -> dict[int, tuple[float, float]]:
    if not seconds:
        return {}
    last: dict[int, float] = {}
    for step, moment in zip(order.steps, end, strict=True):
        last[step.duration % order.num_stages] = moment  # a stage's passes come in the order of time
    intervals: dict[int, tuple[float, float]] = {}
    clock: dict[int, float] = defaultdict(int)
    for stage, moment in sorted(last.items(), key=lambda item: item[1]):
        rank = order.rank_of(stage)
        begin = max(clock[rank], moment)
        intervals[stage] = begin, begin + seconds[stage]
        clock[rank] = intervals[stage][1]
    return intervals
