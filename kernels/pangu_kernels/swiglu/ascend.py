"""SwiGLU on the NPU, by aclnnSwiGlu and aclnnSwiGluGrad."""

import torch
from torch import Tensor

from pangu_kernels.ascend_support import fusible
from pangu_kernels.swiglu import reference


def forward(x: Tensor) -> Tensor:
    y: Tensor = torch.ops.npu.npu_swiglu(x, dim=-1) if fusible("swiglu", x=x) else reference.forward(x)
    return y


def backward(d_y: Tensor, x: Tensor) -> Tensor:
    if not fusible("swiglu", x=x):
        return reference.backward(d_y, x)
    d_x: Tensor = torch.ops.npu.npu_swiglu_backward(d_y, x, dim=-1)
    return d_x
