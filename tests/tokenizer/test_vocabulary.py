"""Merging domain vocabularies."""

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu.tokenizer.pieces import ALPHABET, LOWEST_SCORE, SCORE_STEPS, SMALLEST_VOCABULARY, is_allowed, load
from pangu.tokenizer.pruning import prune
from pangu.tokenizer.vocabulary import best_segmentation, count_words, learn, merge, mix, select

letters = dict.fromkeys(ALPHABET, 1e-6)


def test_probabilities_are_averaged_by_weight() -> None:
    mixture = mix({"a": {"x": 0.5, "y": 0.5}, "b": {"y": 1.0}}, {"a": 3.0, "b": 1.0})
    assert mixture == {"x": 0.375, "y": 0.625}


def test_a_repeated_piece_is_taken_once_and_the_likeliest_first() -> None:
    domains = {"a": {**letters, "the": 0.2, "cat": 0.1}, "b": {**letters, "the": 0.2, "dog": 0.3}}
    merged = merge(domains, {"a": 1.0, "b": 1.0}, SMALLEST_VOCABULARY + 2)
    assert [piece for piece in merged.scores if len(piece) > 1] == ["the", "dog"]
    assert merged.size == SMALLEST_VOCABULARY + 2


def test_a_piece_that_no_text_would_be_encoded_with_is_replaced_by_the_next() -> None:
    domains = {"a": {**letters, "ab": 0.1, "cd": 0.01}, "b": {**letters, "a": 0.5, "b": 0.5}}
    naive = {piece: round(SCORE_STEPS * math.log(p)) for piece, p in mix(domains, {"a": 1.0, "b": 1.0}).items()}
    with pytest.raises(RuntimeError, match="'ab'"):
        load(naive)
    merged = merge(domains, {"a": 1.0, "b": 1.0}, SMALLEST_VOCABULARY + 1)
    assert "ab" not in merged.scores
    assert "cd" in merged.scores
    assert merged.unreachable == 1
    load(merged.scores)


def test_a_piece_comes_after_its_characters_or_not_at_all() -> None:
    probabilities = {**letters, "汉字": 0.3, "汉": 0.001, "字": 0.002, "没": 0.01, "有没": 0.2}
    for more, taken in ((1, {"字"}), (2, {"字", "汉"}), (3, {"字", "汉", "汉字"}), (4, {"字", "汉", "汉字", "没"})):
        scores = select(probabilities, SMALLEST_VOCABULARY + more).scores
        assert set(scores) - set(ALPHABET) == taken
    assert select(probabilities, SMALLEST_VOCABULARY + 5).size == SMALLEST_VOCABULARY + 4


pieces = st.text("abc", min_size=1, max_size=5)


@given(st.dictionaries(pieces, st.floats(1e-12, 1.0)))
def test_whatever_the_probabilities_every_piece_is_reached(probabilities: Mapping[str, float]) -> None:
    selected = select({**letters, **probabilities}, 10_000)
    load(selected.scores)
    assert all(LOWEST_SCORE <= score <= 0 for score in selected.scores.values())


@given(st.text("abc", min_size=2, max_size=7), st.dictionaries(pieces, st.integers(-50, 0)))
def test_best_segmentation_is_the_best_of_all(text: str, scores: Mapping[str, int]) -> None:
    scores = {"a": -30, "b": -30, "c": -30, **scores}
    expected = []
    for cuts in range(1, len(text)):
        for places in itertools.combinations(range(1, len(text)), cuts):
            parts = [text[i:j] for i, j in itertools.pairwise((0, *places, len(text)))]
            if all(part in scores for part in parts):
                expected.append((sum(scores[part] for part in parts), -len(parts)))
    score, length = best_segmentation(text, scores)
    assert (score, -length) == max(expected)


def test_pieces_lie_within_words() -> None:
    for piece in (" the", "the", "  ", "):\n", "\n\n", "7", "\t\t"):
        assert is_allowed(piece), piece
    for piece in ("the cat", "a ", "\n  ", "x\ny", "12", "x1", " 1", "a" * 17, ""):
        assert not is_allowed(piece), piece


def test_words_that_always_stand_together_are_learned() -> None:
    text = "".join(f"begin {number} of the usual phrase end\n" for number in range(500))
    assert {"begin", " of", " the", " usual", " phrase"} <= learn(count_words([text]), 100, 1.0).keys()


def test_line_ends_tabs_and_spaces_are_learned() -> None:
    text = "if x:\n\t\treturn\r\n        pass\n\n" * 50
    learned = learn(count_words([text]), 100, 1.0)
    assert {":\n", "\t\t", "\r\n", "\n\n"} & learned.keys() >= {":\n", "\n\n"}
    assert any(set(piece) == {" "} and len(piece) > 1 for piece in learned)
    assert not set("␉␤␍▁ᚠ") & set("".join(learned))


def test_text_of_nothing_learnable_gives_the_alphabet() -> None:
    for text in ("", "\x01\x02", "\u2581\u2581"):
        assert learn(count_words([text]), 100, 1.0).keys() == set(ALPHABET)


def test_pruning_drops_what_saves_least() -> None:
    words = {"d": {"abcd": 100, "ef": 100, "gh": 1}}
    probabilities = {**letters, "abcd": 0.2, "ef": 0.2, "gh": 0.3}
    vocabulary = select(probabilities, 10_000)
    for size, kept in ((2, {"abcd", "ef"}), (1, {"abcd"}), (0, set())):
        pruned = prune(vocabulary, words, {"d": 1.0}, SMALLEST_VOCABULARY + size)
        assert set(pruned.scores) - set(ALPHABET) == kept
        load(pruned.scores)


def test_pruning_heeds_weights() -> None:
    words = {"a": {"abcd": 10, "x": 10}, "b": {"efgh": 10, "y": 10}}
    vocabulary = select({**letters, "abcd": 0.2, "efgh": 0.2}, 10_000)
    for weights, kept in (({"a": 0.9, "b": 0.1}, "abcd"), ({"a": 0.1, "b": 0.9}, "efgh")):
        pruned = prune(vocabulary, words, weights, SMALLEST_VOCABULARY + 1)
        assert set(pruned.scores) - set(ALPHABET) == {kept}
