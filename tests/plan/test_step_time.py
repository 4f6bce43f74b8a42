"""The step-time model: bubbles, recomputation, sharding and long sequences where the answer is known."""

import dataclasses
from typing import Any

import pytest
from plan_helpers import layout

from pangu.plan.hardware import load_cluster
from pangu.plan.job import Architecture, Job, Overlap
from pangu.plan.simulate import Durations, simulate
from pangu.plan.time import StepTime, step_time
from pangu.plan.zero_bubble import zero_bubble_order

CLUSTER = load_cluster("atlas_900_a2")
EVEN = Architecture(64, 8192, 64, 8, 128, 28672, 128, tied=True)
"""So small a vocabulary that all stages of a pipeline are alike."""


def time(model: Architecture = EVEN, stages: tuple[int, ...] = (64,), **fields: Any) -> StepTime:
    sizes = fields.pop("sizes", {})
    built = layout(stages, **sizes)
    job = Job(**{"model": model, "layout": built, "sequence_length": 4096, "micro_batch_size": 1,
                 "batch_size": 16 * built.dp, **fields})  # fmt: skip
    return step_time(job, CLUSTER)


@pytest.mark.parametrize(
    ("schedule", "chunks", "fraction"),
    [("1f1b", 1, 7 / 23), ("interleaved_1f1b", 4, 7 / (7 + 4 * 16))],
)
def test_the_bubble_of_even_stages(schedule: str, chunks: int, fraction: float) -> None:
    """(p-1)/(p-1+vm) of the step, p 8, m 16. Sends add a little."""
    at = time(stages=(8 // chunks,) * (8 * chunks), sizes={"pp": 8}, schedule=schedule)
    assert fraction - 0.01 <= at.bubble <= fraction + 0.05
    assert at.bubble_over_ideal == pytest.approx(at.bubble / (1 - at.bubble))


@pytest.mark.parametrize(("schedule", "idle"), [("zb-1p", 9), ("zb-2p", 7)])
def test_zero_bubble_schedules_of_equal_passes(schedule: str, idle: int) -> None:
    """p 8, m 24: 72 units of work, a ramp of at least 7; in ZB-2p no rank is idle between its first and last pass."""
    order = zero_bubble_order(schedule, 24, ((1.0, 1.0, 1.0),) * 8)
    timeline = simulate(order, Durations([1.0] * 8, [1.0] * 8, [1.0] * 8))
    assert timeline.seconds == 3 * 24 + idle
    spans = [
        max(end for step, end in zip(order.steps, timeline.end, strict=True) if step.rank == rank)
        - min(start for step, start in zip(order.steps, timeline.start, strict=True) if step.rank == rank)
        for rank in range(8)
    ]
    assert schedule == "zb-1p" or spans == [72.0] * 8


def test_many_micro_batches_are_extrapolated_from_few() -> None:
    """Between 1F1B's ramps a pipeline with the head on its last stage is as slow as that stage."""
    model = dataclasses.replace(EVEN, vocab_size=152_064)
    few, many = (time(model, (16,) * 4, sizes={"pp": 4, "tp": 8}, batch_size=m) for m in (32, 512))
    slowest = max(stage.total for stage in many.stages)
    assert many.pipeline - few.pipeline == pytest.approx(480 * slowest, rel=1e-3)


def test_full_recomputation_adds_a_forward_pass() -> None:
    plain, full = time(), time(recompute=("full",))
    again = full.stages[0].backward_input - plain.stages[0].backward_input
    assert again == pytest.approx(plain.stages[0].forward, rel=0.01)
    assert 1.28 < full.pipeline / plain.pipeline < 1.36
    assert plain.step < time(recompute=("selective",)).step < full.step


def test_block_recomputation_holds_for_the_first_layers_only() -> None:
    plain, half, full = time(), time(recompute=("full",), recompute_layers=(32,)), time(recompute=("full",))
    assert half.pipeline - plain.pipeline == pytest.approx((full.pipeline - plain.pipeline) / 2, rel=1e-6)


def test_attention_grows_with_the_square_of_the_sequence() -> None:
    short, long = (time(sequence_length=s, batch_size=2**21 // s) for s in (4096, 131072))
    attention = 12 * 64 * 64 * 128 * (131072 - 4096) / 2 * 2**21  # FLOPs more, causal
    peak = CLUSTER.chip.peak_flops("bf16")
    assert attention / peak < long.step - short.step < 4 * attention / peak


def test_gradients_are_hidden_behind_the_last_backward_pass_only() -> None:
    apart, beside = (
        time(sizes={"dp_shard": 16, "tp": 8}, overlap=Overlap(gradients=on, parameters=on)) for on in (False, True)
    )
    assert beside.exposed["dp"] < apart.exposed["dp"]
    assert beside.hidden["dp"] + beside.exposed["dp"] == pytest.approx(apart.exposed["dp"])
    assert beside.step == pytest.approx(apart.step - beside.hidden["dp"])


def test_zero_2_reduces_every_micro_batch_and_zero_3_gathers_every_layer() -> None:
    one, two, three = (time(sizes={"dp_shard": 16}, zero_stage=stage) for stage in (1, 2, 3))

    def moved(at: StepTime) -> float:
        return at.exposed["dp"] + at.hidden["dp"]

    assert moved(one) < moved(two) < moved(three)


def test_context_parallelism_divides_the_work_and_passes_keys_around() -> None:
    one, four = (time(sequence_length=32768, batch_size=4, sizes={"cp": c}) for c in (1, 4))
    assert 0.25 < four.pipeline / one.pipeline < 0.35
    assert four.exposed["cp"] + four.hidden["cp"] > 0
    assert "cp" not in one.exposed


def test_a_v_shaped_pipeline_is_simulated_with_both_stages_of_a_rank() -> None:
    """Rank 0 of a V has the first and the last stage, so that the head's time is where the embedding's is."""
    v_shaped = dataclasses.replace(layout((8,) * 8, pp=4, tp=8), v_shaped=True)
    job = Job(EVEN, v_shaped, 4096, 1, 16, schedule="zero_bubble_v")
    one_f_one_b = time(stages=(16,) * 4, sizes={"pp": 4, "tp": 8})
    assert step_time(job, CLUSTER).bubble < one_f_one_b.bubble
