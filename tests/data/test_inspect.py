"""What `pangu data inspect` finds in a dataset, sound or not."""

import json
from pathlib import Path

import numpy as np
import pytest

from pangu.data.build import build
from pangu.data.indexed_dataset import IndexedDatasetWriter
from pangu.data.inspect import LengthBin, inspect
from pangu.errors import DataError
from pangu.tokenizer.tokenizer import Tokenizer

TEXTS = ["document one", "[bold]not markup[/bold]", "x", "document four", "document five"]


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_path: Path) -> Path:
    corpus = tmp_path / "a.txt"
    corpus.write_text("\n".join(TEXTS))
    build([corpus], tmp_path / "data", tokenizer_path, domain="code", workers=1, split_lines=True, show_progress=False)
    return tmp_path / "data"


def _by_megatron(prefix: Path, documents: list[list[int]]) -> Path:
    """Without the description that says which tokenizer made it."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def test_the_whole_dataset_is_described(
    dataset: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection = inspect(dataset, tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    lengths = [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    assert (inspection.documents, inspection.tokens) == (5, sum(lengths))
    assert inspection.mean_length == sum(lengths) / 5
    assert sum(row.documents for row in inspection.length_histogram) == 5
    assert inspection.metadata is not None
    assert inspection.metadata.domain == "code"
    assert inspection.tokenizer_matches is True
    assert (inspection.checked_endings, inspection.missing_endings) == (5, 0)
    assert [sample.text for sample in inspection.samples] == TEXTS[:3]
    assert [sample.length for sample in inspection.samples] == lengths[:3]

    printed = capsys.readouterr().out
    for text in ("[bold]not markup[/bold]", "domain", "code", "the same", "5 checked, 0 without <eod>"):
        assert text in printed


def test_json_holds_the_same(dataset: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspection = inspect(dataset, tokenizer_path, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens"] == inspection.tokens
    assert printed["metadata"]["domain"] == "code"
    assert printed["samples"][1]["text"] == TEXTS[1]


def test_one_document_can_be_asked_for(dataset: Path, tokenizer_path: Path) -> None:
    assert [sample.text for sample in inspect(dataset, tokenizer_path, document=4).samples] == ["document five"]
    for document in (5, -1):
        with pytest.raises(DataError, match=rf"no document {document}; it has 5, numbered from 0"):
            inspect(dataset, tokenizer_path, document=document)


def test_without_a_tokenizer_tokens_are_shown(dataset: Path, tokenizer_path: Path) -> None:
    inspection = inspect(dataset)
    assert inspection.tokenizer_matches is None
    assert inspection.checked_endings == 0
    assert inspection.samples[2].text is None
    assert inspection.samples[2].tokens == [*Tokenizer(tokenizer_path).encode("x"), Tokenizer(tokenizer_path).eod_id]


def test_another_tokenizer_is_reported_and_not_used(
    dataset: Path, other_tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection = inspect(dataset, other_tokenizer_path)
    assert inspection.tokenizer_matches is False
    assert inspection.checked_endings == 0
    assert all(sample.text is None for sample in inspection.samples)
    assert "another" in capsys.readouterr().out


def test_missing_endings_are_counted(tmp_path: Path, tokenizer_path: Path) -> None:
    eod = Tokenizer(tokenizer_path).eod_id
    inspection = inspect(_by_megatron(tmp_path / "a", [[20, eod], [20], [], [eod]]), tokenizer_path)
    assert inspection.tokenizer_matches is None
    assert (inspection.checked_endings, inspection.missing_endings) == (4, 2)


def test_lengths_are_counted_in_bins_that_double(tmp_path: Path) -> None:
    documents = [[9] * length for length in (1, 2, 3, 3, 4, 7, 8)]
    assert inspect(_by_megatron(tmp_path / "a", documents)).length_histogram == [
        LengthBin(1, 1, 1),
        LengthBin(2, 3, 3),
        LengthBin(4, 7, 2),
        LengthBin(8, 15, 1),
    ]
    assert inspect(_by_megatron(tmp_path / "b", [[]])).length_histogram == [LengthBin(0, 0, 1)]
    assert inspect(_by_megatron(tmp_path / "c", [])).length_histogram == []


def test_tokens_the_tokenizer_does_not_have_are_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    prefix = _by_megatron(tmp_path / "a", [[20, 60_000]])
    with pytest.raises(DataError, match=r"token 60000 in document 0, but the tokenizer has only"):
        inspect(prefix, tokenizer_path)


def test_misplaced_sequences_are_noticed(tmp_path: Path) -> None:
    """What opening a dataset does not look for: only the last sequence's end is right."""
    prefix = _by_megatron(tmp_path / "a", [[1], [2], [3]])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[34 + 4 * 3 + 8] = 3
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"a\.idx: sequence 1 is misplaced"):
        inspect(prefix)
