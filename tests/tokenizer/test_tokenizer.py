"""Encoding and decoding: exact, without special ids, independent of where long texts are cut."""

import hashlib
import io
import itertools
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from tokenizer_material import any_text

from pangu.errors import DataError
from pangu.tokenizer import Tokenizer
from pangu.tokenizer.pieces import BYTE_PIECES, LONGEST_RUN, LOWEST_SCORE, SCORE_STEPS, SPECIAL_PIECES, WORD
from pangu.tokenizer.tokenizer import _WORDS

FIRST_LEARNED = len(SPECIAL_PIECES) + len(BYTE_PIECES)


@given(any_text)
def test_any_text_comes_back_and_yields_no_special_id(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(SPECIAL_PIECES) <= id < tokenizer.vocab_size for id in ids)


def test_special_pieces_are_inserted_by_id_and_have_no_text(tokenizer: Tokenizer) -> None:
    named = [tokenizer.pad_id, tokenizer.eod_id, tokenizer.sep_id]
    named += [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id]
    assert [piece for piece, _ in tokenizer.pieces()][: len(SPECIAL_PIECES)] == list(SPECIAL_PIECES)
    assert named == [1, 2, 3, 4, 5, 6]
    assert tokenizer.decode([0, *named, *tokenizer.encode("text"), tokenizer.eod_id]) == "text"
    assert tokenizer.decode([-100, tokenizer.vocab_size, 10**9]) == ""


def test_every_learned_piece_is_reached_by_its_own_text(tokenizer: Tokenizer) -> None:
    for id, (piece, _) in enumerate(tokenizer.pieces()):
        if id >= FIRST_LEARNED:
            assert tokenizer.encode(piece) == [id], piece


def test_what_no_piece_covers_becomes_bytes(tokenizer: Tokenizer) -> None:
    for text in ("\u2581", "\0", "🎉"):
        assert [tokenizer.pieces()[id][0] for id in tokenizer.encode(text)] == [f"<0x{b:02X}>" for b in text.encode()]


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    with_digits = [piece for piece, _ in tokenizer.pieces()[FIRST_LEARNED:] if any(map(str.isdecimal, piece))]
    assert set(with_digits) >= set("0123456789")
    assert all(len(piece) == 1 for piece in with_digits)
    assert tokenizer.decode(tokenizer.encode("x 2024")[-4:-3]) == "2"


@given(any_text)
@example("word " * 1000)
@example("x" * 5000 + " y\n" * 300)
@example(" " * 2000 + "\n" * 2000)
def test_cutting_loses_nothing_and_cuts_only_between_words(text: str) -> None:
    assert "".join(_WORDS.findall(text)) == text
    assert "".join(re.findall(WORD, text)) == text
    words = set(itertools.accumulate(map(len, re.findall(WORD, text))))
    chunks = list(itertools.accumulate(map(len, _WORDS.findall(text))))
    assert words.issuperset(length for length in chunks if length)


@given(any_text)
def test_ids_are_those_of_every_word_by_itself(tokenizer: Tokenizer, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    words = re.findall(WORD, text)
    assert tokenizer.encode(text) == [id for word in words for id in processor.encode(word)]
    if not re.search(f" {{{LONGEST_RUN},}}|[^ \n]{{{LONGEST_RUN},}}|\n{{{LONGEST_RUN},}}", text):
        assert tokenizer.encode(text) == processor.encode(text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "word ", "汉字", "line of text\n", "a \n"])
def test_a_long_text_is_handed_over_in_bounded_chunks(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (200_000 // len(unit))
    assert max(map(len, _WORDS.findall(text))) <= 3 * LONGEST_RUN
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_scores_of_a_word_are_exact_in_float32(tokenizer: Tokenizer) -> None:
    scores = [score * SCORE_STEPS for _, score in tokenizer.pieces()]
    assert all(score == int(score) and LOWEST_SCORE <= score <= 0 for score in scores)
    assert 3 * LONGEST_RUN * (10 - LOWEST_SCORE / SCORE_STEPS) * SCORE_STEPS <= 2**24


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"character 3 .*ud800.* remove it"):
        tokenizer.encode("abc\ud800")


def test_the_fingerprint_is_that_of_the_file(tokenizer: Tokenizer) -> None:
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot be read"):
        Tokenizer(model)
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(tmp_path)
    for content in (b"", b"hello\n", bytes(100)):
        model.write_bytes(content)
        with pytest.raises(DataError, match="not a sentencepiece model"):
            Tokenizer(model)


def test_a_model_of_someone_else_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 10), model_writer=model, vocab_size=18, minloglevel=2
    )
    (tmp_path / "other.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"not one of Pangu's"):
        Tokenizer(tmp_path / "other.model")
