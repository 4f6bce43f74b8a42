"""Tokenized documents on disk in Megatron's format: `PREFIX.bin` (tokens end to end) and `PREFIX.idx` (where they lie).

The index, little-endian (megatron-core 0.16.1, `megatron/core/datasets/indexed_dataset.py`): the magic bytes, uint64
version 1, uint8 dtype code, uint64 number of sequences, uint64 number of documents + 1; then int32 length of every
sequence, int64 byte offset of every sequence, int64 document table: the first sequence of every document, and the
number of sequences. Pangu writes one sequence per document and reads documents of any number.

`PREFIX.json`, which Megatron does not have, says how the dataset was made.
"""

import contextlib
import dataclasses
import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from pangu.errors import DataError
from pangu.files import sync

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LARGEST_UINT16_VOCABULARY = 65_499
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Metadata:
    """The content of `PREFIX.json`."""

    tokenizer_fingerprint: str
    """sha256 of the sentencepiece model, in hexadecimal."""
    vocab_size: int
    documents: int
    tokens: int
    """Including the <eod> of every document."""
    bytes: int
    """Of the text in UTF-8, before tokenization."""
    domain: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every token id fits, else int32: Megatron's choice (`DType.optimal_dtype`)."""
    return np.dtype("<u2" if vocab_size <= _LARGEST_UINT16_VOCABULARY else "<i4")


class IndexedDataset(Sequence[npt.NDArray[Any]]):
    """The documents of `PREFIX.bin` and `PREFIX.idx`; `dataset[i]` is an array of token ids, a view of the file.

    Both files are memory-mapped and checked against one another in constant time. Raises `DataError` when one is
    missing, cut short or of another format. Pickles as its prefix.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file; build the dataset first, and give its path without .bin or .idx"
                )
        self.dtype, sequences, _ = _read_header(index_path)
        index = np.asarray(np.memmap(index_path, mode="r", dtype=np.uint8))
        sections = np.split(index[_HEADER.size :], [4 * sequences, 12 * sequences])
        self.sequence_lengths: npt.NDArray[np.int32] = sections[0].view("<i4")  # [sequences]
        self.sequence_pointers: npt.NDArray[np.int64] = sections[1].view("<i8")  # [sequences]
        self.first_sequences: npt.NDArray[np.int64] = sections[2].view("<i8")  # [documents + 1]
        if self.first_sequences[0] != 0 or self.first_sequences[-1] != sequences:
            raise DataError(f"{index_path}: the document table does not span its {sequences} sequences; build it again")

        end = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize if sequences else 0
        size = data_path.stat().st_size
        if size != end:
            raise DataError(
                f"{data_path}: {size} bytes, but {index_path.name} describes {end}; "
                "they are not of the same build or one is cut short: build the dataset again"
            )
        # An empty file cannot be mapped; and views of a plain array are made faster than views of a memmap.
        data = np.memmap(data_path, mode="r", dtype=self.dtype) if size else np.empty(0, self.dtype)
        self.tokens: npt.NDArray[Any] = np.asarray(data)  # [num_tokens]
        self.document_offsets = DocumentOffsets(self)
        self.metadata = read_metadata(prefix)
        if self.metadata and (self.metadata.tokens, self.metadata.documents) != (self.num_tokens, len(self)):
            raise DataError(f"{prefix}.json: describes another dataset than {index_path}; build it again or delete it")

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.first_sequences) - 1

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[npt.NDArray[Any]]: ...
    def __getitem__(self, index: int | slice) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        if isinstance(index, slice):
            return [self[document] for document in range(*index.indices(len(self)))]
        document = range(len(self))[index]
        return self.tokens[self.document_offsets[document] : self.document_offsets[document + 1]]

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)


class DocumentOffsets:
    """[documents + 1] token offsets: where each document starts, and where the last one ends.

    Reads the memory-mapped index and copies only what is asked for: an int for an index, an int64 array for a slice.
    `bisect` works on it; numpy's searchsorted would copy it whole.
    """

    def __init__(self, dataset: IndexedDataset) -> None:
        self._first_sequences = dataset.first_sequences
        self._pointers = dataset.sequence_pointers
        self._itemsize = dataset.dtype.itemsize
        self._num_tokens = dataset.num_tokens

    def __len__(self) -> int:
        return len(self._first_sequences)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> npt.NDArray[np.int64]: ...
    def __getitem__(self, index: int | slice) -> int | npt.NDArray[np.int64]:
        if isinstance(index, slice):
            sequences = self._first_sequences[index]
            offsets = np.full(len(sequences), self._num_tokens, np.int64)
            inside = sequences < len(self._pointers)
            offsets[inside] = self._pointers[sequences[inside]] // self._itemsize
            return offsets
        sequence = self._first_sequences[index]
        return self._num_tokens if sequence == len(self._pointers) else int(self._pointers[sequence]) // self._itemsize


def read_metadata(prefix: str | Path) -> Metadata | None:
    """The content of `PREFIX.json`; None where there is none, as beside a dataset that Megatron wrote."""
    path = Path(f"{prefix}.json")
    try:
        return Metadata(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not the description of a dataset ({error}); build it again or delete it") from None


class IndexedDatasetWriter:
    """Writes documents one after the other; before `finish` nothing but temporary files exists.

    Memory does not grow: lengths wait in a temporary file for the index to be put together. As a context manager it
    finishes when the block ends, and leaves nothing behind when it raises. Temporary files lie in `scratch`, which must
    be on the same file system as `prefix`, or beside the dataset.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, scratch: Path | None = None) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in map(np.dtype, _DTYPES.values()):
            raise DataError(f"{prefix}: tokens cannot be stored as {self.dtype}; use uint16 or int32")
        self.scratch = scratch or Path(prefix).parent
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.documents = 0
        self.tokens = 0
        self._suffixes: tuple[str, ...] = ()
        self._data = self._temporary(".bin").open("wb", buffering=_CHUNK)
        self._lengths = self._temporary(".lengths").open("w+b", buffering=_CHUNK)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document of token ids [length]."""
        tokens = np.asarray(tokens)
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Append documents laid end to end in `tokens` [sum of lengths]; `lengths` [documents]."""
        tokens = np.asarray(tokens)
        lengths = np.asarray(lengths, dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if tokens.size and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise DataError(f"{self.prefix}: token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        if lengths.sum() != tokens.size:
            raise ValueError(f"{tokens.size} tokens do not make documents of {lengths.sum()} tokens")
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.prefix}: a document of {lengths.max()} tokens; the format ends at 2^31 - 1: split it"
            )
        self._data.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.documents += lengths.size
        self.tokens += tokens.size

    def finish(self, metadata: Metadata | None = None) -> None:
        """`complete`, then `publish`."""
        try:
            self.complete(metadata)
            self.publish()
        finally:
            self.abort()

    def complete(self, metadata: Metadata | None = None) -> None:
        """Bring everything to the disk under temporary names, so that `publish` has only to rename."""
        self._data.close()
        with self._temporary(".idx").open("wb", buffering=_CHUNK) as index:
            self._write_index(index)
        if metadata:
            self._temporary(".json").write_text(json.dumps(dataclasses.asdict(metadata), indent=2), encoding="utf-8")
        self._suffixes = (".bin", ".json", ".idx") if metadata else (".bin", ".idx")
        for suffix in self._suffixes:
            sync(self._temporary(suffix))

    def publish(self) -> None:
        """Move a completed dataset to its place, the index last: with it the dataset exists.

        An older dataset at the same prefix is gone from the moment the new one starts to appear.
        """
        remove_dataset(self.prefix)
        for suffix in self._suffixes:
            self._temporary(suffix).replace(f"{self.prefix}{suffix}")
        sync(Path(self.prefix).parent)

    def abort(self) -> None:
        """Close and remove the temporary files."""
        for file in (self._data, self._lengths):
            # Closing flushes, which fails again where the disk is full; the file is closed all the same.
            with contextlib.suppress(OSError):
                file.close()
        for suffix in (".bin", ".lengths", ".idx", ".json"):
            self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self.scratch / f"{Path(self.prefix).name}{suffix}.tmp"

    def _write_index(self, index: BinaryIO) -> None:
        code = next(code for code, dtype in _DTYPES.items() if np.dtype(dtype) == self.dtype)
        index.write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, index, _CHUNK)
        self._lengths.seek(0)
        start = np.int64(0)
        while chunk := self._lengths.read(_CHUNK):
            ends = start + np.cumsum(np.frombuffer(chunk, "<i4"), dtype="<i8") * self.dtype.itemsize
            index.write(start.tobytes() + ends[:-1].tobytes())
            start = ends[-1]
        for first in range(0, self.documents + 1, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, self.documents + 1), dtype="<i8").tobytes())


def remove_dataset(prefix: str | Path) -> None:
    """Delete `PREFIX.idx`, then the rest; what does not exist is passed over."""
    for suffix in (".idx", ".json", ".bin"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype of the tokens, number of sequences and of document-table entries; the file has exactly their size."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"{path}: not a Megatron index (magic bytes MMIDIDX missing); build the dataset again")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{path}: version {version} with dtype code {code}; readable are version 1 with integer tokens")
    expected = _HEADER.size + 12 * sequences + 8 * entries
    size = path.stat().st_size
    if size != expected or entries == 0:
        raise DataError(
            f"{path}: {size} bytes, but {sequences} sequences and {entries} document entries need {expected}; "
            "it is cut short or damaged: build the dataset again"
        )
    return np.dtype(_DTYPES[code]), sequences, entries
