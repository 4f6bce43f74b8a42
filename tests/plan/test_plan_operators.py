"""Costs of single operators: shapes of matmuls, links of collectives, what overlaps."""

import dataclasses
from typing import Any

import pytest
from plan_helpers import layout

from pangu.plan.frameworks import FRAMEWORKS
from pangu.plan.hardware import Cluster, load_cluster
from pangu.plan.job import Architecture, Job
from pangu.plan.layer import block
from pangu.plan.operators import Operators, alignment

GPT_175B = Architecture(96, 12288, 96, 96, 128, 49152, 51200, gated=False)


def operators(cluster: str = "dgx_a100", model: Architecture = GPT_175B, **fields: Any) -> Operators:
    sizes = fields.pop("sizes", {})
    defaults = {"model": model, "layout": layout((model.num_layers,), **sizes), "sequence_length": 2048}
    return Operators(Job(**{**defaults, "micro_batch_size": 1, "batch_size": 64, **fields}), load_cluster(cluster))


def flat(cluster: Cluster, **values: float) -> Cluster:
    return dataclasses.replace(cluster, efficiency=dataclasses.replace(cluster.efficiency, **values))


def rate(at: Operators, m: float, n: float, k: float) -> float:
    return 2 * m * n * k / at.matmul(m, n, k) / at.peak


def test_a_large_matmul_runs_at_the_sustained_rate() -> None:
    at = operators()
    assert rate(at, 16384, 16384, 16384) == pytest.approx(at.cluster.efficiency.matmul)


def test_tiles_that_do_not_fill_the_last_wave_cost_a_whole_one() -> None:
    """108 cores, tiles of 128 x 256: 96 tiles fill 0.89 of one wave, 128 tiles 0.59 of two."""
    at = operators()
    at = Operators(at.job, flat(at.cluster, matmul=1.0))
    assert at.matmul(4096, 768, 4096) * 2 == pytest.approx(at.matmul(4096, 1024, 4096))
    assert rate(at, 4096, 1024, 4096) == pytest.approx(0.85 * 128 / 216 * 4096 / 4296)


def test_heads_that_divide_badly_cost_what_their_tiles_cost() -> None:
    """14 heads of 128 a rank (112 over tp 8) take as many waves of an A100 as 16 do."""
    at = operators()
    at = Operators(at.job, flat(at.cluster, matmul=1.0))
    assert at.matmul(2048, 14 * 128, 14336) == at.matmul(2048, 16 * 128, 14336)


def test_small_depth_costs_filling_and_memory() -> None:
    at = operators()
    assert rate(at, 8192, 8192, 256) < rate(at, 8192, 8192, 1024) < rate(at, 8192, 8192, 8192)
    at = Operators(at.job, flat(at.cluster, memory=0.1))
    moved = 2 * (8192 * 8 + 8 * 8192 + 8192 * 8192)
    assert at.matmul(8192, 8192, 8) == pytest.approx(at.moving(moved))


def test_rows_that_are_no_whole_lines_are_slower() -> None:
    assert alignment(4096, 1792) == 1
    assert alignment(14400, 1800) < 1
    assert alignment(150) < alignment(1800)


def test_collectives_on_a_full_mesh_are_slower_per_byte_in_small_groups() -> None:
    """An all-gather of n bytes over t ranks moves n / t over one link (HCCL's mesh): the larger, the faster."""
    at = operators("atlas_900_a2")
    size, latency = 2**30, 10e-6
    link = 28e9 * at.cluster.efficiency.intra_node
    for t in (2, 4, 8):
        assert at.gather(t, t, size) - latency == pytest.approx(size / t / link)


def test_collectives_behind_a_switch_are_slower_in_large_groups() -> None:
    at = operators("dgx_a100")
    two, eight = (at.gather(t, t, 2**30) for t in (2, 8))
    assert two < eight < 2 * two


def test_a_group_across_nodes_is_as_fast_as_its_members_ports() -> None:
    at = operators("dgx_a100")
    one, eight = at.gather(64, 1, 2**33), at.gather(64, 8, 2**33)
    assert 7 < one / eight < 8.1
    assert at.gather(64, 8, 2**33, flows=1) == pytest.approx(one, rel=0.01)


def test_tensor_parallelism_on_a_mesh_is_dearest_for_two() -> None:
    """The same layer on 2, 4 and 8 devices of a node: communication shrinks as the group grows."""
    exposed = []
    for t in (2, 4, 8):
        passes = block(operators("atlas_900_a2", sizes={"tp": t}))
        exposed.append(passes.forward.exposed["tp"])
    assert exposed[0] > exposed[1] > exposed[2]


def test_overlap_hides_communication_but_not_all() -> None:
    at = operators("atlas_900_a2", sizes={"tp": 8})
    hidden = Operators(
        dataclasses.replace(at.job, overlap=dataclasses.replace(at.job.overlap, tensor=True)), at.cluster
    )
    plain, overlapped = block(at).forward, block(hidden).forward
    assert overlapped.compute == plain.compute
    assert 0 < overlapped.exposed["tp"] < plain.exposed["tp"]
    assert overlapped.exposed["tp"] + overlapped.hidden["tp"] == pytest.approx(plain.exposed["tp"])


def test_unfused_attention_moves_its_scores_and_computes_above_the_diagonal() -> None:
    fused = operators(sequence_length=8192)
    framework = dataclasses.replace(fused.job.framework, fused_attention=False)
    unfused = Operators(dataclasses.replace(fused.job, framework=framework), fused.cluster)
    scores = 96 * 8192**2
    slower = block(unfused).forward.compute - block(fused).forward.compute
    assert slower > fused.moving(8 * scores) * 0.5


def test_layer_times_of_korthikanti_table_4() -> None:
    """22B layer on 8 A100, milliseconds: a single layer, outside any pipeline, within a tenth."""
    model = Architecture(1, 6144, 64, 64, 96, 24576, 51200, gated=False, rms_norm=False, dropout=True)
    at = operators(model=model, sizes={"tp": 8}, micro_batch_size=4, sequence_parallel=False, precision="fp16",
                   framework=FRAMEWORKS["megatron-2021"])  # fmt: skip
    passes, host = block(at), at.cluster.efficiency.operator_us * 1e-6
    assert passes.forward.seconds(host) * 1e3 == pytest.approx(7.7, rel=0.1)
    backward = passes.backward_input.seconds(host) + passes.backward_weight.seconds(host)
    assert backward * 1e3 == pytest.approx(11.9, rel=0.1)
