"""What is in a tokenized dataset, and whether it is sound."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pangu.data.indexed_dataset import IndexedDataset, Metadata
from pangu.errors import DataError
from pangu.tokenizer.tokenizer import Tokenizer

_CHUNK = 1 << 20
_CHECKED_ENDINGS = 100_000
_SHOWN_DOCUMENTS = 3
_SHOWN_TOKENS = 200


@dataclass(frozen=True)
class LengthBin:
    shortest: int
    """Tokens."""
    longest: int
    documents: int


@dataclass(frozen=True)
class Sample:
    document: int
    length: int
    """Tokens of the whole document."""
    tokens: list[int]
    """The first ones."""
    text: str | None
    """What they decode to, when the tokenizer is given and the right one."""


@dataclass(frozen=True)
class Inspection:
    prefix: str
    dtype: str
    documents: int
    tokens: int
    mean_length: float
    """Tokens per document."""
    length_histogram: list[LengthBin]
    metadata: Metadata | None
    """The dataset's own description; None where Megatron wrote it."""
    tokenizer_matches: bool | None
    """None when no tokenizer is given, or the dataset does not say which it was built with."""
    checked_endings: int
    """Documents, evenly spread, whose last token was looked at."""
    missing_endings: int
    """How many of them do not end with <eod>."""
    samples: list[Sample]


def inspect(
    prefix: str | Path, tokenizer_path: str | Path | None = None, document: int | None = None, as_json: bool = False
) -> Inspection:
    """Print and return what `PREFIX.bin` and `PREFIX.idx` hold, with the first documents or the one asked for.

    Endings are checked and text is decoded when `tokenizer_path` is given. Raises `DataError` for a dataset that is
    missing or damaged, and for a document it does not have.
    """
    dataset = IndexedDataset(prefix)
    if document is not None and not 0 <= document < len(dataset):
        raise DataError(f"{prefix}: no document {document}; it has {len(dataset)}, numbered from 0")
    _check_pointers(dataset)
    tokenizer = Tokenizer(tokenizer_path) if tokenizer_path is not None else None
    matches = None
    if tokenizer and dataset.metadata:
        matches = tokenizer.fingerprint == dataset.metadata.tokenizer_fingerprint
    checked, missing = _check_endings(dataset, tokenizer.eod_id) if tokenizer and matches is not False else (0, 0)
    shown = [document] if document is not None else range(min(_SHOWN_DOCUMENTS, len(dataset)))
    inspection = Inspection(
        prefix=str(prefix),
        dtype=dataset.dtype.name,
        documents=len(dataset),
        tokens=dataset.num_tokens,
        mean_length=dataset.num_tokens / max(1, len(dataset)),
        length_histogram=_length_histogram(dataset),
        metadata=dataset.metadata,
        tokenizer_matches=matches,
        checked_endings=checked,
        missing_endings=missing,
        samples=[_sample(dataset, index, None if matches is False else tokenizer) for index in shown],
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(inspection), indent=2, ensure_ascii=False))
    else:
        _show(inspection, Console())
    return inspection


def _check_pointers(dataset: IndexedDataset) -> None:
    """Every sequence must start where the one before it ends."""
    start = 0
    for first in range(0, len(dataset.sequence_lengths), _CHUNK):
        lengths = dataset.sequence_lengths[first : first + _CHUNK].astype(np.int64)
        ends = start + np.cumsum(lengths) * dataset.dtype.itemsize
        starts = dataset.sequence_pointers[first : first + _CHUNK]
        wrong = np.flatnonzero((starts != ends - lengths * dataset.dtype.itemsize) | (lengths < 0))
        if wrong.size:
            raise DataError(f"{dataset.prefix}.idx: sequence {first + wrong[0]} is misplaced; build the dataset again")
        start = int(ends[-1])


def _check_endings(dataset: IndexedDataset, eod_id: int) -> tuple[int, int]:
    """Documents looked at, and those among them that do not end with <eod>."""
    count = min(len(dataset), _CHECKED_ENDINGS)
    documents = np.linspace(0, len(dataset) - 1, count, dtype=np.int64)
    missing = sum(dataset[int(index)][-1:].tolist() != [eod_id] for index in documents)
    return count, missing


def _length_histogram(dataset: IndexedDataset) -> list[LengthBin]:
    """Documents per length, in bins that double: 0, 1, 2-3, 4-7, ..."""
    counts = np.zeros(65, np.int64)
    for first in range(0, len(dataset), _CHUNK):
        lengths = np.diff(dataset.document_offsets[first : min(first + _CHUNK, len(dataset)) + 1])
        # frexp's exponent is the number of bits of an integer.
        counts += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=len(counts))
    occupied = np.flatnonzero(counts)
    bins = range(occupied[0], occupied[-1] + 1) if occupied.size else range(0)
    return [LengthBin((1 << bits) >> 1, (1 << bits) - 1, int(counts[bits])) for bits in bins]


def _sample(dataset: IndexedDataset, document: int, tokenizer: Tokenizer | None) -> Sample:
    tokens = dataset[document]
    shown = tokens[:_SHOWN_TOKENS].tolist()
    if tokenizer and shown and max(shown) >= tokenizer.vocab_size:
        raise DataError(
            f"{dataset.prefix}: token {max(shown)} in document {document}, but the tokenizer has only "
            f"{tokenizer.vocab_size}; give the one the dataset was built with"
        )
    return Sample(document, len(tokens), shown, tokenizer.decode(shown) if tokenizer else None)


def _show(inspection: Inspection, console: Console) -> None:
    console.print(_facts(inspection))
    table = Table("tokens", "documents", "", title="Document lengths")
    most = max((row.documents for row in inspection.length_histogram), default=1)
    for row in inspection.length_histogram:
        bar = "█" * max(round(40 * row.documents / most), row.documents > 0)
        table.add_row(f"{row.shortest:,} - {row.longest:,}", f"{row.documents:,}", bar)
    console.print(table)
    for sample in inspection.samples:
        more = " ..." if sample.length > len(sample.tokens) else ""
        console.rule(f"document {sample.document}, {sample.length:,} tokens")
        console.print(escape(str(sample.tokens) if sample.text is None else sample.text) + more)


def _facts(inspection: Inspection) -> Table:
    table = Table("", "", title=escape(inspection.prefix), show_header=False)
    facts = {
        "documents": f"{inspection.documents:,}",
        "tokens": f"{inspection.tokens:,} ({inspection.dtype})",
        "mean length": f"{inspection.mean_length:,.1f} tokens",
    }
    if inspection.metadata:
        metadata = inspection.metadata
        facts["text"] = f"{metadata.bytes:,} bytes, {metadata.bytes / max(1, metadata.tokens):.2f} per token"
        facts["domain"] = metadata.domain or "(none)"
        facts["tokenizer"] = f"{metadata.tokenizer_fingerprint[:12]}, {metadata.vocab_size:,} entries"
    if inspection.tokenizer_matches is not None:
        facts["tokenizer given"] = "the same" if inspection.tokenizer_matches else "[red]another: cannot be decoded[/]"
    if inspection.checked_endings:
        text = f"{inspection.checked_endings:,} checked, {inspection.missing_endings:,} without <eod>"
        facts["endings"] = f"[red]{text}[/]" if inspection.missing_endings else text
    for name, value in facts.items():
        table.add_row(name, value)
    return table
