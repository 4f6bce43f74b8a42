"""The search finds what looking at everything finds, and what it finds runs and fits."""

import dataclasses
import math

import pytest
from plan_helpers import cluster_with, small_config

from pangu.errors import ConfigError
from pangu.parallel.layout import make_layout
from pangu.plan.evaluate import Space
from pangu.plan.job import job_of
from pangu.plan.memory import memory
from pangu.plan.report import layer_list, recomputation, terms
from pangu.plan.search import search, smallest_cluster
from pangu.plan.space import FREE, Constraints, parse_layout, shapes
from pangu.plan.time import step_time

DEVICES = 8


def everything(config, cluster, constraints=FREE):  # -> list[Plan]
    space = Space(config, cluster, constraints)
    plans = [space.evaluate(shape) for shape in shapes(config, DEVICES, cluster.node.devices, constraints)]
    return space, [plan for plan in plans if plan and space.accepted(plan)]


@pytest.mark.parametrize("memory_gib", [60.0, 2.0])
def test_finds_what_looking_at_everything_finds(memory_gib: float) -> None:
    """No layout of all is faster than the one found; polishing may beat them all."""
    config, cluster = small_config(), cluster_with(gib=memory_gib)
    space, plans = everything(config, cluster)
    fastest = min(plans, key=lambda plan: plan.time.step)
    found = search(config, cluster, DEVICES)
    assert found.plans[0].time.step <= fastest.time.step * (1 + 1e-9)
    assert found.evaluated < found.considered / 4, "most were never simulated"
    kinds = {space.kind(plan.shape) for plan in plans}
    assert len({space.kind(plan.shape) for plan in found.plans}) == len(found.plans) == min(10, len(kinds))
    assert [plan.time.step for plan in found.plans] == sorted(plan.time.step for plan in found.plans)


def test_estimates_stay_below_what_simulation_finds() -> None:
    """What ends the search: a layout whose estimate is above the plans need not be looked at."""
    config, cluster = small_config(), cluster_with(gib=2.0)
    space, plans = everything(config, cluster)
    assert max(space.estimate_with_memory(plan.shape) / plan.time.step for plan in plans) < 1.02


@pytest.mark.parametrize("memory_gib", [60.0, 2.0])
def test_what_is_found_runs_and_fits(memory_gib: float) -> None:
    config, cluster = small_config(), cluster_with(gib=memory_gib)
    for plan in search(config, cluster, DEVICES).plans:
        configured = plan.configured(config)
        layout = make_layout(configured, DEVICES)
        assert layout == plan.job.layout
        job = job_of(configured, layout)
        assert job == plan.job
        assert max(rank.total for rank in memory(job, cluster)) <= cluster.chip.memory_bytes
        assert step_time(job, cluster).step == plan.time.step
        assert sum(layout.stage_layers) == config.model.num_layers


def test_little_memory_is_met_by_recomputation_and_sharding() -> None:
    config = small_config()
    plenty = search(config, cluster_with(gib=60.0), DEVICES, keep=1).plans[0]
    little = search(config, cluster_with(gib=2.0), DEVICES, keep=1).plans[0]
    assert plenty.largest_memory > 2 * 2**30
    assert little.time.step > plenty.time.step
    assert (
        recomputation(little) != "none"
        or little.shape.zero_stage > 1
        or little.shape.pp * little.shape.tp > (plenty.shape.pp * plenty.shape.tp)
    )


def test_layers_are_uneven_where_the_head_is_heavy() -> None:
    """A vocabulary as large as Pangu Ultra's: the last stage gets fewer layers than the others."""
    config = small_config(vocab_size=153_376, num_layers=24)
    plan = search(config, cluster_with(), DEVICES, parse_layout("tp1,pp4,1f1b"), keep=1).plans[0]
    layers = plan.job.layout.stage_layers
    assert layers[-1] < min(layers[:-1])
    even = dataclasses.replace(plan.job, layout=dataclasses.replace(plan.job.layout, stage_layers=(6, 6, 6, 6)))
    assert plan.time.step < step_time(even, plan.cluster).step


def test_terms_add_up_to_the_step() -> None:
    for plan in search(small_config(), cluster_with(gib=2.0), DEVICES).plans:
        assert sum(terms(plan).values()) == pytest.approx(plan.time.step)
        assert all(seconds > -1e-9 * plan.time.step for seconds in terms(plan).values())


def test_constraints_are_kept() -> None:
    config, cluster = small_config(), cluster_with()
    found = search(config, cluster, DEVICES, parse_layout("tp2,pp2,dp2,interleaved_1f1b,v2,mb1,z1,full"))
    (plan,) = found.plans
    assert str(plan.shape) == "tp2,pp2,dp2,v2,mb1,z1,interleaved_1f1b"
    assert plan.job.recompute == ("full",)
    given = search(config, cluster, DEVICES, parse_layout("tp2,pp4,1f1b,1-2-3-2")).plans
    assert {plan.job.layout.stage_layers for plan in given} == {(1, 2, 3, 2)}


def test_smallest_cluster_is_the_smallest() -> None:
    config, cluster = small_config(batch_size=24, num_layers=24), cluster_with(gib=2.0)
    smallest = smallest_cluster(config, cluster, 8)
    assert smallest is not None
    assert smallest > 8
    assert search(config, cluster, smallest, keep=1).plans
    assert not search(config, cluster, smallest - cluster.node.devices, keep=1).plans


def test_one_node_without_a_network_cannot_grow() -> None:
    config = small_config(num_layers=24, hidden_size=2048)
    alone = dataclasses.replace(cluster_with(gib=0.6), network=None)
    assert smallest_cluster(config, alone, 8) is None


def test_impossible_shapes_are_not_considered() -> None:
    config = small_config()
    considered = list(shapes(config, 24, 8, FREE))
    assert considered
    for shape in considered:
        assert shape.world_size == 24
        assert config.phases[0].batch_size % (shape.dp * shape.micro_batch_size) == 0
        assert config.model.num_attention_heads % shape.tp == 0
        assert 8 % shape.tp == 0, "tensor-parallel groups stay inside a node"
    assert not list(shapes(config, 11, 8, FREE)), "no way to deal 16 sequences, 16 heads or 8 layers over 11"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tp8,pp8,dp", "'dp' is not understood"),
        ("tp8,xp2", "'xp2' is not understood"),
        ("tp0", "'tp0' is not understood"),
        ("tp8,tp4", "gives tp twice"),
        ("tp8,recompute", "none | selective | full"),
    ],
)
def test_bad_layouts_are_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_layout(text)
    assert named in str(error.value)


def test_layout_in_short() -> None:
    assert parse_layout("tp8, pp8, dp128, v6") == Constraints(tp=8, pp=8, dp=128, stages_per_rank=6)
    assert parse_layout("cp2,shard4,z3,selective,dualpipe_v,2-2-3") == Constraints(
        cp=2, dp_shard=4, zero_stage=3, recompute="selective", schedule="dualpipe_v", stage_layers=(2, 2, 3)
    )
    assert layer_list([1, 2, 2, 2, 1, 1]) == "1 2x3 1x2"


def test_pangu_ultra_on_its_cluster() -> None:
    """The report's layout is found, fits its 64 GB devices, and takes what a 43% to 52% MFU takes (section 4.2)."""
    from pangu.config import load
    from pangu.plan.commands import one_phase

    config = one_phase(load("pangu_ultra_135b"), "0")
    found = search(config, cluster_with("atlas_800t_a2"), 8192, parse_layout("tp8,pp8,dp128,v6,mb1,interleaved_1f1b"))
    plan = found.plans[0]
    assert plan.job.num_micro_batches == 16
    assert plan.largest_memory < 64e9
    assert 0.40 < plan.mfu < 0.55
    assert math.isclose(plan.tokens_per_second, 2048 * 4096 / plan.time.step)
