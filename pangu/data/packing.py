"""Windows of the token stream laid end to end as one `Batch`.

`pack` is the reference. packing.cpp does the same in one pass over the memory-mapped files, several times as fast:
numpy takes several passes, and Python a microsecond for every document.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from pangu_kernels.compiled import function

from pangu.data.batch import IGNORED_LABEL, Batch
from pangu.data.stream import StreamWindows

_BATCHES_PER_CALL = 8
"""That share one allocation: of a micro-batch of one sequence, making the tensors takes longer than filling them."""


class Window(Protocol):
    """A stretch of a token stream."""

    def read(self, out: npt.NDArray[np.int64]) -> list[int]:
        """Fill `out` [length] with tokens; the rising offsets in (0, length) at which documents start."""
        ...


def pack_all(
    windows: Sequence[Window],
    micro_batch_size: int,
    sequence_length: int,
    *,
    reset_at_documents: bool,
    reset_positions: bool,
    pad_id: int | None = None,
) -> Iterator[Batch]:
    """`pack` of `micro_batch_size` windows after the other.

    In C++ where windows are `StreamWindows` that fill every micro-batch and are not padded, and there is a compiler.
    """
    compiled = None
    if isinstance(windows, StreamWindows) and len(windows) % micro_batch_size == 0 and pad_id is None:
        compiled = _compiled(windows, micro_batch_size, sequence_length, reset_at_documents, reset_positions)
    for first in range(0, len(windows), _BATCHES_PER_CALL * micro_batch_size):
        end = min(first + _BATCHES_PER_CALL * micro_batch_size, len(windows))
        batches = compiled(first, end) if compiled else None
        yield from batches or (
            pack(
                windows[start : min(start + micro_batch_size, end)],
                sequence_length,
                reset_at_documents=reset_at_documents,
                reset_positions=reset_positions,
                pad_id=pad_id,
            )
            for start in range(first, end, micro_batch_size)
        )


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


def pack_function() -> Callable[..., int] | None:
    """`pack` of packing.cpp; None without a compiler."""
    return function("pack", "pppiiiiiippp:i", Path(__file__).with_suffix(".cpp"))


def _compiled(
    windows: StreamWindows,
    micro_batch_size: int,
    sequence_length: int,
    reset_at_documents: bool,
    reset_positions: bool,
) -> Callable[[int, int], list[Batch] | None] | None:
    """The batches of windows[first:end], at most _BATCHES_PER_CALL; None for windows that only the reference reads."""
    run = pack_function()
    if run is None:
        return None
    table, places = windows.table, windows.places
    num_tokens = micro_batch_size * sequence_length
    boundaries = np.empty(_BATCHES_PER_CALL * (num_tokens + 1), np.int32)
    ends = np.empty(_BATCHES_PER_CALL, np.int64)
    # Taken once: asking numpy for an address takes as long as a call.
    inputs = table.datasets.ctypes.data, table.rows.ctypes.data
    first_place, *outputs = (array.ctypes.data for array in (places, boundaries, ends))

    def pack_range(first: int, end: int) -> list[Batch] | None:
        count = (end - first) // micro_batch_size
        memory = torch.from_numpy(np.empty((3 * count, num_tokens), np.int64))
        if not run(
            *inputs,
            first_place + first * places.strides[0],
            end - first,
            micro_batch_size,
            sequence_length,
            reset_at_documents,
            reset_positions,
            IGNORED_LABEL,
            memory.data_ptr(),
            *outputs,
        ):
            return None
        rows = iter(memory.unbind())
        stretches = pairwise([0, *ends[:count].tolist()])
        return [
            Batch(next(rows), next(rows), next(rows), torch.from_numpy(boundaries[start:stop].copy()))
            for start, stop in stretches
        ]

    return pack_range


def _positions(boundaries: list[int]) -> npt.NDArray[np.int64]:
    """Distance of every token to the boundary before it, [boundaries[-1]]."""
    lengths = [end - start for start, end in pairwise(boundaries)]
    counting = np.arange(max(lengths))
    return np.concatenate([counting[:length] for length in lengths])
