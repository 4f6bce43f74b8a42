"""The on-disk format, against megatron-core's own builder and reader, and against damage."""

import bisect
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import indexed_dataset as megatron

from pangu.data import indexed_dataset
from pangu.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, Metadata, token_dtype
from pangu.errors import DataError

Documents = list[list[int]]
documents_strategy = st.lists(st.lists(st.integers(0, 65_535), max_size=20), max_size=20)
METADATA = Metadata("f" * 64, vocab_size=100, documents=2, tokens=5, bytes=17, domain="code")


def _write(prefix: Path, documents: Documents, dtype: type = np.uint16) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def _write_by_megatron(prefix: Path, documents: list[Documents], dtype: type) -> None:
    """Documents of several sequences each."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = list(itertools.chain.from_iterable(sequences))
        builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_files_are_those_of_megatron_to_the_byte(tmp_path: Path, dtype: type) -> None:
    documents = [[1, 2, 3], [4], [], [5, 6, 255]]
    _write(tmp_path / "ours", documents, dtype)
    _write_by_megatron(tmp_path / "theirs", [[document] for document in documents], dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_an_index_longer_than_the_copy_buffer_is_megatrons_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_dataset, "_CHUNK", 64)
    documents = [list(range(length % 7)) for length in range(1000)]
    _write(tmp_path / "ours", documents)
    _write_by_megatron(tmp_path / "theirs", [[document] for document in documents], np.uint16)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_megatron_reads_what_is_written_here(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [5, 70_000]]
    _write(tmp_path / "data", documents, np.int32)
    theirs = megatron.IndexedDataset(str(tmp_path / "data"))
    assert [sequence.tolist() for sequence in theirs] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_documents_of_several_sequences_written_by_megatron_are_read(tmp_path: Path, dtype: type) -> None:
    _write_by_megatron(tmp_path / "data", [[[1, 2], [3]], [], [[4]], [[], [5, 6]], []], dtype)
    dataset = IndexedDataset(tmp_path / "data")
    assert [document.tolist() for document in dataset] == [[1, 2, 3], [], [4], [5, 6], []]
    assert dataset.document_offsets[:].tolist() == [0, 3, 3, 4, 6, 6]
    assert [dataset.document_offsets[index] for index in range(6)] == [0, 3, 3, 4, 6, 6]
    assert dataset.sequence_lengths.tolist() == [2, 1, 1, 0, 2]
    assert dataset.dtype == dtype
    assert dataset.metadata is None


@settings(deadline=None)
@given(documents_strategy)
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: Documents) -> None:
    dataset = _write(tmp_path_factory.mktemp("data") / "a", documents)
    assert len(dataset) == len(documents)
    assert [document.tolist() for document in dataset] == documents
    assert dataset.tokens.tolist() == list(itertools.chain.from_iterable(documents))
    offsets = [0, *itertools.accumulate(map(len, documents))]
    assert dataset.document_offsets[:].tolist() == offsets
    assert bisect.bisect_right(dataset.document_offsets, 5) == bisect.bisect_right(offsets, 5)


def test_documents_can_be_added_many_at_a_time(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(np.arange(6), [1, 0, 5])
    assert [document.tolist() for document in IndexedDataset(tmp_path / "a")] == [[0], [], [1, 2, 3, 4, 5]]


def test_a_dataset_is_indexed_like_a_list_and_pickled_as_its_name(tmp_path: Path) -> None:
    dataset = _write(tmp_path / "a", [list(range(1000)), [7]] * 1000)
    assert dataset[-1].tolist() == [7]
    assert [document.tolist() for document in dataset[1:4:2]] == [[7], [7]]
    with pytest.raises(IndexError):
        dataset[2000]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[1].tolist() == [7]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8_000, np.uint16), (65_499, np.uint16), (65_500, np.int32)])
def test_the_dtype_is_megatrons_choice(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype == megatron.DType.optimal_dtype(vocab_size)


def test_nothing_exists_before_the_writer_finishes_or_after_it_fails(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "a", np.uint16)
    writer.add_document([1, 2])
    assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"}
    with pytest.raises(DataError, match="no such file; build the dataset first"):
        IndexedDataset(tmp_path / "a")
    writer.abort()
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1 // 0])
    assert list(tmp_path.iterdir()) == []


def test_metadata_goes_with_the_dataset_it_describes(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "a", np.uint16)
    writer.add_documents([1, 2, 3, 4, 5], [2, 3])
    writer.finish(METADATA)
    assert IndexedDataset(tmp_path / "a").metadata == METADATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]
    assert _write(tmp_path / "a", [[1]]).metadata is None


def test_a_description_of_another_dataset_is_refused(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "a", np.uint16)
    writer.add_documents([1, 2, 3, 4, 5], [2, 3])
    writer.finish(METADATA)
    _write_by_megatron(tmp_path / "a", [[[1, 2, 3]]], np.uint16)
    with pytest.raises(DataError, match=r"a\.json: describes another dataset"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json: not the description of a dataset"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("token", [-1, 65_536])
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match="do not fit uint16"), IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, token])
    assert list(tmp_path.iterdir()) == []


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", lambda path: _cut(path, 8), r"a\.bin: 8 bytes, but a\.idx describes 10"),
        (".bin", lambda path: path.write_bytes(b""), r"a\.bin: 0 bytes"),
        (".bin", lambda path: path.unlink(), r"a\.bin: no such file"),
        (".idx", lambda path: path.unlink(), r"a\.idx: no such file"),
        (".idx", lambda path: _cut(path, 60), r"a\.idx: 60 bytes, but 2 sequences and 3 document entries need 82"),
        (".idx", lambda path: _cut(path, 20), r"a\.idx: not a Megatron index"),
        (".idx", lambda path: path.write_bytes(b""), r"a\.idx: not a Megatron index"),
        (".idx", lambda path: _overwrite(path, 0, b"TNTIDX\0\0"), r"a\.idx: not a Megatron index"),
        (".idx", lambda path: _overwrite(path, 9, b"\2"), r"a\.idx: version 2 with dtype code 8"),
        (".idx", lambda path: _overwrite(path, 17, b"\6"), r"a\.idx: version 1 with dtype code 6"),
        (".idx", lambda path: _overwrite(path, 25, b"\1"), r"a\.idx: 82 bytes, but 72057594037927938 sequences"),
        (".idx", lambda path: _overwrite(path, 74, b"\1"), r"a\.idx: the document table does not span its 2 sequences"),
    ],
)  # fmt: skip
def test_damage_is_noticed_and_named(tmp_path: Path, suffix: str, damage: object, message: str) -> None:
    _write(tmp_path / "a", [[1, 2], [3, 4, 5]])
    damage(tmp_path / f"a{suffix}")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")
