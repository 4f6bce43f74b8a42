"""The memory model: what a layer keeps, to the byte; schedules, sharding, recomputation; Yuan 2.0's figure 3."""

import dataclasses
from typing import Any

import pytest
import torch
from plan_helpers import layout
from torch.autograd.graph import saved_tensors_hooks

from pangu.config import ModelConfig
from pangu.model.rope import rotary_tables
from pangu.model.transformer import Block
from pangu.parallel.layout import Layout
from pangu.plan.activations import layer_bytes
from pangu.plan.frameworks import FRAMEWORKS
from pangu.plan.hardware import load_cluster
from pangu.plan.job import Architecture, Job, architecture_of
from pangu.plan.memory import memory

CLUSTER = load_cluster("atlas_900_a2")
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "num_layers": 1, "num_attention_heads": 4}


def job(model: Architecture, built: Layout, **fields: Any) -> Job:
    return Job(**{"model": model, "layout": built, "sequence_length": 4096, "micro_batch_size": 1,
                  "batch_size": 8 * built.dp, **fields})  # fmt: skip


LLAMA_7B = Architecture(32, 4096, 32, 32, 128, 11008, 32000)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_placement": "pre", "num_key_value_heads": 2},
        {"norm_placement": "depth_scaled_sandwich", "num_key_value_heads": 1},
        {"norm_placement": "sandwich"},
        {"norm_placement": "pre", "local_filter": "two_convolutions_norm"},
    ],
)
def test_a_layers_activations_are_what_autograd_saves(options: dict[str, Any]) -> None:
    config, tokens = ModelConfig(**SIZES, intermediate_size=704, **options), 192
    block = Block(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cos, sin = rotary_tables(torch.arange(tokens), config.head_dim, 1e4)
    shared = {tensor.untyped_storage().data_ptr() for tensor in (cos, sin, *block.parameters())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in shared:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block(hidden, cos, sin, torch.tensor([0, tokens], dtype=torch.int32))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    modelled = layer_bytes(job(architecture_of(config), layout(), sequence_length=tokens), "none")
    assert modelled == pytest.approx(measured, rel=1e-3)


def test_korthikanti_table_2() -> None:
    """GPT-3 175B, s 2048, b 1, tp 8: bytes per layer with dropout, unfused attention."""
    gpt = Architecture(96, 12288, 96, 96, 128, 49152, 51200, gated=False, rms_norm=False, dropout=True)
    plain = job(gpt, layout(tp=8), sequence_length=2048, framework=FRAMEWORKS["megatron-2021"], sequence_parallel=False)
    sbh, scores, t = 2048 * 12288, 5 * 96 * 2048 / 12288, 8
    assert layer_bytes(plain, "none") == pytest.approx(sbh * (10 + 24 / t + scores / t))
    assert layer_bytes(plain, "selective") == pytest.approx(sbh * (10 + 24 / t))
    assert layer_bytes(plain, "full") == pytest.approx(sbh * 2)
    sharded = dataclasses.replace(plain, sequence_parallel=True)
    assert layer_bytes(sharded, "none") == pytest.approx(sbh * (34 + scores) / t)
    assert layer_bytes(sharded, "selective") == pytest.approx(sbh * 34 / t)


def test_selective_recomputation_drops_norms_and_the_activation() -> None:
    at = job(LLAMA_7B, layout((32,)))
    dropped = layer_bytes(at, "none") - layer_bytes(at, "selective")
    assert dropped == 4096 * 2 * (2 * 4096 + 11008)  # tokens, bytes, two norms' outputs and SwiGLU's


@pytest.mark.parametrize(
    ("schedule", "chunks", "held"),
    [
        ("1f1b", 1, [4, 3, 2, 1]),
        ("zb-1p", 1, [4, 4, 4, 4]),
        ("zb-2p", 1, [7, 7, 7, 7]),
        ("interleaved_1f1b", 2, [11, 9, 7, 5]),
    ],
)
def test_micro_batches_in_flight_follow_the_schedule(schedule: str, chunks: int, held: list[int]) -> None:
    """Of the ranks' layers; interleaved, rank r of p starts 2 (p - r - 1) + (v - 1) p + 1 passes ahead."""
    stages = (8 // chunks,) * (4 * chunks)
    at = job(LLAMA_7B, layout(stages, pp=4), batch_size=16, schedule=schedule, framework=FRAMEWORKS["mindspeed"])
    expected = [count * 8 // chunks * layer_bytes(at, "none") for count in held]
    assert [rank.activations for rank in memory(at, CLUSTER)] == pytest.approx(expected)


def test_figure_3_of_yuan_2() -> None:
    """24 layers of 6144 on 8 stages, activations checkpointed: fewer layers where more micro-batches are in flight.

    The figure has 78 GB on stage 1 of the uniform split, the fullest, and 56 GB of the other: what is saved there are 8
    layer inputs and the state of 1 layer. The cross-entropy is block-wise, as in the paper's method.
    """
    model = Architecture(24, 6144, 48, 48, 128, 24576, 135_040, tied=True)

    def ranks(*split: int) -> Any:
        yuan = dataclasses.replace(FRAMEWORKS["mindspeed"], loss_bytes=(0, 0), embedding_gradient_bytes=0)
        at = job(model, layout(split, pp=8), sequence_length=8192, micro_batch_size=8, batch_size=512,
                 recompute=("full",), zero_stage=0, framework=yuan)  # fmt: skip
        inputs = layer_bytes(at, "full")
        return inputs, memory(at, CLUSTER)

    inputs, uniform = ranks(*[3] * 8)
    assert [round(rank.activations / inputs) for rank in uniform] == [24, 21, 18, 15, 12, 9, 6, 3]
    _, balanced = ranks(2, 2, 3, 3, 4, 4, 4, 2)
    assert [round(rank.activations / inputs) for rank in balanced] == [16, 14, 18, 15, 16, 12, 8, 2]
    assert max(range(8), key=lambda rank: uniform[rank].total) == 0
    layer = 18 * (4 * 6144**2 + 3 * 6144 * 24576 + 2 * 6144)
    saved = uniform[0].allocated - balanced[0].allocated
    assert saved == pytest.approx(8 * inputs + layer, rel=1e-6)
    assert max(r.total for r in balanced) < max(r.total for r in uniform)


@pytest.mark.parametrize(("stage", "bytes_per_parameter"), [(1, 4 / 8 + 2 + 4 + 8 / 8), (2, 4 / 8 + 2 + 4 / 8 + 8 / 8)])
def test_zero_shards_what_its_stage_says(stage: int, bytes_per_parameter: float) -> None:
    """fp32 master weights, moments and reduced gradients sharded over 8; gathered bf16 weights; ZeRO 1 keeps whole
    gradients in fp32 between micro-batches."""
    (rank,) = memory(job(LLAMA_7B, layout((32,), dp_shard=8), zero_stage=stage, batch_size=64), CLUSTER)
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert rank.weights + rank.gradients + rank.optimizer == pytest.approx(bytes_per_parameter * parameters)
    assert rank.static == pytest.approx(12 / 8 * parameters)


def test_zero_3_gathers_layers_one_by_one() -> None:
    at = job(LLAMA_7B, layout((32,), dp_shard=8), batch_size=64)
    (two,), (three,) = (memory(dataclasses.replace(at, zero_stage=stage), CLUSTER) for stage in (2, 3))
    layers = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert two.weights - three.weights == pytest.approx(layers)
    assert three.workspace + three.logits > two.workspace + two.logits


def test_megatrons_distributed_optimizer_is_6_plus_12_over_d() -> None:
    at = job(LLAMA_7B, layout((32,), dp_shard=4), framework=FRAMEWORKS["megatron-core"], batch_size=32)
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert memory(at, CLUSTER)[0].static == pytest.approx((6 + 12 / 4) * parameters)


def test_every_communicator_has_a_buffer() -> None:
    one, many = job(LLAMA_7B, layout((32,))), job(LLAMA_7B, layout((16, 16), tp=2, pp=2, dp_shard=2), batch_size=16)
    small, large = (memory(at, CLUSTER)[0].communication for at in (one, many))
    assert (small, large) == (200 * 2**20, 4 * 200 * 2**20)  # the world; and tp, pp, dp


def test_the_first_step_has_no_moments_during_its_passes() -> None:
    at = job(LLAMA_7B, layout((32,)), framework=FRAMEWORKS["mindspeed"])
    (rank,) = memory(at, CLUSTER)
    assert rank.moments == pytest.approx(rank.optimizer * 8 / 12)
    assert rank.first_step == max(rank.static, rank.allocated - rank.moments)
