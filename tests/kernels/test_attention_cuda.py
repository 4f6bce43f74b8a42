"""How attention calls PyTorch's CUDA flash attention. There is no GPU here: what the kernel computes is not tested.

The calls are bound to the operators' schemas on meta tensors, and made on the CPU to a double that computes plainly
what the kernel's source promises, by its conventions. On a machine with a GPU the other tests run the kernel itself.
"""

import logging
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from operator_cases import Case, boundaries, cases
from pangu_kernels.attention import cuda, reference
from test_operators import assert_near, layout
from torch import Tensor

CASES = [pytest.param(case, id=case.name) for case in cases() if case.operator == "attention"]
QKV = tuple[Tensor, Tensor, Tensor]


def arguments(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[QKV, Tensor, Tensor, float], bool]:
    q, k, v = case.inputs(dtype, device, requires_grad=False)
    options = case.function.keywords  # type: ignore[attr-defined]
    return (q, k, v, boundaries(*options["q_lengths"]), boundaries(*options["k_lengths"]), 0.3), options["causal"]


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    **unused: None,
) -> tuple[Tensor, ...]:
    check(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
    if max_q == 1 and q.shape[1] > k.shape[1]:
        assert len(q) == len(cum_seq_q) - 1, "the kernel's short cut for decoding views q as one token per document"
    assert not return_debug_mask
    assert all(value is None for value in unused.values())
    out, logsumexp = reference.forward(q, k, v, cum_seq_q, cum_seq_k, scale, is_causal)
    logsumexp = logsumexp.masked_fill(logsumexp == float("-inf"), float("inf")).T.contiguous()
    return out, logsumexp, q.new_zeros(2), q.new_zeros(()), q.new_zeros(0)


def flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    **windows: None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
    assert grad_out.stride(-1) == out.stride(-1) == 1
    assert logsumexp.shape == (q.shape[1], len(q))
    assert logsumexp.is_contiguous()
    assert rng_state.dtype == torch.uint64
    assert all(value is None for value in windows.values())
    return reference.backward(grad_out, q, k, v, out, logsumexp.T.contiguous(), cum_seq_q, cum_seq_k, scale, is_causal)


def check(
    q: Tensor, k: Tensor, v: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float
) -> None:
    """What the kernel's host code refuses."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[2] % 8 == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for cum_seq, longest in ((cum_seq_q, max_q), (cum_seq_k, max_k)):
        assert cum_seq.dtype == torch.int32
        assert cum_seq.is_contiguous()
        assert max(stop - start for start, stop in pairwise(cum_seq.tolist())) <= longest
        assert longest > 0
    assert dropout_p == 0


@pytest.fixture
def _double() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        yield


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("case", CASES)
def test_calls_agree_with_the_reference(case: Case) -> None:
    args, causal = arguments(case, torch.bfloat16)
    expected, actual = reference.forward(*args, causal), cuda.forward(*args, causal)
    d_out = torch.randn(args[0].shape).bfloat16()
    gradient_args = (d_out, *args[:3], *expected, *args[3:], causal)
    for a, b in zip(
        (*actual, *cuda.backward(*gradient_args)), (*expected, *reference.backward(*gradient_args)), strict=True
    ):
        assert layout(a) == layout(b)
        assert_near(a, b, 1e-2)


@pytest.mark.parametrize("case", CASES)
def test_calls_fit_the_operators_schemas(case: Case) -> None:
    args, causal = arguments(case, torch.bfloat16, "meta")
    out, logsumexp = cuda.forward(*args, causal)
    assert layout(out) == layout(torch.empty(args[0].shape, dtype=torch.bfloat16))
    assert layout(logsumexp) == layout(torch.empty(args[0].shape[:2]))
    gradients = cuda.backward(out, *args[:3], out, logsumexp, *args[3:], causal)
    assert [layout(g) for g in gradients] == [layout(x) for x in args[:3]]


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (torch.ones(2, 1, 8), "q is float32, the fused one takes bf16 and fp16"),
        (torch.ones(2, 1, 12).bfloat16(), "heads have 12 dimensions"),
        (torch.ones(2, 1, 264).bfloat16(), "heads have 264 dimensions"),
    ],
)
def test_what_the_kernel_cannot_do_the_reference_does_and_says_so_once(
    q: Tensor, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda._warn_unfused.cache_clear()
    documents = boundaries(2)
    for _ in range(2):
        out, logsumexp = cuda.forward(q, q, q, documents, documents, 1.0)
        cuda.backward(q, q, q, q, out, logsumexp, documents, documents, 1.0)
    assert [reason in record.message for record in caplog.records if record.levelno == logging.WARNING] == [True]


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_is_registered_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pangu::{name}", "CUDA")
