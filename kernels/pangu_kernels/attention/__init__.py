"""Attention inside packed documents of any length, causal or not, with grouped-query heads (Ainslie et al. 2023)."""

from typing import Any

import torch
from torch import Tensor

from pangu_kernels.attention import ascend, cpu, cuda, reference
from pangu_kernels.checks import check_boundaries, check_operand, check_same_dtype, check_tensor
from pangu_kernels.precision import accumulation_dtype
from pangu_kernels.registration import define, implement

MAX_HEAD_DIM = 1024
"""On every device. Fused kernels take less (768 on Ascend) and leave larger heads to the unfused form, whose memory
grows with the square of the longest document."""
MAX_DOCUMENTS = 65_535
"""On every device: what kernels with a grid dimension for documents can count."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """`softmax(scale * q k^T) v` of every query over the keys of its own document, causal: up to its own place.

    q `[Tq, Hq, D]`, k and v `[Tk, Hkv, D]` with Hq a multiple of Hkv, contiguous in the last dimension. Document i is
    rows `cu_seqlens[i]` to `cu_seqlens[i + 1]`, int32 `[N+1]` from 0 to T, always on the CPU. Documents without queries
    are allowed. D is at most MAX_HEAD_DIM, N at most MAX_DOCUMENTS.

    Causal, a document's last query stands at its last key, so with Tq < Tk the same call serves decoding and chunked
    prefill with a cache; a document may not have more queries than keys. Not causal, every query sees all keys of its
    document and may see none: then its out is 0 and its logsumexp -inf.

    Returns out `[Tq, Hq, D]` and the logsumexp of the scaled scores `[Tq, Hq]`, fp32 (fp64 for fp64) and without
    gradient. Two calls over different keys are merged by the logsumexp, and `pangu::attention_backward` takes the
    merged out and logsumexp for each of them: that is ring attention.

    Raises TypeError for wrong dtypes, ValueError for shapes, devices, strides, boundaries or limits that do not fit.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if torch.is_grad_enabled():
        return _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    check_tensor("attention", "q", q, 3, contiguous=False)
    check_tensor("attention", "k", k, 3, contiguous=False)
    key_heads = k.shape[1]
    if not key_heads or q.shape[1] % key_heads:
        raise ValueError(f"attention: q's {q.shape[1]} heads must be a multiple of k's {key_heads}")
    if q.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"attention: the last dimension of q must be at most {MAX_HEAD_DIM}, got {q.shape[2]}")
    check_operand("attention", "k", k, (len(k), key_heads, q.shape[2]), q, contiguous=False)
    check_operand("attention", "v", v, k.shape, q, contiguous=False)
    check_same_dtype("attention", "k", k, q)
    check_same_dtype("attention", "v", v, q)
    check_boundaries("attention", "cu_seqlens_q", cu_seqlens_q)
    if len(cu_seqlens_q) - 1 > MAX_DOCUMENTS:
        raise ValueError(
            f"attention: cu_seqlens_q must hold at most {MAX_DOCUMENTS} documents, got {len(cu_seqlens_q) - 1}"
        )
    if cu_seqlens_k is not cu_seqlens_q:
        check_boundaries("attention", "cu_seqlens_k", cu_seqlens_k)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"attention: cu_seqlens_k must hold as many documents as cu_seqlens_q, got {len(cu_seqlens_k) - 1} "
                f"and {len(cu_seqlens_q) - 1}"
            )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        out, logsumexp = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)
        ctx.scale, ctx.causal = scale, causal
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logsumexp)
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_logsumexp: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return None, None, None, None, None, None, None
        return *_backward(d_out.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.causal), None, None, None, None


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


def _fake_backward(
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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, bool causal=True)"
    " -> (Tensor out, Tensor logsumexp)",
    reference=reference.forward,
    fake=_fake_forward,
)
_backward = define(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, bool causal=True) -> (Tensor d_q, Tensor d_k, Tensor d_v)",
    reference=reference.backward,
    fake=_fake_backward,
)
implement("attention", "cpu", cpu.forward)
implement("attention_backward", "cpu", cpu.backward)
implement("attention", "cuda", cuda.forward)
implement("attention_backward", "cuda", cuda.backward)
implement("attention", "npu", ascend.forward)
implement("attention_backward", "npu", ascend.backward)
