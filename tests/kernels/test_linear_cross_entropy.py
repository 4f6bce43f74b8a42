from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pangu_kernels import linear_cross_entropy
from pangu_kernels.linear_cross_entropy import reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, VOCABULARY, HIDDEN = 24, 40, 8


class Watch(TorchDispatchMode):
    """The largest result of any operation, how often each ran, and where our operators' results lie."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: Counter[str] = Counter()
        self.addresses: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        if func.namespace == "pangu" and result is not None:  # not the tensors: a second owner would change their fate
            self.addresses[func._schema.name] = [t.data_ptr() for t in result]
        return result


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, device=device, requires_grad=True)
    return x, weight, torch.randint(VOCABULARY, (TOKENS,), device=device)


@pytest.mark.parametrize("chunk_size", [1, 7, TOKENS, 1000])
def test_chunks_do_not_change_the_result(chunk_size: int, device: torch.device) -> None:
    x, weight, labels = inputs(device)
    whole, whole_tokens = linear_cross_entropy(x, weight, labels)
    chunked, tokens = linear_cross_entropy(x, weight, labels, None, chunk_size)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(tokens, whole_tokens)
    for actual, expected in zip(
        torch.autograd.grad(chunked, (x, weight)), torch.autograd.grad(whole, (x, weight)), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_logits_never_exist_at_once() -> None:
    x, weight, labels = (t.detach() for t in inputs(torch.device("cpu")))
    with Watch() as watch:
        reference.forward(x, weight, labels, None, 4, True, True)
    assert watch.largest <= max(4 * VOCABULARY, weight.numel())
    assert watch.largest < TOKENS * VOCABULARY


def test_only_gradients_that_are_needed_are_computed() -> None:
    x, weight, labels = (t.detach() for t in inputs(torch.device("cpu")))
    for needs, matmuls in (((False, False), 1), ((True, False), 2), ((False, True), 2), ((True, True), 3)):
        with Watch() as watch:
            reference.forward(x, weight, labels, None, 8, *needs)
        assert watch.calls["aten::mm"] + watch.calls["aten::addmm"] == matmuls * TOKENS // 8
    with Watch() as watch, torch.no_grad():
        linear_cross_entropy(x, weight.requires_grad_(), labels)
    assert watch.addresses["pangu::linear_cross_entropy"][2:] == [0, 0]


def test_gradient_of_the_weight_is_handed_over_not_copied(device: torch.device) -> None:
    x, weight, labels = inputs(device)
    with Watch() as watch:
        loss, _ = linear_cross_entropy(x, weight, labels)
        (loss * 0.25).backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == watch.addresses["pangu::linear_cross_entropy"][3]
    exact = torch.autograd.grad(0.25 * F.cross_entropy(x @ weight.T, labels, reduction="sum"), weight)[0]
    torch.testing.assert_close(weight.grad, exact)


def test_a_second_backward_is_refused(device: torch.device) -> None:
    x, weight, labels = inputs(device)
    loss = linear_cross_entropy(x, weight, labels)[0] * 0.5
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weight_gradient_accumulates_in_fp32(device: torch.device) -> None:
    """In bf16 a sum of 600 equal terms stops growing at 256 of them."""
    x = torch.ones(600, 1, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, device=device, requires_grad=True)
    loss, _ = linear_cross_entropy(x, weight, torch.zeros(600, dtype=torch.int64, device=device), None, 1)
    loss.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-300.0], [300.0]], device=device))


def test_large_logits_stay_finite(device: torch.device) -> None:
    x, weight, labels = inputs(device)
    loss, tokens = linear_cross_entropy(x * 1e4, weight, labels)
    gradients = torch.autograd.grad(loss, (x, weight))
    expected = F.cross_entropy(x.double() * 1e4 @ weight.double().T, labels, reduction="none")
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-5, atol=0.1)
    assert all(g.isfinite().all() for g in gradients)


def test_ignored_tokens_count_for_nothing(device: torch.device) -> None:
    x, weight, labels = inputs(device)
    labels[5] = -100
    loss, tokens = linear_cross_entropy(x, weight, labels, torch.full((TOKENS,), 2.0, device=device))
    gradient = torch.autograd.grad(loss, x)[0]
    assert tokens[5] == 0
    assert not gradient[5].any()
    torch.testing.assert_close(loss, 2 * tokens.sum())


def test_no_tokens_at_all(device: torch.device) -> None:
    x, weight, labels = (t[:0] for t in inputs(device))
    weight = torch.ones(VOCABULARY, HIDDEN, device=device, requires_grad=True)
    loss, tokens = linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert loss == 0
    assert tokens.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()
