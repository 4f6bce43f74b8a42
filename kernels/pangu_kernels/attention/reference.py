"""Attention inside packed documents by PyTorch operations, with all scores of a run of documents at once.

    scores    = scale * q k^T, causal: -inf where key j > query i + (Tk - Tq) of the same document
    logsumexp = log sum_j exp(scores)
    out       = exp(scores - logsumexp) v

Query head h reads key head h // (Hq / Hkv). fp32 inside, fp64 for fp64.
"""

import torch
from torch import Tensor

from pangu_kernels.attention.documents import Run, document_runs
from pangu_kernels.precision import accumulation_dtype


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(q.shape)
    logsumexp = q.new_full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q.dtype))
    for run in document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal):
        if run.q_length and run.k_length:
            scores = _scores(run, q, k, scale, causal)
            log_total = scores.logsumexp(-1)  # [count, Hq, Tq]
            probabilities = (scores - log_total.unsqueeze(-1)).exp()
            run.queries(out).copy_(probabilities @ _per_query_head(run, v, q))
            run.queries(logsumexp).copy_(log_total)
    return out, logsumexp


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_q, d_k and d_v, of these keys if out and logsumexp are over more of them, by

    P  = exp(scores - logsumexp)                 d_v = P^T d_out
    dS = P * (d_out v^T - sum(d_out * out))      d_q = scale * dS k      d_k = scale * dS^T q
    """
    d_q, d_k, d_v = (x.new_zeros(x.shape) for x in (q, k, v))
    for run in document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal):
        if run.q_length and run.k_length:
            wide_q, wide_out, wide_d_out = (run.queries(x).to(logsumexp.dtype) for x in (q, out, d_out))
            wide_k, wide_v = _per_query_head(run, k, q), _per_query_head(run, v, q)
            probabilities = (_scores(run, q, k, scale, causal) - run.queries(logsumexp).unsqueeze(-1)).exp()
            delta = (wide_d_out * wide_out).sum(-1, keepdim=True)
            d_scores = probabilities * (wide_d_out @ wide_v.mT - delta)
            run.queries(d_q).copy_(scale * d_scores @ wide_k)
            run.keys(d_k).copy_(_per_key_head(scale * d_scores.mT @ wide_q, k))
            run.keys(d_v).copy_(_per_key_head(probabilities.mT @ wide_d_out, v))
    return d_q, d_k, d_v


def _scores(run: Run, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """`[count, Hq, Tq, Tk]`"""
    wide_k = _per_query_head(run, k, q)
    scores = run.queries(q).to(wide_k.dtype) @ wide_k.mT * scale
    if not causal:
        return scores
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(run.k_length - run.q_length)
    return scores.masked_fill(~visible, float("-inf"))


def _per_query_head(run: Run, x: Tensor, q: Tensor) -> Tensor:
    """Keys or values of the run, repeated to one per query head: `[count, Hq, Tk, D]`."""
    return run.keys(x).to(accumulation_dtype(x.dtype)).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _per_key_head(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the query heads of each key head: `[count, Hkv, Tk, D]`."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2)
