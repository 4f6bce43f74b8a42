"""The documents of one or more datasets as one stream of tokens."""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        self._ends = np.cumsum([dataset.num_tokens for dataset in datasets]).tolist()

    @property
    def num_tokens(self) -> int:
        return self._ends[-1]

    def read(self, start: int, out: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Fill `out` [length] from token `start`; the offsets in (0, length) at which documents start."""
        index = bisect.bisect_right(self._ends, start)
        starts = []
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
            starts.append(_document_starts(dataset, after, first + len(tokens)) + (filled - first))
            filled += len(tokens)
            index += 1
        return starts[0] if len(starts) == 1 else np.concatenate(starts)

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

    def read(self, out: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Fill `out` [length]; the offsets in (0, length) at which documents start."""
        return self.stream.read(self.start, out)


def _document_starts(dataset: IndexedDataset, after: int, before: int) -> npt.NDArray[np.int64]:
    """Token offsets strictly between the two at which documents of `dataset` start."""
    offsets = dataset.document_offsets
    first = bisect.bisect_right(offsets, after)
    return offsets[first : bisect.bisect_left(offsets, before, first)]
