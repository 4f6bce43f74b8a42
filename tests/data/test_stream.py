import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu.data.indexed_dataset import IndexedDataset
from pangu.data.stream import TokenStream
from pangu.errors import DataError

# A dataset as a list of documents, each a list of sequences, each so many tokens long.
datasets = st.lists(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=8), min_size=1, max_size=3
)


def write(prefix: Path, documents: list[list[int]], first_token: int) -> int:
    """Tokens count upwards from `first_token`. Megatron's index, by hand: ours has one sequence per document."""
    lengths = [length for document in documents for length in document]
    tokens = np.arange(first_token, first_token + sum(lengths), dtype="<u2")
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    pointers = np.cumsum([0, *lengths[:-1]]) * 2
    table = np.cumsum([0, *map(len, documents)])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(table))
    sections = (np.array(lengths, "<i4"), pointers.astype("<i8"), table.astype("<i8"))
    Path(f"{prefix}.idx").write_bytes(header + b"".join(section.tobytes() for section in sections))
    return len(tokens)


@given(datasets, st.booleans(), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_and_document_starts(
    tmp_path: Path, lengths: list[list[list[int]]], one_sequence_each: bool, data: st.DataObject
) -> None:
    if one_sequence_each:
        lengths = [[[sum(document)] for document in dataset] for dataset in lengths]
    total, opened, starts = 0, [], set()
    for index, documents in enumerate(lengths):
        starts |= {total + sum(map(sum, documents[:number])) for number in range(len(documents))}
        total += write(tmp_path / str(index), documents, total)
        opened.append(IndexedDataset(tmp_path / str(index)))
    stream = TokenStream(opened, vocab_size=10_000)
    assert stream.num_tokens == total
    if total == 0:
        return
    start = data.draw(st.integers(0, total - 1))
    out = np.empty(data.draw(st.integers(1, total - start)), np.int64)
    offsets = stream.read(start, out)
    assert out.tolist() == list(range(start, start + len(out)))
    assert offsets == sorted(place - start for place in starts if start < place < start + len(out))


@pytest.mark.parametrize("vocab_size", [99, 100])
def test_token_ids_are_checked_where_nothing_says_what_they_are(tmp_path: Path, vocab_size: int) -> None:
    write(tmp_path / "x", [[100]], 0)
    stream = TokenStream([IndexedDataset(tmp_path / "x")], vocab_size)
    stream.read(0, np.empty(99, np.int64))
    if vocab_size == 99:
        with pytest.raises(DataError, match=r"token id 99, but model\.vocab_size is 99"):
            stream.read(50, np.empty(50, np.int64))
    else:
        stream.read(50, np.empty(50, np.int64))
