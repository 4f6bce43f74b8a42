"""Rows in pieces, of which one is communicated while another is multiplied: overlap over any backend of c10d.

Piece i of every rank's rows makes up one collective.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pangu_kernels.overlap.collectives import start_all_gather, start_reduce_scatter, wait


def all_gather_matmul(
    x: Tensor, matrices: Sequence[Tensor], group: dist.ProcessGroup, keep_gathered: bool, num_chunks: int
) -> tuple[list[Tensor], Tensor | None]:
    """`reference.all_gather_matmul`, piece i + 1 arriving while piece i is multiplied.

    One piece arrives at a time: a second would take its share of the link from the one that is needed first.
    """
    size, rows = group.size(), len(x) // num_chunks
    pieces = x.view(num_chunks, rows, x.shape[1])
    products = [x.new_empty(size, num_chunks, rows, matrix.shape[1]) for matrix in matrices]
    gathered = x.new_empty(size, num_chunks, rows, x.shape[1]) if keep_gathered else None
    arriving = start_all_gather(pieces[0], group)
    for index in range(num_chunks):
        piece = wait(arriving)  # [size * rows, K]
        if index + 1 < num_chunks:
            arriving = start_all_gather(pieces[index + 1], group)
        for product, matrix in zip(products, matrices, strict=True):
            product[:, index] = (piece @ matrix).unflatten(0, (size, rows))
        if gathered is not None:
            gathered[:, index] = piece.unflatten(0, (size, rows))
    return [product.flatten(0, 2) for product in products], None if gathered is None else gathered.flatten(0, 2)


def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: dist.ProcessGroup, num_chunks: int) -> Tensor:
    """`reference.matmul_reduce_scatter`, piece i leaving while piece i + 1 is multiplied."""
    size = group.size()
    rows = len(x) // size // num_chunks
    pieces = x.view(size, num_chunks, rows, x.shape[1])
    leaving = [
        start_reduce_scatter(pieces[:, index].flatten(0, 1) @ matrix, group)  # of [size * rows, N]
        for index in range(num_chunks)
    ]
    return torch.cat([wait(piece) for piece in leaving])
