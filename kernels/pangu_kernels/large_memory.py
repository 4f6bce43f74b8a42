"""Memory for large tensors on the CPU, kept when a tensor dies for the next of its size.

The C library gives a block of 32 MB or more back to the system when it is freed, and the system clears the pages of the
next one, a page fault each. The logits and the two gradients as large as the vocabulary cost a step of a 58M model 8 %
of its time this way. Accelerators' allocators keep all memory, and are left to do so.
"""

import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from pangu_kernels.checks import readable

LARGE = 2**25
"""Bytes from which on glibc never keeps a block (its DEFAULT_MMAP_THRESHOLD_MAX)."""
_HUGE_PAGE = 2**21

_kept: dict[int, list[mmap.mmap]] = {}


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LARGE or not readable(like):
        return like.new_empty(shape, dtype=dtype)
    pages = _take(-(-size // _HUGE_PAGE) * _HUGE_PAGE)
    view = memoryview(pages)  # lives as long as the tensor
    weakref.finalize(view, _keep, pages).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(shape)


def _take(size: int) -> mmap.mmap:
    try:
        return _kept.get(size, []).pop()
    except IndexError:
        # Sizes have changed, with the sequence length or the model: what was kept would only lie about.
        _kept.clear()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _keep(pages: mmap.mmap) -> None:
    _kept.setdefault(len(pages), []).append(pages)
