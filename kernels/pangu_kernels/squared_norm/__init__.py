"""The square of the 2-norm of many tensors together, as gradient clipping needs it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pangu_kernels.checks import check_tensor
from pangu_kernels.registration import define, implement
from pangu_kernels.squared_norm import cpu, reference


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements of `tensors`, at least one, on one device: fp32 `[]`, without gradient.

    Raises TypeError for what is not floating point, ValueError for no tensors.
    """
    if not tensors:
        raise ValueError("squared_norm: tensors must hold at least one tensor")
    for tensor in tensors:
        check_tensor("squared_norm", "tensors", tensor)
    return _squared_norm(list(tensors))


def _fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


_squared_norm = define("squared_norm(Tensor[] tensors) -> Tensor", reference=reference.squared_norm, fake=_fake)
implement("squared_norm", "cpu", cpu.squared_norm)
