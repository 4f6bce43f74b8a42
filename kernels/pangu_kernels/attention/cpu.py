"""Attention on the CPU: one compiled call for fp32; for the rest, a call of PyTorch's flash kernel per document length.

The compiled kernel skips what the causal mask hides in tiles of 96 tokens, PyTorch's in steps of 512.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pangu_kernels.attention.documents import Run, document_runs
from pangu_kernels.compiled import kernel, threads
from pangu_kernels.precision import accumulation_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

HEAD_DIM_MULTIPLE = 16
"""Of head dimensions that the compiled kernel takes: two vectors of eight."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    runs = document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal)
    run = _kernel("attention", "pppppppiiiiiiifii", q)
    if run is None:
        return _forward_runs(runs, q, k, v, scale, causal)
    q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
    out, logsumexp = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    boundaries = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    tensors = (q, k, v, *boundaries, out, logsumexp)
    run(*(x.data_ptr() for x in tensors), *_sizes(q, k, v, cu_seqlens_q), scale, causal, threads(q))
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
    run = _kernel("attention_backward", "pppppppppppiiiiiiifii", q)
    if run is None:
        return _backward_runs(runs, d_out, q, k, v, out, logsumexp, scale, causal)
    q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    results = (out.contiguous(), logsumexp.contiguous(), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    tensors = (d_out.contiguous(), q, k, v, *results, d_q, d_k, d_v)
    run(*(x.data_ptr() for x in tensors), *_sizes(q, k, v, cu_seqlens_q), scale, causal, threads(q))
    return d_q, d_k, d_v


def _kernel(name: str, signature: str, q: Tensor) -> Callable[..., None] | None:
    takes_it = q.dtype is torch.float32 and q.numel() and q.shape[2] % HEAD_DIM_MULTIPLE == 0
    return kernel(name, signature) if takes_it else None


def _heads_together(x: Tensor) -> Tensor:
    """x `[T, heads, D]` with the heads of a token end to end, whatever lies between tokens: it may be part of a
    projection's output."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[int, ...]:
    return q.stride(0), k.stride(0), v.stride(0), len(cu_seqlens) - 1, q.shape[1], k.shape[1], q.shape[2]


def _forward_runs(
    runs: list[Run], q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(q.shape)
    logsumexp = q.new_full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q.dtype))
    for run in runs:
        if run.q_length and run.k_length:
            mask = _mask(run, q, causal)
            run_out, run_logsumexp = _flash(run.queries(q), run.keys(k), run.keys(v), scale=scale, **mask)
            run.queries(out).copy_(run_out)
            run.queries(logsumexp).copy_(run_logsumexp)
    return out, logsumexp


def _backward_runs(
    runs: list[Run],
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_zeros(x.shape) for x in (q, k, v))
    for run in runs:
        if run.q_length and run.k_length:
            inputs = (run.queries(d_out), run.queries(q), run.keys(k), run.keys(v))
            mask = {"is_causal": False, **_mask(run, q, causal)}
            results = _flash_backward(
                *inputs, run.queries(out), run.queries(logsumexp), dropout_p=0.0, scale=scale, **mask
            )
            for gradient, result in zip((run.queries(d_q), run.keys(d_k), run.keys(d_v)), results, strict=True):
                gradient.copy_(result)
    return d_q, d_k, d_v


def _mask(run: Run, q: Tensor, causal: bool) -> dict[str, bool | Tensor]:
    """The flash kernel's arguments. Its own causal mask aligns top-left, right only for as many queries as keys."""
    if not causal or run.q_length == 1:
        return {}
    if run.q_length == run.k_length:
        return {"is_causal": True}
    hidden = q.new_full((run.q_length, run.k_length), float("-inf"))
    return {"attn_mask": hidden.triu_(run.k_length - run.q_length + 1)}
