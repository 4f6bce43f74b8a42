"""Every wrong argument is refused by name before a kernel sees it."""

from typing import Any

import pytest
import torch
from operator_cases import boundaries
from pangu_kernels import (
    adamw,
    attention,
    embedding,
    linear_cross_entropy,
    local_filter,
    rms_norm,
    rope,
    sandwich_norm,
    swiglu,
)
from torch import Tensor

X = torch.randn(4, 6)
HEADS = torch.randn(4, 2, 6)
GAIN = torch.ones(6)
DOCUMENTS = boundaries(1, 3)
LABELS = torch.zeros(4, dtype=torch.int64)
FILTER = (torch.randn(3, 6, 2), torch.randn(3), torch.randn(6, 3, 2), torch.randn(6))
STEP = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def attend(q: Any = None, k: Any = None, v: Any = None, starts_q: Any = DOCUMENTS, starts_k: Any = DOCUMENTS) -> None:
    q, k, v = (HEADS if x is None else x for x in (q, k, v))
    attention(q, k, v, starts_q, starts_k, 1.0)


def update(params: Any, grads: Any, step: int = 1, grad_scale: Any = 1.0) -> None:
    moments = [torch.zeros_like(p) for p in params if isinstance(p, Tensor)]
    adamw(params, grads, moments, moments, step=step, grad_scale=grad_scale, **STEP)


BAD = {
    "embedding tokens": (lambda: embedding([1], X), TypeError, "embedding: tokens must be a tensor, got list"),
    "embedding dtype": (lambda: embedding(DOCUMENTS, X), TypeError, r"tokens must be int64, got int32 \[3\]"),
    "embedding rank": (
        lambda: embedding(LABELS[:, None], X),
        ValueError,
        r"tokens must be \[T\] on cpu, got int64 \[4, 1\]",
    ),
    "embedding table": (lambda: embedding(LABELS, GAIN), ValueError, "embedding: weight must have 2 dimensions"),
    "rms_norm not a tensor": (lambda: rms_norm([1.0], GAIN, 1e-5), TypeError, "rms_norm: x must be a tensor, got list"),
    "rms_norm integers": (lambda: rms_norm(LABELS, GAIN, 1e-5), TypeError, r"rms_norm: x must be fp32.*int64 \[4\]"),
    "rms_norm gain": (lambda: rms_norm(X, GAIN[:5], 1e-5), ValueError, r"weight must have shape \[6\].*float32 \[5\]"),
    "rms_norm device": (lambda: rms_norm(X, GAIN.to("meta"), 1e-5), ValueError, "weight must be on cpu.* on meta"),
    "rms_norm strides": (lambda: rms_norm(X.T, GAIN[:4], 1e-5), ValueError, r"x must be contiguous.*\(1, 6\)"),
    "rms_norm rank": (
        lambda: rms_norm(X[0, 0], GAIN, 1e-5),
        ValueError,
        r"rms_norm: x must have at least one dimension, got float32 \[\] on cpu",
    ),
    "sandwich_norm device": (
        lambda: sandwich_norm(X, X.to("meta"), GAIN, GAIN, 1e-5),
        ValueError,
        r"sandwich_norm: y must be on cpu, got float32 \[4, 6\] on meta",
    ),
    "sandwich_norm strides": (
        lambda: sandwich_norm(X.T, X.T, GAIN[:4], GAIN[:4], 1e-5),
        ValueError,
        "sandwich_norm: residual must be contiguous",
    ),
    "sandwich_norm rank": (
        lambda: sandwich_norm(HEADS, HEADS, GAIN, GAIN, 1e-5),
        ValueError,
        "sandwich_norm: residual must have 2 dimensions",
    ),
    "sandwich_norm y": (lambda: sandwich_norm(X, X[:3], GAIN, GAIN, 1e-5), ValueError, r"y must have shape \[4, 6\]"),
    "sandwich_norm dtype": (
        lambda: sandwich_norm(X, X.bfloat16(), GAIN, GAIN, 1e-5),
        TypeError,
        "sandwich_norm: y must be float32, got bfloat16",
    ),
    "sandwich_norm post": (
        lambda: sandwich_norm(X, X, GAIN[:5], GAIN, 1e-5),
        ValueError,
        "post_weight must have shape",
    ),
    "sandwich_norm pre": (lambda: sandwich_norm(X, X, GAIN, GAIN[:5], 1e-5), ValueError, "pre_weight must have shape"),
    "rope rank": (lambda: rope(X, X, X), ValueError, r"rope: x must have 3 dimensions, got float32 \[4, 6\]"),
    "rope dtype": (
        lambda: rope(HEADS, LABELS, LABELS),
        TypeError,
        "rope: cos must be fp32, bf16, fp16 or fp64, got int64",
    ),
    "rope device": (lambda: rope(HEADS, X, X.to("meta")), ValueError, "rope: sin must be on cpu"),
    "rope odd": (lambda: rope(HEADS[..., :5], X, X), ValueError, "rope: the last dimension of x must be even, got 5"),
    "rope cos": (lambda: rope(HEADS, X[:3], X), ValueError, r"rope: cos must have shape \[4, 6\]"),
    "rope sin": (lambda: rope(HEADS, X, X[:, :4].clone()), ValueError, r"rope: sin must have shape \[4, 6\]"),
    "rope strides": (lambda: rope(HEADS.mT, X, X), ValueError, "rope: the last dimension of x must be contiguous"),
    "swiglu odd": (
        lambda: swiglu(torch.randn(4, 5)),
        ValueError,
        "swiglu: the last dimension of x must be even, got 5",
    ),
    "swiglu rank": (lambda: swiglu(GAIN), ValueError, "swiglu: x must have 2 dimensions"),
    "swiglu dtype": (lambda: swiglu(LABELS), TypeError, "swiglu: x must be fp32, bf16, fp16 or fp64, got int64"),
    "swiglu strides": (lambda: swiglu(X.T), ValueError, "swiglu: x must be contiguous"),
    "attention head_dim limit": (
        lambda: attend(*[torch.zeros(4, 1, 1025)] * 3),
        ValueError,
        "attention: the last dimension of q must be at most 1024, got 1025",
    ),
    "attention document limit": (
        lambda: attend(starts_q=torch.zeros(65_537, dtype=torch.int32)),
        ValueError,
        "attention: cu_seqlens_q must hold at most 65535 documents, got 65536",
    ),
    "attention rank": (lambda: attend(q=X), ValueError, r"attention: q must have 3 dimensions, got float32 \[4, 6\]"),
    "attention strides": (
        lambda: attend(v=HEADS.mT.contiguous().mT),
        ValueError,
        "the last dimension of v must be cont",
    ),
    "attention tensor device": (lambda: attend(k=HEADS.to("meta")), ValueError, "attention: k must be on cpu"),
    "attention heads": (
        lambda: attend(q=torch.randn(4, 3, 6)),
        ValueError,
        "attention: q's 3 heads must be a multiple of k's 2",
    ),
    "attention no heads": (lambda: attend(k=HEADS[:, :0], v=HEADS[:, :0]), ValueError, "a multiple of k's 0"),
    "attention head_dim": (lambda: attend(k=HEADS[..., :4]), ValueError, r"attention: k must have shape \[4, 2, 6\]"),
    "attention v": (lambda: attend(v=HEADS[:3]), ValueError, r"attention: v must have shape \[4, 2, 6\]"),
    "attention dtype": (lambda: attend(v=HEADS.half()), TypeError, "attention: v must be float32, got float16"),
    "attention int64": (lambda: attend(starts_q=DOCUMENTS.long()), TypeError, "cu_seqlens_q must be int32"),
    "attention device": (lambda: attend(starts_k=DOCUMENTS.to("meta")), ValueError, "cu_seqlens_k must be on the CPU"),
    "attention documents": (
        lambda: attend(starts_k=boundaries(4)),
        ValueError,
        "cu_seqlens_k must hold as many documents as cu_seqlens_q, got 1 and 2",
    ),
    "attention empty": (lambda: attend(starts_q=DOCUMENTS[:0]), ValueError, "cu_seqlens_q must have one dimension"),
    "attention end": (
        lambda: attend(starts_q=boundaries(1, 2)),
        ValueError,
        r"cu_seqlens_q must rise from 0 to the number of tokens 4, got \[0, 1, 3\]",
    ),
    "attention falling": (
        lambda: attend(starts_k=torch.tensor([0, 5, 4], dtype=torch.int32)),
        ValueError,
        r"cu_seqlens_k must rise from 0 .* got \[0, 5, 4\]",
    ),
    "attention more queries": (
        lambda: attend(starts_k=boundaries(2, 2)),
        ValueError,
        "with causal=True a document may not have more queries than keys, got 3 and 2 from row 1 of q on",
    ),
    "loss no tensor": (lambda: linear_cross_entropy(X, X, [0] * 4), TypeError, "labels must be a tensor, got list"),
    "loss rank": (
        lambda: linear_cross_entropy(HEADS, X, LABELS),
        ValueError,
        "linear_cross_entropy: x must have 2 dim",
    ),
    "loss device": (lambda: linear_cross_entropy(X, X.to("meta"), LABELS), ValueError, "weight must be on cpu"),
    "loss label device": (
        lambda: linear_cross_entropy(X, X, LABELS.to("meta")),
        ValueError,
        r"labels must be \[4\] on cpu",
    ),
    "loss strides": (
        lambda: linear_cross_entropy(X, X.T.contiguous().T, LABELS),
        ValueError,
        "weight must be contiguous",
    ),
    "loss labels": (
        lambda: linear_cross_entropy(X, X, LABELS.int()),
        TypeError,
        "linear_cross_entropy: labels must be int64",
    ),
    "loss length": (lambda: linear_cross_entropy(X, X, LABELS[:3]), ValueError, r"labels must be \[4\] on cpu"),
    "loss range": (
        lambda: linear_cross_entropy(X, X, LABELS + 4),
        ValueError,
        "labels must be -100 or from 0 to 3, got values from 4 to 4",
    ),
    "loss negative": (lambda: linear_cross_entropy(X, X, LABELS - 1), ValueError, "got values from -1 to -1"),
    "loss weight": (
        lambda: linear_cross_entropy(X, X[:, :5].clone(), LABELS),
        ValueError,
        r"weight must have shape \[4, 6\]",
    ),
    "loss weights": (
        lambda: linear_cross_entropy(X, X, LABELS, GAIN),
        ValueError,
        r"loss_weights must have shape \[4\]",
    ),
    "loss chunk": (lambda: linear_cross_entropy(X, X, LABELS, None, -1), ValueError, "chunk_size must not be negative"),
    "local_filter weight": (
        lambda: local_filter(X, FILTER[2], *FILTER[1:], DOCUMENTS),
        ValueError,
        r"local_filter: weight1 must have shape \[6, 6, 2\]",
    ),
    "local_filter dtype": (lambda: local_filter(LABELS, *FILTER, DOCUMENTS), TypeError, "local_filter: x must be fp32"),
    "local_filter rank": (
        lambda: local_filter(HEADS, *FILTER, DOCUMENTS),
        ValueError,
        "local_filter: x must have 2 dim",
    ),
    "local_filter device": (
        lambda: local_filter(X, *FILTER[:3], FILTER[3].to("meta"), DOCUMENTS),
        ValueError,
        "local_filter: bias2 must be on cpu",
    ),
    "local_filter bounds": (
        lambda: local_filter(X, *FILTER, boundaries(5)),
        ValueError,
        "local_filter: cu_seqlens must rise from 0 to the number of tokens 4",
    ),
    "adamw no tensor": (lambda: update([1.0], []), TypeError, "adamw: params must be a tensor, got float"),
    "adamw integers": (lambda: update([LABELS], [LABELS]), TypeError, "adamw: params must be fp32, bf16, fp16 or fp64"),
    "adamw strides": (lambda: update([X.T], [X.T]), ValueError, "adamw: params must be contiguous"),
    "adamw device": (lambda: update([X], [X.to("meta")]), ValueError, "adamw: grads must be on cpu"),
    "adamw scale": (lambda: update([X], [X], grad_scale=GAIN), ValueError, r"adamw: grad_scale must have shape \[\]"),
    "adamw scale device": (
        lambda: update([X], [X], grad_scale=torch.ones((), device="meta")),
        ValueError,
        "adamw: grad_scale must be on cpu",
    ),
    "adamw step": (lambda: update([X], [X], step=0), ValueError, "adamw: step counts from 1, got 0"),
    "adamw lists": (lambda: update([X], []), ValueError, "adamw: grads must hold as many tensors as params, 1, got 0"),
    "adamw shape": (lambda: update([X], [X[:3]]), ValueError, r"adamw: grads must have shape \[4, 6\]"),
    "adamw dtype": (lambda: update([X], [X.half()]), TypeError, "adamw: grads must be float32, got float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
