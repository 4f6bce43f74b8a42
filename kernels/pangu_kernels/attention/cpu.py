"""Attention on the CPU by PyTorch's flash kernel, which takes strided heads and GQA and returns the logsumexp."""

import torch
from torch import Tensor

from pangu_kernels.attention.documents import Run, document_runs
from pangu_kernels.precision import accumulation_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    outs, logsumexps = [], []
    for run in document_runs(cu_seqlens_q, cu_seqlens_k, q, k):
        if run.q_length:
            causal, mask = _mask(run, q)
            out, logsumexp = _flash(
                run.queries(q), run.keys(k), run.keys(v), 0.0, causal, attn_mask=mask, scale=scale
            )  # [count, Hq, Tq, D], [count, Hq, Tq]
            outs.append(out.transpose(1, 2).flatten(0, 1))
            logsumexps.append(logsumexp.transpose(1, 2).flatten(0, 1))
    no_logsumexp = q.new_empty((0, q.shape[1]), dtype=accumulation_dtype(q.dtype))
    return _joined(outs, q), _joined(logsumexps, no_logsumexp)


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
) -> tuple[Tensor, Tensor, Tensor]:
    d_qs, d_ks, d_vs = [], [], []
    for run in document_runs(cu_seqlens_q, cu_seqlens_k, q, k):
        if run.q_length:
            causal, mask = _mask(run, q)
            d_q, d_k, d_v = _flash_backward(
                run.queries(d_out),
                run.queries(q),
                run.keys(k),
                run.keys(v),
                run.queries(out),
                run.queries(logsumexp.unsqueeze(-1)).squeeze(-1),
                0.0,
                causal,
                attn_mask=mask,
                scale=scale,
            )
            d_qs.append(d_q.transpose(1, 2).flatten(0, 1))
            d_ks.append(d_k.transpose(1, 2).flatten(0, 1))
            d_vs.append(d_v.transpose(1, 2).flatten(0, 1))
        else:  # keys nobody asked
            d_ks.append(k.new_zeros((run.count * run.k_length, *k.shape[1:])))
            d_vs.append(v.new_zeros((run.count * run.k_length, *v.shape[1:])))
    return _joined(d_qs, q), _joined(d_ks, k), _joined(d_vs, v)


def _mask(run: Run, q: Tensor) -> tuple[bool, Tensor | None]:
    """The kernel's arguments is_causal, which aligns top-left, and attn_mask, for fewer queries than keys."""
    if run.q_length == run.k_length:
        return True, None
    if run.q_length == 1:
        return False, None
    mask = q.new_full((run.q_length, run.k_length), float("-inf"))
    return False, mask.triu_(run.k_length - run.q_length + 1)


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    """The pieces end to end; something empty like `like` when there are none."""
    if not pieces:
        return torch.empty_like(like[:0])
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)
