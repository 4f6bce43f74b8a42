"""Windows of the token stream laid end to end as one `Batch`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pangu.data.batch import IGNORED_LABEL, Batch


class Window(Protocol):
    """A stretch of a token stream."""

    def read(self, out: npt.NDArray[np.int64]) -> list[int]:
        """Fill `out` [length] with tokens; the rising offsets in (0, length) at which documents start."""
        ...


def pack(
    windows: Sequence[Window],
    sequence_length: int,
    *,
    reset_at_documents: bool,
    reset_positions: bool,
    pad_id: int | None = None,
) -> Batch:
    """Pack windows of `sequence_length + 1` tokens; the last token of each is only a label.

    Attention always ends with a window. With `reset_at_documents` it also ends with a document, positions start at 0
    with the next, and the last token of a document, its <eod>, has no label. `reset_positions` alone resets positions
    only (Yuan 2.0). A document cut by a window starts afresh in the next. Labels that are `pad_id` are ignored.
    """
    num_tokens = len(windows) * sequence_length
    stream = np.empty(num_tokens + 1, np.int64)
    last_labels = np.empty(len(windows), np.int64)
    sequences = list(range(0, num_tokens + 1, sequence_length))
    documents: list[int] = []
    last_tokens: list[int] = []  # of documents
    for index, start in enumerate(sequences[:-1]):
        row = stream[start : start + sequence_length + 1]
        starts = [start + offset for offset in windows[index].read(row)]
        last_labels[index] = row[-1]  # the next window's first token takes its place
        last_tokens += [following - 1 for following in starts]
        if starts and starts[-1] == start + sequence_length:
            starts.pop()  # the document begins with the window's last label
        documents += [start, *starts]
    documents.append(num_tokens)

    # Not the labels are copied: a copy between addresses that differ by 8 bytes modulo a page is ten times slower.
    tokens, labels = stream[:-1].copy(), stream[1:]
    labels[sequence_length - 1 :: sequence_length] = last_labels
    if reset_at_documents:
        labels[last_tokens] = IGNORED_LABEL
    if pad_id is not None:
        labels[labels == pad_id] = IGNORED_LABEL
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(_positions(documents if reset_at_documents or reset_positions else sequences)),
        cu_seqlens=torch.from_numpy(np.array(documents if reset_at_documents else sequences, np.int32)),
    )


def _positions(boundaries: list[int]) -> npt.NDArray[np.int64]:
    """Distance of every token to the boundary before it, [boundaries[-1]]."""
    lengths = [end - start for start, end in pairwise(boundaries)]
    counting = np.arange(max(lengths))
    return np.concatenate([counting[:length] for length in lengths])
