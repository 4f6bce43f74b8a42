"""SwiGLU by PyTorch operations, computed in fp32 at least."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from pangu_kernels.precision import widen


def forward(x: Tensor) -> Tensor:
    gate, up = widen(x).chunk(2, dim=-1)
    return silu(gate).mul_(up).to(x.dtype)


def backward(d_y: Tensor, x: Tensor) -> Tensor:
    """d_x = (d_gate, d_up) by

    d_gate = d_y * up * silu'(gate)
    d_up   = d_y * silu(gate)
    """
    wide_x, wide_d_y = widen(x), widen(d_y)
    gate, up = wide_x.chunk(2, dim=-1)
    d_x = torch.empty_like(wide_x)
    d_gate, d_up = d_x.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(wide_d_y * up, gate, grad_input=d_gate)
    torch.ops.aten.silu.out(gate, out=d_up).mul_(wide_d_y)
    return d_x.to(x.dtype)
