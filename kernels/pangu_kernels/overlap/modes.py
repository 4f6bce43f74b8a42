"""Which implementation computes a call: asked for by name, or by "auto" from device, limits and size."""

import functools
import logging
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from pangu_kernels.checks import describe
from pangu_kernels.overlap import ascend, cuda

MODES = ("auto", "reference", "chunked", "fused")
FUSED = {"npu": ascend, "cuda": cuda}
"""By device: modules of the same two functions as reference.py, and `limit`, which says why they cannot be called."""

MIN_PIECE_BYTES = 1 << 20
"""Of a rank's part of a collective. Smaller pieces cost more in start-up than they hide: at 50 GB/s and 20 microseconds
a start, 1 MiB takes as long as its start (arithmetic, not a measurement)."""


def choose(
    operator: str,
    mode: str,
    x: Tensor,
    depths: Sequence[int],
    piece_bytes: int,
    rows: int,
    group: dist.ProcessGroup,
    num_chunks: int,
) -> str:
    """One of "reference", "chunked" and "fused", the same on every rank that calls with the same shapes.

    "auto" is fused where the device has a fused operator and nothing exceeds its limits; else chunked if num_chunks
    divides the rows of a rank and pieces are at least MIN_PIECE_BYTES; else reference. depths: the contraction sizes of
    the matmuls that a fused operator would compute, in forward and backward. piece_bytes: a rank's part of a piece.

    Raises ValueError for an unknown mode, and where the one asked for by name cannot compute the call.
    """
    if mode not in MODES:
        raise ValueError(f"{operator}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if num_chunks < 1:
        raise ValueError(f"{operator}: num_chunks must be at least 1, got {num_chunks}")
    uneven = f"num_chunks {num_chunks} does not divide the {rows} rows of a rank" if rows % num_chunks else None
    if mode == "chunked" and uneven:
        raise ValueError(f"{operator}: {uneven} (x is {describe(x)}, the group has {group.size()} ranks)")
    if mode == "fused" or (mode == "auto" and x.device.type in FUSED):
        limit = _limit_of_fused(x, depths, group)
        if limit is None:
            return "fused"
        if mode == "fused":
            raise ValueError(f'{operator}: mode "fused" is impossible, {limit}; choose "chunked" or "auto"')
        _log_once(f"{operator}: not fused, {limit}")
    if mode != "auto":
        return mode
    if piece_bytes < MIN_PIECE_BYTES:
        return "reference"
    if uneven:
        _log_once(f"{operator}: not overlapped, {uneven}")
        return "reference"
    return "chunked"


def _limit_of_fused(x: Tensor, depths: Sequence[int], group: dist.ProcessGroup) -> str | None:
    if x.device.type not in FUSED:
        return f"there is no fused operator on {x.device.type}, only on {' and '.join(FUSED)}"
    return FUSED[x.device.type].limit(x, depths, group)


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
