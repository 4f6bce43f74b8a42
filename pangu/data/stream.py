"""The documents of one or more datasets as one stream of tokens."""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from pangu.data.indexed_dataset import IndexedDataset
from pangu.errors import DataError


class TokenStream:
    """Datasets laid end to end, as stored. Reads through memory maps; holds nothing that grows with the datasets.

    A dataset without metadata does not say which token ids it has: those are checked against `vocab_size` when read.
    """

    def __init__(self, datasets: Sequence[IndexedDataset], vocab_size: int) -> None:
        self.datasets = tuple(datasets)
        self._vocab_size = vocab_size
        self._document_starts = [_DocumentStarts(dataset) for dataset in datasets]
        self._ends = np.cumsum([dataset.num_tokens for dataset in datasets]).tolist()

    @property
    def num_tokens(self) -> int:
        return self._ends[-1]

    def read(self, start: int, out: npt.NDArray[np.int64]) -> list[int]:
        """Fill `out` [length] from token `start`; the offsets in (0, length) at which documents start."""
        index = bisect.bisect_right(self._ends, start)
        starts: list[int] = []
        filled = 0
        while filled < len(out):
            dataset = self.datasets[index]
            first = start + filled - (self._ends[index] - dataset.num_tokens)
            tokens = dataset.tokens[first : first + len(out) - filled]
            if dataset.metadata is None:
                self._check_ids(dataset, tokens)
            out[filled : filled + len(tokens)] = tokens
            # The document at the head of a further dataset starts inside the window, one at `start` does not.
            after = first - 1 if filled else first
            starts += self._document_starts[index].between(after, first + len(tokens), first - filled)
            filled += len(tokens)
            index += 1
        return starts

    def table(self) -> list[list[int]]:
        """The fields of `Dataset` in `packing.cpp`, of each dataset."""
        return [
            [
                dataset.tokens.ctypes.data,
                dataset.dtype.itemsize if dataset.dtype in ("<u2", "<i4") else 0,
                dataset.num_tokens,
                end,
                dataset.sequence_pointers.ctypes.data,
                0 if _one_sequence_each(dataset) else dataset.first_sequences.ctypes.data,
                len(dataset.sequence_pointers),
                len(dataset),
                self._vocab_size if dataset.metadata is None else 0,
            ]
            for dataset, end in zip(self.datasets, self._ends, strict=True)
        ]

    def _check_ids(self, dataset: IndexedDataset, tokens: npt.NDArray[Any]) -> None:
        if tokens.max() >= self._vocab_size:
            raise DataError(
                f"dataset {dataset.prefix} has token id {tokens.max()}, but model.vocab_size is {self._vocab_size}; "
                "raise it, or build the dataset with another tokenizer"
            )


class StreamWindow(NamedTuple):
    """The tokens of a stream from `start` on."""

    stream: TokenStream
    start: int

    def read(self, out: npt.NDArray[np.int64]) -> list[int]:
        """Fill `out` [length]; the offsets in (0, length) at which documents start."""
        return self.stream.read(self.start, out)


class StreamTable:
    """Streams as `packing.cpp` reads them: the addresses of their memory maps.

    datasets: int64 [datasets of all streams, fields]. rows: int64 [streams + 1], the first dataset of each stream.
    """

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self.streams = tuple(streams)
        self.rows = np.cumsum([0, *(len(stream.datasets) for stream in streams)])
        self.datasets = np.array([row for stream in streams for row in stream.table()])


class StreamWindows(Sequence[StreamWindow]):
    """Windows of several streams; `places` int64 [windows, 2]: of each the index of its stream and the first token."""

    def __init__(self, table: StreamTable, places: npt.NDArray[np.int64]) -> None:
        self.table = table
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> StreamWindow: ...
    @overload
    def __getitem__(self, index: slice) -> "StreamWindows": ...
    def __getitem__(self, index: int | slice) -> "StreamWindow | StreamWindows":
        if isinstance(index, slice):
            return StreamWindows(self.table, self.places[index])
        stream, start = self.places[index].tolist()
        return StreamWindow(self.table.streams[stream], start)


class _DocumentStarts:
    """Finds documents by token offset in the memory-mapped index, in a microsecond where it can."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self._offsets: Any = dataset.document_offsets
        self._unit = 1
        if _one_sequence_each(dataset):
            # The byte offsets of sequences will do, and bisect is fast on a memoryview.
            self._offsets = dataset.sequence_pointers.view(np.uint8).data.cast("q")
            self._unit = dataset.dtype.itemsize

    def between(self, after: int, before: int, origin: int) -> list[int]:
        """Where documents start strictly between two token offsets, as rising distances from `origin`."""
        first = bisect.bisect_right(self._offsets, after * self._unit)
        last = bisect.bisect_left(self._offsets, before * self._unit, first)
        # A set, as several start at one place where documents are empty.
        return sorted({offset // self._unit - origin for offset in self._offsets[first:last].tolist()})


def _one_sequence_each(dataset: IndexedDataset) -> bool:
    """Whether every document is one sequence, as Pangu writes them."""
    return len(dataset) == len(dataset.sequence_lengths)
