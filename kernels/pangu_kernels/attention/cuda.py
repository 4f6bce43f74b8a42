"""Attention on CUDA by PyTorch's own variable-length flash attention (FlashAttention-2, Dao 2023).

The operators are those under `torch.nn.attention.varlen.varlen_attn`; called directly, their backward takes an out and
logsumexp over more keys than these, as ring attention needs. Their causal mask is aligned to the last query and key,
as ours is. Conventions of theirs that are not ours: boundaries on the device, a logsumexp of `[Hq, Tq]`, and +inf
in it where a query sees no key.
"""

import functools
import logging

import torch
from torch import Tensor

from pangu_kernels.attention import reference
from pangu_kernels.attention.documents import document_runs
from pangu_kernels.checks import describe

_flash = torch.ops.aten._flash_attention_forward.default
_flash_backward = torch.ops.aten._flash_attention_backward.default

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8
_DTYPES = (torch.bfloat16, torch.float16)
_AMPERE = (8, 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    if not _supports(q, k):
        return reference.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)
    documents = _documents(cu_seqlens_q, cu_seqlens_k, q, k, causal)
    out, logsumexp, *_ = _flash(q, k, v, *documents, 0.0, causal, False, scale=scale)
    logsumexp = logsumexp.T.contiguous()
    return out.contiguous(), logsumexp.masked_fill_(logsumexp == float("inf"), float("-inf"))


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
    if not _supports(q, k):
        return reference.backward(d_out, q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, scale, causal)
    documents = _documents(cu_seqlens_q, cu_seqlens_k, q, k, causal)
    no_dropout = (0.0, causal, *_random_state(q.device))
    gradients = _flash_backward(d_out, q, k, v, out, logsumexp.T.contiguous(), *documents, *no_dropout, scale=scale)
    d_q, d_k, d_v = (gradient.contiguous() for gradient in gradients)
    return d_q, d_k, d_v


def _documents(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, int, int]:
    """Boundaries on the device, and lengths that no document exceeds."""
    runs = document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal)
    longest_q, longest_k = max(run.q_length for run in runs), max(run.k_length for run in runs)
    if longest_q == 1 and len(q) < len(cu_seqlens_q) - 1:
        longest_q = 2  # for 1 the kernel may take it that every document has a query
    on_device = cu_seqlens_q.to(q.device, non_blocking=True)
    same = cu_seqlens_k is cu_seqlens_q
    return on_device, on_device if same else cu_seqlens_k.to(q.device, non_blocking=True), longest_q, longest_k


def _random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """What dropout would need."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def _supports(q: Tensor, k: Tensor) -> bool:
    if q.dtype not in _DTYPES:
        _warn_unfused(f"q is {describe(q).split()[0]}, the fused one takes bf16 and fp16")
        return False
    head_dim = q.shape[2]
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        _warn_unfused(f"heads have {head_dim} dimensions, the fused one takes multiples of 8 up to {MAX_HEAD_DIM}")
        return False
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < _AMPERE:
        _warn_unfused("the fused one needs an Ampere device or a newer one")
        return False
    return bool(q.numel() and k.numel())


@functools.cache
def _warn_unfused(reason: str) -> None:
    """Once per reason."""
    logging.getLogger(__name__).warning(
        "attention runs unfused on CUDA, slower and with memory for all scores: %s", reason
    )
