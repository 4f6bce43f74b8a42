"""Bytes that one micro-batch leaves in memory between forward and backward, and the largest temporary ones."""

from pangu.plan.job import Job, Recompute
from pangu.plan.parameters import table_parameters

CHUNK_BYTES = 2**27
"""fp32 logits that `pangu_kernels.linear_cross_entropy` holds at once."""


def layer_bytes(job: Job, mode: Recompute) -> float:
    """Kept by one layer from its forward to its backward pass."""
    if mode == "full":
        return job.element_bytes * job.local_tokens * job.model.hidden_size / job.sequence_shards
    if mode == "every second layer":
        return (layer_bytes(job, "none") + layer_bytes(job, "full")) / 2
    if not job.framework.fused_attention:
        return _unfused(job, mode)
    model, t, framework, size = job.model, job.layout.tp, job.framework, job.element_bytes
    h = model.hidden_size / job.sequence_shards
    query, key, wide = model.query_size / t, job.local_kv_heads * model.head_dim, model.intermediate_size / t
    inner = (2 if model.gated else 1) * wide
    recomputes = mode != "none"
    values = h * (2 + 2 * (not recomputes) + 2 * model.post_norms)  # inputs and outputs of norms
    values += 2 * query + 2 * key  # rotated queries and keys, values, the output
    if framework.keeps_raw_keys:
        values += key
    values += inner + wide * (not recomputes and not job.recomputes_activation)
    if mode == "every second matmul":
        values = _every_second_matmul(job)
    if model.local_filter != "none":
        values += _filter_values(job, recomputes)
    per_token = size * values + framework.statistics_bytes * model.num_attention_heads / t
    per_token += 4 * (4 if model.post_norms else 2) / job.sequence_shards
    if model.dropout:
        per_token += 2 * h
    return job.local_tokens * per_token


def _every_second_matmul(job: Job) -> float:
    """torchtitan's selective "op" policy (parallelize_llama.py): the block's input, the first, third and fifth matmul
    (queries, values, gate), what attention returns and, with tensor parallelism, what is scattered after it. The
    seventh, the block's output, is needed by nothing: a compiled block drops it, an eager one keeps it."""
    model, t, h = job.model, job.layout.tp, job.model.hidden_size / job.sequence_shards
    key, wide = job.local_kv_heads * model.head_dim, model.intermediate_size / t
    return h * (1 + (t > 1) + (not job.framework.compiled)) + 2 * model.query_size / t + key + wide


def _filter_values(job: Job, recomputes: bool) -> float:
    """Of Yuan's filter: between the convolutions, their sum with the input, what its norm returns; values and queries
    have projections of their own."""
    model = job.model
    h = model.hidden_size / job.sequence_shards
    key = job.local_kv_heads * model.head_dim
    return model.hidden_size / 2 / job.layout.tp + h * (1 if recomputes else 2) - key


def _unfused(job: Job, mode: Recompute) -> float:
    """Korthikanti et al. 2022, table 2: s b h (34 + 5 a s / h), of which 10 are not sharded without sequence
    parallelism. Without dropout there are no masks: 5 bytes of 34, and 3 of 5 are not there."""
    model, t = job.model, job.layout.tp
    h, s = model.hidden_size, job.sequence_length
    outside = 10 if model.dropout else 8
    inside = 8 + 16 * model.intermediate_size / (4 * h)
    scores = (5 if model.dropout else 2) * model.num_attention_heads * s / t
    if mode != "none":
        scores = 0.0
    return job.local_tokens * (h * (outside / job.sequence_shards + inside / t) + scores)


def deferred_bytes(job: Job) -> float:
    """Kept by one layer when only the gradients of its weights are to come: the inputs of its linear layers and the
    gradients of their outputs, those of the residual stream's width gathered over tensor-parallel ranks."""
    model, t = job.model, job.layout.tp
    inner = (3 if model.gated else 2) * model.intermediate_size / t
    values = 4 * model.hidden_size + 2 * model.query_size / t + 2 * job.local_kv_heads * model.head_dim + inner
    return job.element_bytes * job.local_tokens * values


def layer_workspace(job: Job, mode: Recompute) -> float:
    """Temporary bytes in a layer's backward pass: gradients of its widest part, gathered tokens, what is recomputed."""
    model, t, size = job.model, job.layout.tp, job.element_bytes
    values = (2 if model.gated else 1) * model.intermediate_size / t + model.hidden_size / job.sequence_shards
    if t > 1 and job.sequence_parallel:
        values += 2 * model.hidden_size  # the input, and its gradient before it is summed and scattered
    again = layer_bytes(job, "none") - layer_bytes(job, mode)
    return size * job.local_tokens * values + (again if mode != "none" else 0.0)


def head_bytes(job: Job) -> tuple[float, float]:
    """Of the last stage's head: kept until its backward pass, and the most beside that while it works.

    A head in chunks computes its gradients with the loss: that of the weight, fp32, is kept.
    """
    model, t, size = job.model, job.layout.tp, job.element_bytes
    tokens, h = job.local_tokens, model.hidden_size
    logits, table = tokens * model.vocab_size / t, table_parameters(job)
    gathered = size * tokens * h * (2 if t > 1 and job.sequence_parallel else 1)
    stream = size * tokens * h / job.sequence_shards
    if job.framework.loss_bytes == (0, 0):
        chunk = min(CHUNK_BYTES, 4 * logits)  # its logits in fp32, and twice in half precision
        return 4 * table + gathered + 2 * size * tokens * h + 2 * stream, 2 * chunk
    forward, backward = job.framework.loss_bytes
    copies = size * table if job.framework.weight_gradient_copies else 0.0
    return 2 * stream, max(forward * logits, backward * logits + copies) + 2 * gathered


def embedding_bytes(job: Job) -> float:
    """Of the first stage's residual stream."""
    return job.element_bytes * job.local_tokens * job.model.hidden_size / job.sequence_shards
