"""What is read from files and folders, in which order, and what is said of files that cannot be read."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.data.corpus import list_files, read_documents, texts
from pangu.errors import DataError


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _jsonl(*documents: object) -> str:
    return "".join(json.dumps(document) + "\n" for document in documents)


def test_a_folder_is_read_sorted_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/B.md", ".git/config.txt", ".hidden.txt", "weights.bin", "c.jsonl.gz", "a.txt"):
        _write(tmp_path / name, "")
    names = [file.relative_to(tmp_path).as_posix() for file in list_files([tmp_path])]
    assert names == ["a/B.md", "a/z.py", "a.txt", "b.txt", "c.jsonl.gz"]


def test_paths_are_read_in_the_order_given_whatever_their_suffix(tmp_path: Path) -> None:
    paths = [_write(tmp_path / "b", "second"), _write(tmp_path / "a.log", "first\r\nline")]
    assert list(texts(paths)) == ["second", "first\r\nline"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_kind_of_file_is_read_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    code = "def f():\n    return '盘古'\n"
    lines = _jsonl({"text": "one", "difficulty": 2}, {"text": "two\n三"}) + "\n" + _jsonl({"text": ""})
    _write(tmp_path / f"a.py{suffix}", pack(code.encode()))
    _write(tmp_path / f"b.jsonl{suffix}", pack(lines.encode()))
    documents = list(read_documents([tmp_path]))
    assert [document.text for document in documents] == [code, "one", "two\n三", ""]
    assert documents[1].fields == {"text": "one", "difficulty": 2}
    assert [document.source for document in documents] == [
        str(tmp_path / f"a.py{suffix}"),
        *(f"{tmp_path}/b.jsonl{suffix}:{line}" for line in (1, 2, 4)),
    ]
    assert documents[-1].file_position == (tmp_path / f"b.jsonl{suffix}").stat().st_size


def test_lines_of_a_text_file_can_be_documents(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "one\r\ntwo\x85still two\n\nfour")
    assert [d.text for d in read_documents([path], split_lines=True)] == ["one", "two\x85still two", "", "four"]


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    assert list(texts([_write(tmp_path / "a.jsonl", _jsonl({"content": "x"}))], "content")) == ["x"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    paths = [
        _write(tmp_path / "a.txt", b"\xef\xbb\xbfhi"),
        _write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "x"}\n'),
    ]
    assert list(texts(paths)) == ["hi", "x"]


def test_concatenated_zstd_frames_are_one_file(tmp_path: Path) -> None:
    frames = zstandard.compress(b'{"text": "a"}\n{"te') + zstandard.compress(b'xt": "b"}\n')
    assert list(texts([_write(tmp_path / "a.jsonl.zst", frames)])) == ["a", "b"]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1))
def test_any_text_comes_back_from_json_lines(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(_jsonl(*({"text": text} for text in documents)).encode()))
    assert list(texts([path])) == documents


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    lines = _jsonl(*({"text": random.Random(seed).randbytes(5_000).hex()} for seed in range(1_000)))
    path = _write(tmp_path / f"a{suffix}", pack(lines.encode()))
    tracemalloc.start()
    assert sum(1 for _ in read_documents([path])) == 1_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(lines) / 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\xff", r"a\.txt: not UTF-8 at byte 4 \(0xff\); convert it, for example with: iconv"),
        ("a.txt", b"\xef\xbb\xbfgood\xff", r"a\.txt: not UTF-8 at byte 7 \(0xff\)"),
        ("a.txt", "hi".encode("utf-16"), r"not UTF-8 at byte 0 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xb2"}\n', r"a\.jsonl: not UTF-8 at byte 24 \(0xb2\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n\xb2', mtime=0), r"a\.jsonl\.gz: not UTF-8 at byte 14"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", '["a"]', r"a\.jsonl:1: a JSON list instead of an object"),
        ("a.jsonl", '{"content": "a", "id": 1}', r"a\.jsonl:1: no field 'text' among \['content', 'id'\]; name the"),
        ("a.jsonl", '{"text": null}', r"a\.jsonl:1: field 'text' is not a string but NoneType"),
        ("a.jsonl", '{"text": "\\ud800"}', r"a\.jsonl:1: 'text' holds half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], r"a\.txt\.gz: damaged or cut-short archive"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: damaged or cut-short archive"),
        ("a.txt.zst", zstandard.compress(b"x" * 1000)[:-3], r"a\.txt\.zst: damaged or cut-short archive"),
        ("a.txt.zst", b"plain text", r"a\.txt\.zst: damaged or cut-short archive"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        list(read_documents([_write(tmp_path / name, content)]))


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "model.bin", "")
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        list_files([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no text in this folder; it is looked for in .* \.jsonl \.txt"):
        list_files([tmp_path])
    with pytest.raises(DataError, match="no corpus given"):
        list_files([])
