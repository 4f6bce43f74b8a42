"""Tokenize a corpus into a dataset: in parallel, in order, with memory that does not grow with the corpus."""

import contextlib
import errno
import fcntl
import hashlib
import math
import multiprocessing
import os
import queue
import shutil
import signal
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from pangu.data.corpus import Document, list_files, read_file
from pangu.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, Metadata, remove_dataset, token_dtype
from pangu.errors import DataError
from pangu.tokenizer.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 1 << 20
_CHUNKS_PER_WORKER = 3


@dataclass(frozen=True)
class BuildResult:
    dataset: Metadata
    validation: Metadata | None
    """None when nothing was held out."""
    skipped: int
    """Documents without text."""


@dataclass
class _Chunk:
    """Consecutive documents on their way to a worker."""

    texts: list[str] = field(default_factory=list)
    sort_keys: list[float] = field(default_factory=list)
    characters: int = 0
    skipped: int = 0
    bytes_read: int = 0
    """Of all files, as they lie on disk, up to the end of this chunk."""

    def add(self, document: Document, bytes_before: int, sort_by: str | None) -> None:
        self.bytes_read = bytes_before + document.file_position
        if not document.text.strip():
            self.skipped += 1
            return
        self.texts.append(document.text)
        self.characters += len(document.text)
        if sort_by is not None:
            self.sort_keys.append(_sort_key(document, sort_by))


@dataclass(frozen=True)
class _Tokenized:
    tokens: npt.NDArray[Any]  # [sum of lengths]
    lengths: npt.NDArray[np.int64]  # [documents]
    text_bytes: npt.NDArray[np.int64]  # [documents]
    held_out: npt.NDArray[np.bool_]  # [documents]


def build(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    domain: str = "",
    workers: int | None = None,
    shuffle_seed: int | None = None,
    sort_by: str | None = None,
    validation_fraction: float = 0.0,
    text_field: str = "text",
    split_lines: bool = False,
    show_progress: bool = True,
) -> BuildResult:
    """Tokenize the documents of files and folders (`corpus.read_documents`) into `OUTPUT_PREFIX.{bin,idx,json}`.

    Every document ends with <eod>; those without text are skipped and counted. The files are the same to the byte for
    any number of `workers` (by default one per core). `validation_fraction` holds out whole documents, chosen by a hash
    of their text, in `OUTPUT_PREFIX.validation`. `shuffle_seed` puts documents in random order. `sort_by` orders them
    by a number in their JSON object, such as its difficulty, lowest first; equals stay in their (shuffled) order.

    Nothing appears at the prefix before everything is on disk; what a killed build leaves in `OUTPUT_PREFIX.building`
    is deleted by the next one. Raises `DataError` for what the user can mend, a full disk included.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise DataError(f"workers is {workers}; at least one process must tokenize")
    files = list_files(inputs)
    tokenizer = Tokenizer(tokenizer_path)
    held_out_below = int(validation_fraction * 2**64)
    prefixes = [str(output_prefix)] + ([f"{output_prefix}.validation"] if validation_fraction else [])
    with _disk_errors(output_prefix), _work_folder(output_prefix) as folder, contextlib.ExitStack() as cleanup:
        parts = [_Part(prefix, folder, tokenizer, sort_by, shuffle_seed) for prefix in prefixes]
        for part in parts:
            cleanup.callback(part.close)
        # Generators are closed here and not by the garbage collector, for which an error's traceback keeps them.
        chunks = cleanup.enter_context(contextlib.closing(_chunks(files, text_field, split_lines, sort_by)))
        tokenized_chunks = cleanup.enter_context(
            contextlib.closing(_tokenize(chunks, tokenizer, held_out_below, workers))
        )
        show = cleanup.enter_context(_progress_bar(files, show_progress))
        skipped = 0
        for chunk, tokenized in tokenized_chunks:
            skipped += chunk.skipped
            for part, belongs in zip(parts, (~tokenized.held_out, tokenized.held_out), strict=False):
                part.add(tokenized, belongs, chunk.sort_keys)
            show(chunk.bytes_read)
        _check_not_empty(parts, inputs, skipped, validation_fraction)
        for part in parts:
            part.reorder()
        metadata = _publish(parts, tokenizer, domain)
    return BuildResult(metadata[0], metadata[1] if validation_fraction else None, skipped)


def _chunks(
    files: list[Path], text_field: str, split_lines: bool, sort_by: str | None
) -> Generator[_Chunk, None, None]:
    """Group documents so that a chunk is worth sending to another process."""
    chunk = _Chunk()
    bytes_before = 0
    for file in files:
        with contextlib.closing(read_file(file, text_field, split_lines)) as documents:
            for document in documents:
                chunk.add(document, bytes_before, sort_by)
                if chunk.characters >= _CHUNK_CHARACTERS:
                    yield chunk
                    chunk = _Chunk()
        bytes_before += file.stat().st_size
    yield chunk


def _sort_key(document: Document, sort_by: str) -> float:
    value = document.fields.get(sort_by)
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        raise DataError(
            f"{document.source}: {sort_by!r} is {value!r}; to sort by it every document needs a number there"
        )
    return float(value)


def _encode(tokenizer: Tokenizer, texts: list[str], held_out_below: int) -> _Tokenized:
    """Token ids of every text, each ended by <eod>, and whether its hash is one of those held out."""
    ids = [np.array([*tokenizer.encode(text), tokenizer.eod_id], token_dtype(tokenizer.vocab_size)) for text in texts]
    encoded = [text.encode() for text in texts]
    hashes = [int.from_bytes(hashlib.sha256(text).digest()[:8], "big") for text in encoded]
    return _Tokenized(
        tokens=np.concatenate(ids) if ids else np.empty(0, token_dtype(tokenizer.vocab_size)),
        lengths=np.array([len(document) for document in ids], np.int64),
        text_bytes=np.array([len(text) for text in encoded], np.int64),
        held_out=np.array([value < held_out_below for value in hashes], np.bool_),
    )


def _tokenize(
    chunks: Iterable[_Chunk], tokenizer: Tokenizer, held_out_below: int, workers: int
) -> Generator[tuple[_Chunk, _Tokenized], None, None]:
    """Every chunk with its tokens, in order; only a few chunks per worker are in memory at a time."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, _encode(tokenizer, chunk.texts, held_out_below)
        return
    processes = [_WorkerProcess(str(tokenizer.path), held_out_below) for _ in range(workers)]
    idle: queue.SimpleQueue[_WorkerProcess] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def encode_in_idle_process(texts: list[str]) -> _Tokenized:
        process = idle.get()
        try:
            return process.encode(texts)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(workers)
    in_flight: deque[tuple[_Chunk, Future[_Tokenized]]] = deque()
    try:
        for chunk in chunks:
            in_flight.append((chunk, threads.submit(encode_in_idle_process, chunk.texts)))
            if len(in_flight) == _CHUNKS_PER_WORKER * workers:
                done, future = in_flight.popleft()
                yield done, future.result()
        for done, future in in_flight:
            yield done, future.result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)


class _WorkerProcess:
    """A process that encodes what it is sent. It ends when its parent does, however that ends.

    The pipe between the two is all they share, so that the death of either is seen by the other as the pipe's end.
    (`ProcessPoolExecutor` can wait forever when a worker dies while it starts another.)
    """

    def __init__(self, tokenizer_path: str, held_out_below: int) -> None:
        # Spawned, because forking is unsafe beside the threads of the parent.
        spawn = multiprocessing.get_context("spawn")
        self._connection, child_connection = spawn.Pipe()
        arguments = (child_connection, tokenizer_path, held_out_below)
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        child_connection.close()

    def encode(self, texts: list[str]) -> _Tokenized:
        try:
            self._connection.send(texts)
            reply = self._connection.recv()
        except (EOFError, ConnectionError):
            raise DataError(
                "a tokenizing process died. Out of memory: use fewer workers. In a script of your own: call build() "
                "below `if __name__ == '__main__':`"
            ) from None
        if isinstance(reply, DataError):
            raise reply
        return reply

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, tokenizer_path: str, held_out_below: int) -> None:
    """Encode lists of texts until the other end is closed. Interrupts are left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            texts = connection.recv()
            try:
                tokenizer = tokenizer or Tokenizer(tokenizer_path)
                reply: _Tokenized | DataError = _encode(tokenizer, texts, held_out_below)
            except DataError as error:
                reply = error
            connection.send(reply)


class _Part:
    """What becomes one dataset: the documents to train on, or those held out."""

    def __init__(
        self, prefix: str, folder: Path, tokenizer: Tokenizer, sort_by: str | None, shuffle_seed: int | None
    ) -> None:
        self.prefix = prefix
        self.folder = folder
        self.shuffle_seed = shuffle_seed
        self.reordered = sort_by is not None or shuffle_seed is not None
        self.sort_keys = array("d")
        self.text_bytes = 0
        dtype = token_dtype(tokenizer.vocab_size)
        unordered = folder / f"{Path(prefix).name}.unordered"
        self.writer = IndexedDatasetWriter(unordered if self.reordered else prefix, dtype, folder)

    def add(self, tokenized: _Tokenized, belongs: npt.NDArray[np.bool_], sort_keys: list[float]) -> None:
        """Append the documents of a chunk for which `belongs` [documents] is true."""
        self.writer.add_documents(tokenized.tokens[np.repeat(belongs, tokenized.lengths)], tokenized.lengths[belongs])
        self.text_bytes += int(tokenized.text_bytes[belongs].sum())
        self.sort_keys.extend(key for key, mine in zip(sort_keys, belongs, strict=False) if mine)

    def reorder(self) -> None:
        """Copy the documents, read in random access, in their final order; memory holds a permutation of them."""
        if not self.reordered:
            return
        self.writer.finish()
        unordered = IndexedDataset(self.writer.prefix)
        order = np.arange(len(unordered))
        if self.shuffle_seed is not None:
            order = np.random.default_rng(self.shuffle_seed).permutation(len(unordered))
        if self.sort_keys:
            order = order[np.argsort(np.asarray(self.sort_keys)[order], kind="stable")]
        self.writer = IndexedDatasetWriter(self.prefix, unordered.dtype, self.folder)
        for document in order:
            self.writer.add_document(unordered[int(document)])

    def describe(self, tokenizer: Tokenizer, domain: str) -> Metadata:
        return Metadata(
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            documents=self.writer.documents,
            tokens=self.writer.tokens,
            bytes=self.text_bytes,
            domain=domain,
        )

    def close(self) -> None:
        self.writer.abort()


def _publish(parts: list[_Part], tokenizer: Tokenizer, domain: str) -> list[Metadata]:
    """Complete every dataset before the first appears, the one to train on last."""
    descriptions = [part.describe(tokenizer, domain) for part in parts]
    for part, description in zip(parts, descriptions, strict=True):
        part.writer.complete(description)
    remove_dataset(parts[0].prefix)
    for part in reversed(parts):
        part.writer.publish()
    return descriptions


def _check_not_empty(
    parts: list[_Part], inputs: Sequence[str | Path], skipped: int, validation_fraction: float
) -> None:
    documents = [part.writer.documents for part in parts]
    if not sum(documents):
        names = ", ".join(map(str, inputs))
        raise DataError(f"{names}: no text in this corpus ({skipped} empty documents); check the files")
    if 0 in documents:
        raise DataError(
            f"validation_fraction {validation_fraction} splits {sum(documents)} documents into {documents[0]} and "
            f"{documents[1]}; change it, or hold out a file of your own choice by building it separately"
        )


@contextlib.contextmanager
def _work_folder(prefix: str | Path) -> Iterator[Path]:
    """`PREFIX.building`: empty, ours alone, and gone in the end. A killed build's is taken over."""
    folder = Path(f"{prefix}.building")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{prefix}: another process is building this dataset; wait for it") from None
        # Only for their space: nothing reads them.
        for leftover in folder.iterdir():
            leftover.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(prefix: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "free some space or build elsewhere" if error.errno == errno.ENOSPC else "check the output folder"
        raise DataError(f"{prefix}: the dataset cannot be written ({error.strerror or error}); {fix}") from error


@contextlib.contextmanager
def _progress_bar(files: list[Path], visible: bool) -> Iterator[Callable[[int], None]]:
    """A bar that counts the corpus as it lies on disk; call with the bytes done."""
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as progress:
        task = progress.add_task("tokenizing", total=sum(file.stat().st_size for file in files))
        yield lambda done: progress.update(task, completed=done)
