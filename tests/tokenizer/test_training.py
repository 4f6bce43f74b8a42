"""Training: exact size, the same file every time, balance, the report, and mistakes."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tokenizer_material import SAMPLE_BYTES, VOCAB_SIZE

from pangu.data.corpus import texts
from pangu.errors import ConfigError, DataError, PanguError
from pangu.tokenizer import Tokenizer, sampling, train
from pangu.tokenizer.pieces import ALPHABET, BYTE_PIECES, SPECIAL_PIECES
from pangu.tokenizer.report import Report

Corpora = Mapping[str, list[Path]]


def test_the_vocabulary_has_the_size_asked_for(corpora: Corpora, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    few = {name: corpora[name] for name in ("chinese", "numbers")}
    for size in (401, 600):
        train(few, size, tmp_path, sample_bytes=50_000, show_progress=False)
        assert Tokenizer(tmp_path / "tokenizer.model").vocab_size == size


def test_the_files_do_not_depend_on_threads(corpora: Corpora, tmp_path: Path) -> None:
    files = []
    for threads in (1, 3):
        train(corpora, 700, tmp_path, sample_bytes=40_000, threads=threads, show_progress=False)
        files.append([path.read_bytes() for path in sorted(tmp_path.iterdir())])
    assert len(files[0]) == 2
    assert files[0] == files[1]


def test_every_domain_is_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    pieces = {piece for piece, _ in tokenizer.pieces()}
    assert set(ALPHABET) <= pieces
    assert {" self", "):\n", " the"} <= pieces
    assert sum(len(piece) > 1 and "\u4e00" <= piece[0] <= "\u9fff" for piece in pieces) > 50


def test_the_worst_served_domain_improves(trained: tuple[Report, Path]) -> None:
    report, _ = trained
    domains = report.domains
    by_bytes_per_token = sorted(domains, key=lambda name: domains[name].single_corpus_bytes_per_token)
    numbers = domains["numbers"]
    assert by_bytes_per_token[0] == "numbers", "digits stand alone, so that no tokenizer can do better"
    assert numbers.bytes_per_token == numbers.single_corpus_bytes_per_token == numbers.own_bytes_per_token
    assert report.poorest_domain == by_bytes_per_token[1]
    poorest = domains[report.poorest_domain]
    assert poorest.bytes_per_token > poorest.single_corpus_bytes_per_token
    assert report.poorest_improved
    single = {
        name: domain.single_corpus_bytes_per_token / domain.own_bytes_per_token for name, domain in domains.items()
    }
    merged = {name: domain.bytes_per_token / domain.own_bytes_per_token for name, domain in domains.items()}
    assert report.neglected_domain == min(single, key=lambda name: single[name])
    assert min(merged.values()) > min(single.values()) + 0.05
    assert report.neglected_improved


def test_bytes_per_token_are_those_of_held_out_documents(
    trained: tuple[Report, Path], tokenizer: Tokenizer, corpora: Corpora
) -> None:
    for name, paths in corpora.items():
        sample = sampling.draw(texts(paths), SAMPLE_BYTES, 0)
        assert not set(sample.held_out) & set(sample.training)
        tokens = sum(len(tokenizer.encode(text)) for text in sample.held_out)
        held_out_bytes = sum(len(text.encode()) for text in sample.held_out)
        assert trained[0].domains[name].held_out_bytes == held_out_bytes
        assert trained[0].domains[name].bytes_per_token == pytest.approx(held_out_bytes / tokens)


def test_the_report_counts_every_piece_once(trained: tuple[Report, Path], tokenizer: Tokenizer) -> None:
    report, folder = trained
    assert json.loads((folder / "tokenizer_report.json").read_text()) == dataclasses.asdict(report)
    assert report.fingerprint == tokenizer.fingerprint
    pieces = sum(domain.pieces for domain in report.domains.values())
    assert pieces + len(SPECIAL_PIECES) + len(BYTE_PIECES) == report.vocab_size == VOCAB_SIZE
    shares = sum(domain.share for domain in report.domains.values())
    assert shares == pytest.approx(1 - (len(SPECIAL_PIECES) + len(BYTE_PIECES)) / VOCAB_SIZE)
    assert sum(domain.weight for domain in report.domains.values()) == pytest.approx(1)
    han = sum("\u4e00" <= piece[0] <= "\u9fff" for piece, _ in tokenizer.pieces())
    assert han <= report.domains["chinese"].pieces_of_no_other_domain <= report.domains["chinese"].pieces
    assert report.candidates - report.duplicates >= VOCAB_SIZE - len(SPECIAL_PIECES) - len(BYTE_PIECES)


def test_the_report_is_printed(corpora: Corpora, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: corpora[name] for name in ("chinese", "numbers")}
    report = train(few, 450, tmp_path, sample_bytes=30_000)
    out, err = capsys.readouterr()
    for name, domain in report.domains.items():
        assert re.search(rf"{name} +{domain.pieces:,} .*{domain.bytes_per_token:.3f}", out)
    assert re.search(r"total +450 +100\.00", out)
    assert "analyzing chinese" in err


def test_a_larger_weight_gives_more_of_the_vocabulary(corpora: Corpora, tmp_path: Path) -> None:
    few = {name: corpora[name] for name in ("chinese", "english")}
    pieces = []
    for weight in (0.1, 10):
        weights = {"chinese": weight, "english": 1.0}
        report = train(few, 700, tmp_path, weights=weights, sample_bytes=30_000, show_progress=False)
        assert report.domains["chinese"].weight == pytest.approx(weight / (1 + weight))
        pieces.append(report.domains["chinese"].pieces)
    assert pieces[1] > 1.5 * pieces[0]


def mistake(change: Callable[[Corpora, Path], dict[str, object]], message: str, error: type[PanguError]) -> object:
    return pytest.param(change, message, error, id=message)


@pytest.mark.parametrize(
    ("change", "message", "error"),
    [
        mistake(lambda c, t: {"domains": {}}, "domains: none given", ConfigError),
        mistake(lambda c, t: {"vocab_size": 361}, "vocab_size: 361 is too small", ConfigError),
        mistake(lambda c, t: {"vocab_size": 90_000}, r"give \d+ pieces, not 90000; lower it", DataError),
        mistake(lambda c, t: {"weights": {"numbers": 1.0, "x": 1.0}}, r"weights: .*'x'.*\['numbers'\]", ConfigError),
        mistake(lambda c, t: {"weights": {"numbers": 0.0}}, "weights: .* above 0", ConfigError),
        mistake(lambda c, t: {"sample_bytes": 0}, "sample_bytes: 0", ConfigError),
        mistake(lambda c, t: {"character_coverage": 1.5}, "character_coverage: 1.5", ConfigError),
        mistake(
            lambda c, t: {"domains": {"a": c["numbers"], "b": [t / "none.txt"]}}, "none.txt: no such file", DataError
        ),
        mistake(lambda c, t: {"domains": {"a": [t / "latin.txt"]}}, "latin.txt: not UTF-8 at byte 3", DataError),
        mistake(lambda c, t: {"domains": {"a": [t / "short.txt"]}}, "domain 'a' .*short.txt.*1 documents", DataError),
        mistake(lambda c, t: {"domains": {"a": [t / "empty.txt"]}}, "0 documents, 0 bytes", DataError),
        mistake(lambda c, t: {"output": t / "short.txt"}, "short.txt is a file; name a folder", ConfigError),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    corpora: Corpora,
    tmp_path: Path,
    change: Callable[[Corpora, Path], dict[str, object]],
    message: str,
    error: type[PanguError],
) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "short.txt").write_text("one document")
    (tmp_path / "empty.txt").write_text("")
    arguments = {"domains": {"numbers": corpora["numbers"]}, "vocab_size": 380, "output": tmp_path / "output"}
    arguments |= {"sample_bytes": 10_000, "show_progress": False}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=message):
        train(**{**arguments, **change(corpora, tmp_path)})  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(
    corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pangu.tokenizer.training.write_atomically", full)
    with pytest.raises(DataError, match=r"output: cannot be written \(No space left on device\)"):
        train({"numbers": corpora["numbers"]}, 363, tmp_path / "output", sample_bytes=10_000, show_progress=False)
