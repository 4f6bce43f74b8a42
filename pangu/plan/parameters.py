"""Parameters of one device, by layer, stage and pipeline rank."""

import math

from pangu.plan.job import Job


def layer_parameters(job: Job) -> float:
    """Of one block on one tensor-parallel rank; norms are on every rank."""
    model, t = job.model, job.layout.tp
    h, query, key_value = model.hidden_size, model.query_size, job.local_kv_heads * t * model.head_dim
    wide = model.intermediate_size * (3 if model.gated else 2)
    sharded = h * (2 * query + 2 * key_value + wide)
    if model.local_filter.startswith("two_convolutions"):
        sharded += 2 * h * h
    norm = h * (1 if model.rms_norm else 2) * (4 if model.post_norms else 2)
    biases = 0.0
    if model.attention_bias:
        biases += (query + 2 * key_value) / t + h
    if model.feed_forward_bias:
        biases += model.intermediate_size * (2 if model.gated else 1) / t + h
    return sharded / t + norm + biases


def table_parameters(job: Job) -> float:
    """Of the embedding, or of the head, on one tensor-parallel rank."""
    return math.ceil(job.model.vocab_size / job.layout.tp) * job.model.hidden_size


def stage_parameters(job: Job, stage: int) -> float:
    """Of one device of a stage, before sharding over data-parallel ranks."""
    layout = job.layout
    total = layout.stage_layers[stage] * layer_parameters(job)
    if stage == 0:
        total += table_parameters(job) + job.model.learned_positions * job.model.hidden_size
    if stage == layout.num_stages - 1:
        total += job.model.hidden_size
        if not job.model.tied or layout.num_stages > 1:
            total += table_parameters(job)
    return total


def rank_parameters(job: Job, pp_rank: int) -> float:
    """Of one device of a pipeline rank, before sharding over data-parallel ranks."""
    return sum(stage_parameters(job, stage) for stage in job.layout.stages_of(pp_rank))
