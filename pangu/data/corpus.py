"""Documents from text, JSON lines and source files, plain or compressed, in an order that depends on names alone."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from pangu.errors import DataError

JSON_SUFFIX = ".jsonl"
TEXT_SUFFIXES = (
    *(".txt", ".md", ".rst", ".tex", ".mm"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".pl"),
    *(".php", ".lua", ".r", ".jl", ".scala", ".kt", ".swift", ".cs", ".hs", ".ml", ".sh", ".sql"),
)
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Document:
    text: str
    fields: dict[str, Any]
    """The whole JSON object the text came from; empty for text files."""
    source: str
    """`FILE`, or `FILE:LINE`."""
    file_position: int
    """Bytes of the file, as it lies on disk, read so far; 0 for a pipe."""


def texts(paths: Sequence[str | Path], text_field: str = "text") -> Iterator[str]:
    """The text of every document of `read_documents`."""
    for document in read_documents(paths, text_field):
        yield document.text


def read_documents(
    paths: Sequence[str | Path], text_field: str = "text", split_lines: bool = False
) -> Iterator[Document]:
    """Stream the documents of files and folders (see `list_files`) in order.

    `.jsonl`: one document per line, its text under `text_field`. Every other file is one document, or with
    `split_lines` one per line. Either may be compressed (`.gz`, `.zst`). Memory holds one document at a time.

    Raises `DataError`, naming file and line or byte, for what is missing, not UTF-8, not JSON or cut short.
    """
    for path in list_files(paths):
        yield from read_file(path, text_field, split_lines)


def list_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `paths` mean, in their order; folders contribute every file of a known kind below them, sorted.

    Hidden files and folders are passed over. Raises `DataError` when a path does not exist or a folder has no corpus.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(_walk(path), key=lambda file: file.relative_to(path).parts)
            if not found:
                kinds = " ".join((JSON_SUFFIX, *TEXT_SUFFIXES))
                raise DataError(f"{path}: no text in this folder; it is looked for in (.gz, .zst too): {kinds}")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; check the path of the corpus")
    if not files:
        raise DataError("no corpus given; name at least one file or folder")
    return files


def read_file(path: Path, text_field: str = "text", split_lines: bool = False) -> Generator[Document, None, None]:
    """The documents of one file; see `read_documents`."""
    try:
        with path.open("rb") as raw:
            stream = _decompress(path, raw)
            if _kind(path) == JSON_SUFFIX:
                yield from _read_json_lines(path, stream, raw, text_field)
            elif split_lines:
                for number, line in _decoded_lines(path, stream):
                    yield Document(line.rstrip("\r\n"), {}, f"{path}:{number}", _position(raw))
            else:
                text = _decode(path, stream.read(), offset=0)
                yield Document(text, {}, str(path), _position(raw))
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or cut-short archive ({error}); fetch or compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(root, name)
            if not name.startswith(".") and _kind(file) in (JSON_SUFFIX, *TEXT_SUFFIXES):
                yield file


def _kind(path: Path) -> str:
    """The suffix below the compression's, in lower case."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def _decompress(path: Path, raw: BinaryIO) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case ".zst":
            return io.BufferedReader(_ZstdReader(raw), buffer_size=1 << 20)
        case _:
            return raw


class _ZstdReader(io.RawIOBase):
    """Reads every frame of a zstd file. Unlike zstandard's own stream reader it notices a frame that is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.compressed = b""
        self.decompressed = memoryview(b"")
        self.inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.decompressed:
            self.compressed = self.compressed or self.raw.read(1 << 14)
            if not self.compressed:
                if self.inside_frame:
                    raise EOFError("the last frame has no end")
                return 0
            self.decompressed = memoryview(self.frame.decompress(self.compressed))
            self.inside_frame = not self.frame.eof
            self.compressed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self.decompressed))
        buffer[:count] = self.decompressed[:count]
        self.decompressed = self.decompressed[count:]
        return count


def _read_json_lines(path: Path, stream: BinaryIO, raw: BinaryIO, text_field: str) -> Iterator[Document]:
    for number, line in _decoded_lines(path, stream):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{source}: not JSON ({error}); every line must be one object") from None
        text = fields.get(text_field) if isinstance(fields, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{source}: {_describe(fields, text_field)}; name the field that holds the text")
        if "\\u" in line and _has_lone_surrogate(text):
            raise DataError(f"{source}: {text_field!r} holds half of a surrogate pair, which is not text; remove it")
        yield Document(text, fields, source, _position(raw))


def _describe(fields: Any, text_field: str) -> str:
    if not isinstance(fields, dict):
        return f"a JSON {type(fields).__name__} instead of an object"
    if text_field not in fields:
        return f"no field {text_field!r} among {sorted(fields)}"
    return f"field {text_field!r} is not a string but {type(fields[text_field]).__name__}"


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _decoded_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Lines, ended by newlines only, and their numbers from 1."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        yield number, _decode(path, line, offset)
        offset += len(line)


def _position(raw: BinaryIO) -> int:
    return raw.tell() if raw.seekable() else 0


def _decode(path: Path, data: bytes, offset: int) -> str:
    """`data`, found `offset` bytes into the (decompressed) file, as text; a byte order mark at its start is dropped."""
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # utf-8-sig reports positions after the mark it dropped.
        position = offset + error.start + len(data) - len(error.object)
        raise DataError(
            f"{path}: not UTF-8 at byte {position} (0x{error.object[error.start]:02x}); "
            f"convert it, for example with: iconv -f ENCODING -t UTF-8 {path}"
        ) from None
