"""Windows of the token stream laid end to end as one `Batch`."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pangu.data.batch import IGNORED_LABEL, Batch


class Window(Protocol):
    """A stretch of a token stream."""

    def read(self, out: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Fill `out` [length] with tokens; the rising offsets in (0, length) at which documents start."""
        ...


def pack(
    windows: Sequence[Window],
    sequence_length: int,
    micro_batch_size: int,
    *,
    reset_at_documents: bool,
    reset_positions: bool,
    pad_id: int | None = None,
) -> list[Batch]:
    """Batches of `micro_batch_size` windows of `sequence_length + 1` tokens, whose last token is only a label.

    Attention always ends with a window. With `reset_at_documents` it also ends with a document, positions start at 0
    with the next, and the last token of a document, its <eod>, has no label. `reset_positions` alone resets positions
    only (Yuan 2.0). A document cut by a window starts afresh in the next. Labels that are `pad_id` are ignored.

    The batches are views of common arrays: numpy's cost per call is that of some thousand tokens.
    """
    num_tokens = len(windows) * sequence_length
    stream = np.empty(num_tokens + 1, np.int64)
    last_labels = np.empty(len(windows), np.int64)
    offsets = []  # of documents in each window
    for index, window in enumerate(windows):
        start = index * sequence_length
        row = stream[start : start + sequence_length + 1]
        offsets.append(window.read(row))
        last_labels[index] = row[-1]  # where the next window's first token goes
    sequences = np.arange(0, num_tokens + 1, sequence_length)
    starts = np.concatenate(offsets) + np.repeat(sequences[:-1], [len(each) for each in offsets])

    # Not the labels are copied: a copy between addresses that differ by 8 bytes modulo a page is ten times slower.
    tokens, labels = stream[:-1].copy(), stream[1:]
    labels[sequence_length - 1 :: sequence_length] = last_labels
    if reset_at_documents:
        labels[starts - 1] = IGNORED_LABEL
    if pad_id is not None:
        labels[labels == pad_id] = IGNORED_LABEL

    documents = np.unique(np.concatenate([sequences, starts]))
    position_ids = _positions(documents if reset_at_documents or reset_positions else sequences)
    size = micro_batch_size * sequence_length
    cu_seqlens = _split_boundaries(documents if reset_at_documents else sequences, size)
    flat = (torch.from_numpy(array).split(size) for array in (tokens, labels, position_ids))
    return [Batch(*tensors) for tensors in zip(*flat, cu_seqlens, strict=True)]


def _positions(boundaries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Distance of every token to the boundary before it, [boundaries[-1]]."""
    lengths = np.diff(boundaries)
    counting = np.arange(lengths.max())
    return np.concatenate([counting[:length] for length in lengths.tolist()])


def _split_boundaries(boundaries: npt.NDArray[np.int64], size: int) -> tuple[torch.Tensor, ...]:
    """The boundaries inside each stretch of `size` tokens, ends included, counted from its beginning; int32."""
    edges = np.append(np.arange(0, boundaries[-1], size), boundaries[-1])
    # An inner edge ends one stretch and begins the next.
    shared = np.sort(np.concatenate([boundaries, edges[1:-1]]))
    counts = np.diff(np.searchsorted(boundaries, edges)) + 1
    local = shared - np.repeat(edges[:-1], counts)
    return torch.from_numpy(local.astype(np.int32)).split(counts.tolist())
