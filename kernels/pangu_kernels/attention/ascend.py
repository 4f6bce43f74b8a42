"""Attention on the NPU by npu_fusion_attention (aclnnFlashAttentionVarLenScoreV4 and its gradient) on packed documents.

The kernels give each row's largest score and sum of exponentials, eight times each, and want them in backward; we keep
their logsumexp, and hand it back as the largest score beside a sum of 1: exp(score - logsumexp) / 1 is the probability.
That holds for statistics over more keys than these too, which ring attention passes.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pangu_kernels.ascend_support import fusible, warn_unfused
from pangu_kernels.attention import reference
from pangu_kernels.attention.documents import Run, document_runs

# Documented limits of torch_npu 2.13 for the layout TND.
MAX_HEAD_DIM = 768
MAX_HEADS = 256
MAX_TOKENS = 2**20
MAX_DOCUMENTS = 1024
_STATISTICS_COPIES = 8


@dataclass(slots=True)
class _Call:
    """Adjacent documents, each with queries and keys, and where each ends, counted from the first one's start."""

    q_start: int
    k_start: int
    q_ends: list[int]
    k_ends: list[int]

    def queries(self, x: Tensor) -> Tensor:
        return x.narrow(0, self.q_start, self.q_ends[-1])

    def keys(self, x: Tensor) -> Tensor:
        return x.narrow(0, self.k_start, self.k_ends[-1])


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    runs = document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal)
    if not _fusible(q, runs):
        return reference.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)
    calls = _calls(runs)
    results = (_forward_call(call, q, k, v, scale, causal) for call in calls)
    if _is_all(calls, q, k):
        return next(results)
    out, logsumexp = q.new_zeros(q.shape), q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    for call, (call_out, call_logsumexp) in zip(calls, results, strict=True):
        call.queries(out).copy_(call_out)
        call.queries(logsumexp).copy_(call_logsumexp)
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
    runs = document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal)
    if not _fusible(q, runs):
        return reference.backward(d_out, q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, scale, causal)
    calls = _calls(runs)
    results = (_backward_call(call, d_out, q, k, v, out, logsumexp, scale, causal) for call in calls)
    if _is_all(calls, q, k):
        return next(results)
    d_q, d_k, d_v = (x.new_zeros(x.shape) for x in (q, k, v))
    for call, (call_d_q, call_d_k, call_d_v) in zip(calls, results, strict=True):
        call.queries(d_q).copy_(call_d_q)
        call.keys(d_k).copy_(call_d_k)
        call.keys(d_v).copy_(call_d_v)
    return d_q, d_k, d_v


def _forward_call(call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, largest, total, *_ = torch.ops.npu.npu_fusion_attention(
        call.queries(q),
        call.keys(k),
        call.keys(v),
        q.shape[1],
        "TND",
        atten_mask=_mask(q.device) if causal else None,  # without one every query sees every key, whatever the mode
        scale=scale,
        actual_seq_qlen=call.q_ends,
        actual_seq_kvlen=call.k_ends,
        sparse_mode=3,
        softmax_layout="TND",  # otherwise the statistics of each document lie [heads, tokens], whatever their shape
    )
    return out, largest[..., 0] + total[..., 0].log()


def _backward_call(
    call: _Call,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    largest = call.queries(logsumexp).unsqueeze(-1).expand(-1, -1, _STATISTICS_COPIES).contiguous()
    d_q, d_k, d_v, *_ = torch.ops.npu.npu_fusion_attention_grad(
        call.queries(q),
        call.keys(k),
        call.keys(v),
        call.queries(d_out),
        q.shape[1],
        "TND",
        atten_mask=_mask(q.device) if causal else None,
        softmax_max=largest,
        softmax_sum=torch.ones_like(largest),
        attention_in=call.queries(out),
        scale_value=scale,
        actual_seq_qlen=call.q_ends,
        actual_seq_kvlen=call.k_ends,
        sparse_mode=3,
        softmax_layout="TND",
    )
    return d_q, d_k, d_v


def _fusible(q: Tensor, runs: list[Run]) -> bool:
    _, heads, head_dim = q.shape
    longest = max((max(run.q_length, run.k_length) for run in runs), default=0)
    for value, limit, what in (
        (head_dim, MAX_HEAD_DIM, "a head dimension of"),
        (heads, MAX_HEADS, "a number of heads of"),
        (longest, MAX_TOKENS, "a document length of"),
    ):
        if value > limit:
            warn_unfused("attention", f"q or k has {what} {value}, the fused one takes up to {limit}")
            return False
    return fusible("attention", q=q)


def _calls(runs: list[Run]) -> list[_Call]:
    """As few as the limits allow. Documents without queries or without keys have no part in any."""
    calls: list[_Call] = []
    for run in runs:
        if not run.q_length or not run.k_length:
            continue
        for i in range(run.count):
            q_start, k_start = run.q_start + i * run.q_length, run.k_start + i * run.k_length
            if not calls or not _continues(calls[-1], q_start, k_start, run):
                calls.append(_Call(q_start, k_start, [], []))
            calls[-1].q_ends.append(q_start + run.q_length - calls[-1].q_start)
            calls[-1].k_ends.append(k_start + run.k_length - calls[-1].k_start)
    return calls


def _continues(call: _Call, q_start: int, k_start: int, run: Run) -> bool:
    q_tokens, k_tokens = q_start - call.q_start, k_start - call.k_start
    return (
        (q_tokens, k_tokens) == (call.q_ends[-1], call.k_ends[-1])
        and len(call.q_ends) < MAX_DOCUMENTS
        and max(q_tokens + run.q_length, k_tokens + run.k_length) <= MAX_TOKENS
    )


def _is_all(calls: list[_Call], q: Tensor, k: Tensor) -> bool:
    """Whether one call computes everything, so that its results need no copy."""
    return len(calls) == 1 and (calls[0].q_ends[-1], calls[0].k_ends[-1]) == (len(q), len(k))


@functools.cache
def _mask(device: torch.device) -> Tensor:
    """The template that sparse mode 3 wants for causal documents of whatever lengths, 4 MB: True is hidden."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)
