"""The gradient of a linear layer's weight, in fp32 where that is what it is accumulated in."""

import torch
from torch import Tensor

from pangu_kernels.checks import check_operand, check_same_dtype, check_tensor
from pangu_kernels.precision import accumulation_dtype
from pangu_kernels.registration import define, implement
from pangu_kernels.weight_gradient import ascend, cuda, reference


def weight_gradient(d_y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`d_y^T x` `[N, K]` in `dtype`, of d_y `[T, N]` and x `[T, K]`, both of one dtype.

    Without a detour: where `dtype` has more digits than x, no sum is rounded to the digits of x.
    Has no gradient. Raises TypeError or ValueError for tensors that do not fit.
    """
    _check("weight_gradient", d_y, x)
    return _new(d_y, x, dtype)


def add_weight_gradient(accumulator: Tensor, d_y: Tensor, x: Tensor) -> None:
    """`accumulator += d_y^T x`, in place, of fp32 (for fp64: fp64) `[N, K]`, d_y `[T, N]` and x `[T, K]` of one dtype.

    Has no gradient. Raises TypeError or ValueError for tensors that do not fit.
    """
    operator = "add_weight_gradient"
    _check(operator, d_y, x)
    check_operand(operator, "accumulator", accumulator, (d_y.shape[1], x.shape[1]), x)
    if accumulator.dtype != accumulation_dtype(x.dtype):
        raise TypeError(f"{operator}: accumulator must be {accumulation_dtype(x.dtype)}, got {accumulator.dtype}")
    _add(accumulator, d_y, x)


def _check(operator: str, d_y: Tensor, x: Tensor) -> None:
    check_tensor(operator, "x", x, 2, contiguous=False)
    check_tensor(operator, "d_y", d_y, 2, contiguous=False)
    check_operand(operator, "d_y", d_y, (len(x), d_y.shape[1]), x, contiguous=False)
    check_same_dtype(operator, "d_y", d_y, x)


def _fake_new(d_y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((d_y.shape[1], x.shape[1]), dtype=dtype)


def _fake_add(accumulator: Tensor, d_y: Tensor, x: Tensor) -> None:
    pass


_new = define(
    "weight_gradient(Tensor d_y, Tensor x, ScalarType dtype) -> Tensor", reference=reference.new, fake=_fake_new
)
_add = define(
    "add_weight_gradient(Tensor(a!) accumulator, Tensor d_y, Tensor x) -> ()", reference=reference.add_, fake=_fake_add
)
for device in ("cuda", "npu"):
    implement("weight_gradient", device, cuda.new)
implement("add_weight_gradient", "cuda", cuda.add_)
implement("add_weight_gradient", "npu", ascend.add_)
