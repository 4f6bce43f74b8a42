import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.config import BatchSizeStep, Config, DataConfig, ModelConfig, PhaseConfig, TrainConfig
from pangu.data.schedule import Schedule

MODEL = ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_attention_heads=2, intermediate_size=8)


def schedule(*phases: PhaseConfig, steps: int | None = None) -> Schedule:
    return Schedule(Config(model=MODEL, data=DataConfig(synthetic=True), phases=phases, train=TrainConfig(steps=steps)))


def phase(tokens: int | None = None, **fields: object) -> PhaseConfig:
    defaults = {"name": "p", "sequence_length": 10, "batch_size": 2, "learning_rate": 1.0}
    return PhaseConfig(tokens=tokens, **(defaults | fields))  # type: ignore[arg-type]


def test_pangu_ultra_step_counts() -> None:
    """Pangu Ultra, section 3.1.3: tokens at which the batch grows, and the steps that follow from them."""
    run = schedule(
        phase(
            7_400_000_000_000,
            sequence_length=4096,
            batch_size=1024,
            batch_size_ramp=(
                BatchSizeStep(tokens=1_200_000_000_000, batch_size=1536),
                BatchSizeStep(tokens=1_900_000_000_000, batch_size=2048),
            ),
        ),
        phase(4_600_000_000_000, sequence_length=4096, batch_size=2048),
        phase(800_000_000_000, sequence_length=8192, batch_size=1536),
    )
    sizes = [1024, 1536, 2048]
    first = [next_step(run, size) for size in sizes] + [run.phase_steps[0]]
    assert [round((b - a) / 1000) for a, b in pairwise(first)] == [286, 111, 656]
    assert round(run.phase_steps[0] / 1e6, 3) == 1.053
    assert round(run.phase_steps[1] / 1e3) == 548
    assert round(run.phase_steps[2] / 1e3, 1) == 63.6
    assert run.at(run.phase_steps[0]).tokens == pytest.approx(7.4e12, rel=1e-6)


def next_step(run: Schedule, batch_size: int) -> int:
    """First step of the first phase with at least this batch size, by bisection."""
    low, high = 0, run.phase_steps[0]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if run.at(middle).batch_size >= batch_size else (middle + 1, high)
    return low


@st.composite
def phases(draw: st.DrawFn) -> tuple[PhaseConfig, ...]:
    count = draw(st.integers(1, 3))
    result = []
    for index in range(count):
        thresholds = sorted(draw(st.sets(st.integers(1, 300), max_size=3)))
        tokens = draw(st.integers(1, 300)) if index < count - 1 else draw(st.none() | st.integers(1, 300))
        result.append(
            phase(
                tokens,
                sequence_length=draw(st.integers(1, 7)),
                batch_size=draw(st.integers(1, 9)),
                batch_size_ramp=tuple(
                    BatchSizeStep(tokens=threshold, batch_size=draw(st.integers(1, 9))) for threshold in thresholds
                ),
            )
        )
    return tuple(result)


@given(phases(), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_closed_form_is_the_walk(phases: tuple[PhaseConfig, ...], steps: int) -> None:
    run = schedule(*phases, steps=steps)
    step = tokens = 0
    walked = []
    for index, phase in enumerate(phases):
        first = step
        phase_tokens = phase_sequences = 0
        while step < steps and (phase.tokens is None or phase_tokens < phase.tokens):
            reached = [ramp.batch_size for ramp in phase.batch_size_ramp if phase_tokens >= ramp.tokens]
            batch_size = reached[-1] if reached else phase.batch_size
            position = run.at(step)
            assert (position.step, position.phase_index, position.phase) == (step, index, phase)
            assert (position.phase_step, position.phase_tokens) == (step - first, phase_tokens)
            assert (position.phase_sequences, position.tokens) == (phase_sequences, tokens)
            assert (position.batch_size, position.sequence_length) == (batch_size, phase.sequence_length)
            step += 1
            phase_tokens += batch_size * phase.sequence_length
            phase_sequences += batch_size
            tokens += batch_size * phase.sequence_length
        walked.append(step - first)
    assert run.total_steps == step
    assert run.phase_steps == tuple(walked)


def test_phase_sequences_do_not_depend_on_the_cut() -> None:
    phases = (phase(100), phase(100, batch_size=3), phase())
    assert schedule(*phases, steps=3).phase_sequences == schedule(*phases, steps=90).phase_sequences == (10, 12, None)


@pytest.mark.parametrize("step", [-1, 5])
def test_steps_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match="outside the run's 5 steps"):
        schedule(phase(100)).at(step)


def rates(run: Schedule) -> list[float]:
    return [run.learning_rate(run.at(step)) for step in range(run.total_steps)]


def test_warm_up_then_constant() -> None:
    assert rates(schedule(phase(warmup_steps=4), steps=6)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_runs_over_the_tokens_after_the_warm_up() -> None:
    ramp = (BatchSizeStep(tokens=80, batch_size=4),)  # steps end at 20, 40, 60, 80, 120, 160 tokens
    run = schedule(phase(160, warmup_steps=2, final_learning_rate=0.5, batch_size_ramp=ramp))
    progress = [(tokens - 40) / 120 for tokens in (60, 80, 120, 160)]
    expected = [0.5, 1.0, *(0.75 + 0.25 * math.cos(math.pi * fraction) for fraction in progress)]
    assert rates(run) == pytest.approx(expected)
    assert rates(run)[-1] == 0.5


def test_each_phase_has_its_own_curve() -> None:
    run = schedule(
        phase(65, final_learning_rate=0.1),
        phase(40, learning_rate=0.1),
        phase(learning_rate=0.1, warmup_steps=2),
        steps=8,
    )
    assert run.phase_steps == (4, 2, 2)
    assert rates(run)[3:] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.1])


def test_cosine_of_an_open_phase_ends_with_the_run() -> None:
    assert rates(schedule(phase(final_learning_rate=0.0), steps=4)) == pytest.approx(
        [(1 + math.cos(math.pi * part)) / 2 for part in (0.25, 0.5, 0.75, 1.0)]
    )


def test_a_cut_does_not_change_the_curve() -> None:
    whole, cut = (schedule(phase(200, final_learning_rate=0.0), steps=steps) for steps in (None, 4))
    assert rates(cut) == rates(whole)[:4]
