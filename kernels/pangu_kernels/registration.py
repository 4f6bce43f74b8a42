"""How a function becomes the operator `pangu::name`.

An operator is a schema with a reference that computes it on any device, a fake that only knows shapes, and later one
kernel per device; PyTorch's dispatcher picks. Gradients are added outside: the public function wraps the operator and
its `_backward` in a `torch.autograd.Function`, and calls the operator directly where gradients are off. Forward, and
forward plus backward, of a tiny operator with two inputs on one 2026 server core, in microseconds:

    torch.library.custom_op                     22.8   85.7
    Library + torch.library.register_autograd   18.8   62.9
    Function registered at the Autograd key     13.3   50.6
    Function around the operator (this one)      9.9   44.7
    the operator without gradients               4.6

It keeps devices, fake tensors, torch.compile and activation checkpointing. What it gives up: `torch.ops.pangu.name`
called by itself has no gradient (PyTorch warns in backward); call the function of `pangu_kernels`.

A Function whose output is cheap to compute again from what its own backward keeps says so: `ctx.recompute` maps the
output's number to a function of ctx. Whoever runs the model may then drop that output until backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

Kernel = Callable[..., Any]

_LIBRARY = torch.library.Library("pangu", "DEF")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}


def define(schema: str, *, reference: Kernel, fake: Kernel) -> OpOverload:
    """Add the operator `pangu::<schema>`; devices without a kernel of their own compute it by `reference`."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pangu::{name}", fake, lib=_LIBRARY)
    operator: OpOverload = getattr(torch.ops.pangu, name).default
    return operator


def implement(name: str, device: str, kernel: Kernel) -> None:
    """Compute `pangu::name` by `kernel` on `device`: "cpu", "cuda" or "npu"."""
    _LIBRARY.impl(name, kernel, _DISPATCH_KEYS[device])
