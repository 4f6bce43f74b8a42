"""The simulated pipeline: the library's own order of passes, and the published bubbles to the digit."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining.schedules import Schedule1F1B, get_schedule_class

from pangu.errors import ConfigError
from pangu.plan.simulate import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    Durations,
    Order,
    Timeline,
    schedule_order,
    simulate,
)

CASES = [
    ("1f1b", 4, 1, 4),
    ("1f1b", 8, 1, 16),
    ("interleaved_1f1b", 4, 2, 8),
    ("interleaved_1f1b", 4, 3, 10),
    ("interleaved_1f1b", 8, 6, 16),
    ("interleaved_zero_bubble", 4, 2, 8),
    ("interleaved_zero_bubble", 8, 6, 16),
    ("zero_bubble_v", 4, 2, 4),
    ("zero_bubble_v", 8, 2, 24),
    ("dualpipe_v", 4, 2, 12),
]


def even(order: Order, forward: int = 1, backward_input: int = 1, backward_weight: int = 1, send: int = 0) -> Timeline:
    stages = order.num_stages
    return simulate(
        order,
        Durations(
            [Fraction(forward)] * stages,
            [Fraction(backward_input)] * stages,
            [Fraction(backward_weight)] * stages,
            send=[Fraction(send)] * stages,
        ),
    )


@pytest.mark.parametrize("pp", [2, 8])
@pytest.mark.parametrize("micro_batches", [8, 16, 40])
def test_1f1b_bubble_is_the_published_formula(pp: int, micro_batches: int) -> None:
    timeline = even(schedule_order("1f1b", pp, 1, micro_batches))
    assert timeline.bubble_of_step == Fraction(pp - 1, pp - 1 + micro_batches)
    assert timeline.bubble_of_ideal == Fraction(pp - 1, micro_batches)


def test_pangu_ultra_bubbles() -> None:
    """Report, section 4.2: 30.45% (7/23 = 30.43%) and, with six virtual stages, 6.8%."""
    assert even(schedule_order("1f1b", 8, 1, 16)).bubble_of_step == Fraction(7, 23)
    assert even(schedule_order("interleaved_1f1b", 8, 6, 16)).bubble_of_step == Fraction(7, 103)


@pytest.mark.parametrize(
    ("schedule", "pp", "micro_batches"),
    [
        (name, pp, m)
        for name in ("interleaved_zero_bubble", "zero_bubble_v", "dualpipe_v")
        for pp, m in ((4, 16), (8, 32))
    ],
)
def test_zero_bubble_schedules_idle_only_while_they_fill(schedule: str, pp: int, micro_batches: int) -> None:
    """Zero Bubble (2401.10241): with equal times of forward, input gradient and weight gradient, and two stages a rank,
    what is left is one forward pass per rank but the first, of 3 x 2 passes per micro-batch."""
    timeline = even(schedule_order(schedule, pp, 2, micro_batches))
    assert timeline.bubble_of_ideal == Fraction(pp - 1, 6 * micro_batches)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_is_the_librarys(case: tuple[str, int, int, int]) -> None:
    """Every rank's actions equal those of the library's schedule built with real stage bookkeeping."""
    schedule, pp, _, micro_batches = case
    order = schedule_order(*case)
    names = {"F": FORWARD, "B": BACKWARD, "I": BACKWARD_INPUT, "W": BACKWARD_WEIGHT}
    for rank in range(pp):
        if schedule == "1f1b":
            executed = run_1f1b(rank, pp, micro_batches)
        else:
            executed = [
                Action(names[part.computation_type.value], part.stage_index, part.microbatch_index)
                for action in library_schedule(*case).pipeline_order_with_comms[rank]
                for part in action.sub_actions or (action,)
                if part.computation_type.value in names
            ]
        assert list(order.ranks[rank]) == executed


def library_schedule(schedule: str, pp: int, per_rank: int, micro_batches: int):
    name = {
        "interleaved_1f1b": "Interleaved1F1B",
        "interleaved_zero_bubble": "InterleavedZeroBubble",
        "zero_bubble_v": "ZBVZeroBubble",
        "dualpipe_v": "DualPipeV",
    }[schedule]
    stages = [
        SimpleNamespace(stage_index=i, num_stages=pp * per_rank, group_size=pp, group_rank=0, submod=None)
        for i in range(per_rank)
    ]
    return get_schedule_class(name)(stages, micro_batches)


def run_1f1b(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """The library's 1F1B run on a stage that only notes what it is asked to compute."""
    executed: list[Action] = []

    class Stage(SimpleNamespace):
        def forward_one_chunk(self, index: int, *_: object, **__: object) -> torch.Tensor:
            executed.append(Action(FORWARD, rank, index))
            return torch.zeros(())

        def backward_one_chunk(self, index: int, **_: object) -> None:
            executed.append(Action(BACKWARD, rank, index))

        def __getattr__(self, name: str):
            if name.startswith("get_") and name.endswith("_ops"):
                return lambda index: []
            return lambda *_, **__: None

    stage = Stage(
        stage_index=rank, num_stages=pp, group_size=pp, group_rank=rank, submod=None, is_last=False, is_first=False
    )
    schedule = Schedule1F1B(stage, micro_batches)
    schedule._initialize_stage = lambda *_: None  # type: ignore[method-assign]
    schedule._step_microbatches([()] * micro_batches, [{}] * micro_batches)
    return executed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pass_starts_when_it_may_and_no_later(case: tuple[str, int, int, int]) -> None:
    """Uneven stages: a rank does one thing at a time, and every start is the end of what it waited for."""
    order = schedule_order(*case)
    stages = order.num_stages
    durations = Durations(
        [10 + 3 * (s % 4) for s in range(stages)],
        [11 + 2 * (s % 3) for s in range(stages)],
        [7 + (s % 5) for s in range(stages)],
        send=[2 + s % 2 for s in range(stages)],
        gather=[5] * stages,
        reduce=[9] * stages,
    )
    timeline = simulate(order, durations)
    free = [0] * order.pp
    for step, start, end in zip(order.steps, timeline.start, timeline.end, strict=True):
        possible = {free[step.rank], *(stop for _, stop in timeline.gathers.values())}
        if step.source >= 0:
            delay = durations.send[step.boundary] if step.boundary >= 0 else 0
            assert start >= timeline.end[step.source] + delay
            possible.add(timeline.end[step.source] + delay)
        if step.gate >= 0:
            assert start >= timeline.gathers[step.gate][1], "parameters are there before a stage's first pass"
        assert start >= free[step.rank]
        assert start in possible
        free[step.rank] = end
    for stage, (start, _) in timeline.reductions.items():
        ends = [stop for _, action, _, stop in timeline.passes() if action.stage == stage and action.kind != FORWARD]
        assert start >= max(ends), "gradients are complete before they are reduced"
    busy = sum(end - start for start, end in zip(timeline.start, timeline.end, strict=True))
    assert busy == sum(timeline.compute_seconds)
    assert busy == case[3] * (sum(durations.forward) + sum(durations.backward_input) + sum(durations.backward_weight))
    assert timeline.seconds > timeline.pipeline_seconds


def test_sends_cost_what_they_delay() -> None:
    """1F1B, p stages, one micro-batch in flight per stage: the first and last micro-batch cross the pipeline once each
    way, and every steady-state period waits for two sends."""
    without, with_sends = (even(schedule_order("1f1b", 4, 1, 4), send=send) for send in (0, 1))
    assert with_sends.seconds > without.seconds + 2 * 3


def test_a_v_shaped_rank_sends_nothing_to_itself() -> None:
    order = schedule_order("zero_bubble_v", 2, 2, 4)
    only_turn = Durations([1] * 4, [1] * 4, [1] * 4, send=[0, 100, 0])
    assert simulate(order, only_turn).seconds == even(order).seconds


def peak(order: Order, rank: int, stage_sizes: list[int]) -> int:
    """Most a rank holds when a micro-batch takes `stage_sizes[s]` until its (weight) gradient is done on stage s."""
    sizes = [stage_sizes[stage] for stage in order.stages_of(rank)]
    return int((order.moments[rank].held[:, :, :2].sum(2) @ sizes).max())


@pytest.mark.parametrize(("pp", "micro_batches"), [(4, 8), (8, 16)])
def test_1f1b_holds_p_minus_i_micro_batches(pp: int, micro_batches: int) -> None:
    order = schedule_order("1f1b", pp, 1, micro_batches)
    assert [peak(order, rank, [1] * pp) for rank in range(pp)] == [pp - rank for rank in range(pp)]


def test_yuans_non_uniform_pipeline_in_flight() -> None:
    """Yuan 2.0, figure 3: layer inputs held per stage for [2,2,3,3,4,4,4,2] over 8 stages."""
    order = schedule_order("1f1b", 8, 1, 16)
    assert [peak(order, r, [2, 2, 3, 3, 4, 4, 4, 2]) for r in range(8)] == [16, 14, 18, 15, 16, 12, 8, 2]
    assert [peak(order, r, [3] * 8) for r in range(8)] == [24, 21, 18, 15, 12, 9, 6, 3]


def test_interleaved_in_flight_is_megatrons() -> None:
    """Korthikanti: rank 0 of interleaved 1F1B holds 1 + (p-1)/(p v) times the layers that 1F1B's does."""
    pp, v = 8, 6
    order = schedule_order("interleaved_1f1b", pp, v, 16)
    assert peak(order, 0, [1] * order.num_stages) == pp * v * (1 + Fraction(pp - 1, pp * v))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_flight_over_time_reaches_the_peak(case: tuple[str, int, int, int]) -> None:
    timeline = even(schedule_order(*case))
    for rank, moments in enumerate(timeline.order.moments):
        seen = {counts for _, counts in timeline.in_flight(rank)}
        assert {tuple(counts) for counts in moments.held[:, :, :2].sum(2).tolist()} <= seen
        assert not any(timeline.in_flight(rank)[-1][1]), "everything is given back at the end"


@pytest.mark.parametrize(
    ("case", "named"),
    [
        (("1f1b", 4, 1, 3), "at least pp = 4 micro-batches, got 3"),
        (("1f1b", 4, 2, 8), "one stage per rank"),
        (("interleaved_1f1b", 4, 2, 9), "multiple of the number of rounds"),
        (("dualpipe_v", 4, 2, 4), "at least as many microbatches"),
        (("gpipe", 4, 1, 8), "gpipe"),
    ],
)
def test_what_the_library_refuses_is_refused(case: tuple[str, int, int, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        schedule_order(*case)
