"""Linear layers: fp32 as PyTorch's own to the bit, half precision with gradients that never were in it."""

import pytest
import torch
from pangu_kernels.deferred import Deferred
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from pangu.model.linear import Linear


def layer(bias: bool) -> Linear:
    torch.manual_seed(0)
    linear = Linear(32, 2, 24, bias=bias)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    return linear


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(40, 32, dtype=dtype, requires_grad=True), torch.randn(40, 48, dtype=dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_fp32_is_pytorchs_own_to_the_bit(bias: bool) -> None:
    linear, plain = layer(bias), layer(bias)
    (x, d_y), (plain_x, _) = operands(torch.float32), operands(torch.float32)
    for _ in range(2):
        y = linear(x)
        expected = F.linear(plain_x, plain.weight.flatten(0, 1), plain.bias.flatten() if bias else None)
        assert torch.equal(y, expected)
        y.backward(d_y)
        expected.backward(d_y)
    assert torch.equal(x.grad, plain_x.grad)
    for parameter, wanted in zip(linear.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_no_gradient_of_a_parameter(dtype: torch.dtype) -> None:
    linear, (x, d_y) = layer(bias=True), operands(dtype)
    for micro_batches in (1, 2):
        linear(x).backward(d_y)
        wide_x, wide_d_y = x.detach().double(), d_y.double()
        expected = {"weight": (wide_d_y.T @ wide_x).view(2, 24, 32), "bias": wide_d_y.sum(0).view(2, 24)}
        for name, parameter in linear.named_parameters():
            wanted = micro_batches * expected[name]
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(parameter.grad.double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())
    assert x.grad.dtype == dtype


def test_half_precision_output_and_input_gradient_are_those_of_cast_weights() -> None:
    linear, (x, d_y) = layer(bias=True), operands(torch.bfloat16)
    y = linear(x)
    y.backward(d_y)
    weight, bias = linear.weight.detach().flatten(0, 1).bfloat16(), linear.bias.detach().flatten().bfloat16()
    assert torch.equal(y, F.linear(x, weight, bias))
    assert torch.equal(x.grad, d_y @ weight)


def test_no_copy_of_a_weight_is_kept_for_backward() -> None:
    linear, (x, _) = layer(bias=False), operands(torch.bfloat16)
    kept: list[int] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        linear(x)
    assert set(kept) == {x.data_ptr(), linear.weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deferred_gradients_are_the_same(dtype: torch.dtype) -> None:
    linear, later = layer(bias=True), layer(bias=True)
    later.deferred = Deferred()
    for module in (linear, later):
        x, d_y = operands(dtype)
        module(x).backward(d_y)
    assert later.weight.grad is None
    later.deferred.take()()
    for parameter, wanted in zip(later.parameters(), linear.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)
