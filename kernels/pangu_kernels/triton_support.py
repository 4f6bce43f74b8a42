"""How Triton's kernels (`*/triton_kernel.py`) become those of CUDA; Triton is imported when CUDA first needs it."""

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

Kernel = Callable[..., Any]

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def triton_or(reference: Kernel) -> Kernel:
    """The function of the same name in `triton_kernel.py` beside `reference`; `reference` itself without Triton."""

    def kernel(*args: Any) -> Any:
        with torch.cuda.device_of(_first_tensor(args)):  # Triton launches on the current device, wherever tensors are
            return _load(reference)(*args)

    return kernel


def supports(*tensors: Tensor | None) -> bool:
    """Whether kernels can compute on these: contiguous fp32, bf16 or fp16 with something in them."""
    return all(t is None or (t.dtype in _DTYPES and t.is_contiguous() and t.numel() > 0) for t in tensors)


@functools.cache
def _load(reference: Kernel) -> Kernel:
    package = reference.__module__.rpartition(".")[0]
    try:
        module = importlib.import_module(f"{package}.triton_kernel")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        _warn_once()
        module = sys.modules[reference.__module__]
    return cast(Kernel, getattr(module, reference.__name__))


@functools.cache
def _warn_once() -> None:
    logging.getLogger(__name__).warning("Triton is not installed, slower references run instead: pip install triton")


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    first = next(arg for arg in args if arg is not None)
    return cast(Tensor, first[0] if isinstance(first, list) else first)
