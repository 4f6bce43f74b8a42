"""packing.cpp against `pack`, to the bit."""

import struct
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu.data import packing
from pangu.data.batch import Batch
from pangu.data.indexed_dataset import IndexedDataset
from pangu.data.stream import StreamTable, StreamWindows, TokenStream
from pangu.errors import DataError

CODES = {"<u2": 8, "<i4": 4, "<i2": 3}
needs_a_compiler = pytest.mark.skipif(
    packing.pack_function() is None, reason="no compiler: the reference runs, which test_packing.py holds"
)


def write(prefix: Path, documents: list[list[int]], dtype: str, first_token: int = 0) -> IndexedDataset:
    """Tokens count upwards; a document is a list of the lengths of its sequences, and may have none."""
    lengths = np.array([length for document in documents for length in document], "<i4")
    tokens = np.arange(first_token, first_token + lengths.sum(), dtype=dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * tokens.itemsize
    table = np.cumsum([0, *map(len, documents)], dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], len(lengths), len(table))
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + table.tobytes())
    return IndexedDataset(prefix)


@dataclass
class Case:
    streams: list[list[tuple[list[list[int]], str]]]
    """Of each stream its datasets: documents as `write` takes them, and the type of tokens."""
    places: list[tuple[int, int]]
    sequence_length: int
    micro_batch_size: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    long_or_short = st.one_of(st.integers(0, 5), st.integers(0, 60))
    one_each = st.lists(st.lists(long_or_short, min_size=1, max_size=1), min_size=1, max_size=6)
    several = st.lists(st.lists(long_or_short, max_size=3), min_size=1, max_size=6)
    documents = st.one_of(one_each, several).filter(lambda documents: sum(map(sum, documents)) > 0)
    dataset = st.tuples(documents, st.sampled_from(["<u2", "<i4"]))
    streams = draw(st.lists(st.lists(dataset, min_size=1, max_size=3), min_size=1, max_size=3))
    sizes = [sum(sum(map(sum, documents)) for documents, _ in stream) for stream in streams]
    length = draw(st.integers(1, max(1, min(40, max(sizes) - 1))))
    fitting = [index for index, size in enumerate(sizes) if size > length]
    places: list[tuple[int, int]] = []
    micro_batch_size = draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, 20)) * micro_batch_size if fitting else 0):
        stream = draw(st.sampled_from(fitting))
        places.append((stream, draw(st.integers(0, sizes[stream] - length - 1))))
    return Case(streams, places, length, micro_batch_size)


def batches(windows: object, case: Case, flags: dict[str, bool]) -> list[Batch]:
    return list(packing.pack_all(windows, case.micro_batch_size, case.sequence_length, **flags))  # type: ignore[arg-type]


def assert_same(compiled: list[Batch], reference: list[Batch]) -> None:
    assert len(compiled) == len(reference)
    for a, b in zip(compiled, reference, strict=True):
        for name in ("tokens", "labels", "position_ids", "cu_seqlens"):
            one, other = getattr(a, name), getattr(b, name)
            assert one.dtype == other.dtype
            assert one.is_contiguous()
            assert torch.equal(one, other), name


def refuse(*_: object, **__: object) -> Batch:
    raise AssertionError("the reference ran")


@needs_a_compiler
@given(cases(), st.booleans(), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_compiled_equals_the_reference(
    tmp_path: Path, case: Case, reset_at_documents: bool, reset_positions: bool
) -> None:
    streams = [
        TokenStream([write(tmp_path / f"{row}-{i}", *each) for i, each in enumerate(stream)], vocab_size=10_000)
        for row, stream in enumerate(case.streams)
    ]
    windows = StreamWindows(StreamTable(streams), np.array(case.places, np.int64).reshape(-1, 2))
    flags = {"reset_at_documents": reset_at_documents, "reset_positions": reset_positions}
    with mock.patch.object(packing, "pack", refuse):
        compiled = batches(windows, case, flags)
    assert_same(compiled, batches(list(windows), case, flags))


def stream_of(tmp_path: Path, dtype: str, first_token: int, vocab_size: int) -> StreamWindows:
    dataset = write(tmp_path / "x", [[5], [30], [7]], dtype, first_token)
    return StreamWindows(StreamTable([TokenStream([dataset], vocab_size)]), np.array([[0, 0], [0, 20]]))


FLAGS = {"reset_at_documents": True, "reset_positions": True}


def test_other_types_of_tokens_and_no_compiler_give_the_same(tmp_path: Path) -> None:
    case = Case([], [], sequence_length=16, micro_batch_size=2)
    windows = stream_of(tmp_path, "<i2", 0, 100)
    assert_same(batches(windows, case, FLAGS), batches(list(windows), case, FLAGS))
    windows = stream_of(tmp_path, "<u2", 0, 100)
    with mock.patch.object(packing, "pack_function", return_value=None):
        without = batches(windows, case, FLAGS)
    assert_same(batches(windows, case, FLAGS), without)


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_token_ids_are_checked(tmp_path: Path, dtype: str) -> None:
    """Where no metadata says what they are: the largest one read is 100 + 36, a label."""
    case = Case([], [], sequence_length=16, micro_batch_size=2)
    batches(stream_of(tmp_path, dtype, 100, 137), case, FLAGS)
    with pytest.raises(DataError, match=r"token id 136, but model\.vocab_size is 136"):
        batches(stream_of(tmp_path, dtype, 100, 136), case, FLAGS)


def test_a_micro_batch_that_is_not_filled(tmp_path: Path) -> None:
    windows = stream_of(tmp_path, "<u2", 0, 100)
    windows = StreamWindows(windows.table, windows.places[[0, 1, 0]])
    case = Case([], [], sequence_length=16, micro_batch_size=2)
    assert_same(batches(windows, case, FLAGS), batches(list(windows), case, FLAGS))
    assert [len(batch.tokens) for batch in batches(windows, case, FLAGS)] == [32, 16]


def test_windows_beyond_the_stream_are_not_read(tmp_path: Path) -> None:
    case = Case([], [], sequence_length=16, micro_batch_size=1)
    windows = stream_of(tmp_path, "<u2", 0, 100)
    windows.places[1, 1] = 26  # one token too far
    with pytest.raises(IndexError):
        batches(windows, case, FLAGS)
