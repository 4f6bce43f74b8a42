"""Which part of a parameter this rank holds, and that part's initial values."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from pangu.model import Transformer
from pangu.model.init import BLOCK_ELEMENTS, initial_rows
from pangu.model.local import local

Region = tuple[slice, ...]


def local_region(parameter: Tensor) -> Region:
    """This rank's part of a parameter's whole shape, one slice per dimension.

    FSDP shards what tensor parallelism left of a dimension, though its mesh dimension comes first (DTensor's strided
    shards): dimensions of the mesh are followed from the last to the first.
    """
    region = [slice(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        coordinates = parameter.device_mesh.get_coordinate()
        assert coordinates is not None, "this rank is outside the parameter's mesh"
        placed = zip(parameter.placements, parameter.device_mesh.shape, coordinates, strict=True)
        for placement, size, index in reversed(list(placed)):
            if isinstance(placement, Shard | _StridedShard):
                region[placement.dim] = _chunk(region[placement.dim], size, index)
    return tuple(region)


def init_shards(model: Transformer, seed: int) -> None:
    """`pangu.model.init_weights` for a distributed model: the same values as on one device, and only this rank's."""
    for name, parameter in model.named_parameters():
        shard = local(parameter.detach())
        if shard.numel():
            _fill(model, name, parameter.shape, local_region(parameter), shard, seed)


def _fill(model: Transformer, name: str, shape: torch.Size, region: Region, shard: Tensor, seed: int) -> None:
    rows = shard.view(-1, shard.shape[-1])
    columns = region[-1]
    step = max(1, BLOCK_ELEMENTS // shape[-1])
    filled = 0
    for start, stop in _row_runs(shape, region[:-1]):
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = initial_rows(model.config, name, shape, first, last, seed)[:, columns]
            rows[filled : filled + last - first].copy_(values)
            filled += last - first


def _row_runs(shape: torch.Size, region: Region) -> Iterator[tuple[int, int]]:
    """Stretches of consecutive rows of `[-1, shape[-1]]` in the region, which is of all dimensions but the last."""
    if not region:
        yield 0, 1
        return
    *outer, inner = region
    for index in product(*(range(part.start, part.stop) for part in outer)):
        row = 0
        for position, size in zip(index, shape, strict=False):
            row = row * size + position
        row *= shape[len(region) - 1]
        yield row + inner.start, row + inner.stop


def _chunk(whole: slice, size: int, index: int) -> slice:
    """Part `index` of `size` as torch.chunk cuts: the last parts may be short or empty."""
    length = whole.stop - whole.start
    step = -(-length // size)
    start = min(index * step, length)
    return slice(whole.start + start, whole.start + min(start + step, length))
