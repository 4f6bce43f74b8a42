from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from pangu.config import FillInTheMiddleConfig
from pangu.data.fill_in_the_middle import RearrangedWindow, rearrange
from pangu.data.packing import pack

EOD, PAD, PREFIX, SUFFIX, MIDDLE = range(5)


class CharacterTokenizer:
    """Two tokens per character: cuts between the tokens of a character would show."""

    eod_id, pad_id, fim_prefix_id, fim_suffix_id, fim_middle_id = EOD, PAD, PREFIX, SUFFIX, MIDDLE

    def encode(self, text: str) -> list[int]:
        return [half for character in text for half in (10 + ord(character) // 64, 100 + ord(character) % 64)]

    def decode(self, ids: Sequence[int]) -> str:
        assert min(ids, default=10) >= 10, "special tokens are not text"
        return "".join(chr((a - 10) * 64 + b - 100) for a, b in zip(ids[::2], ids[1::2], strict=True))


TOKENIZER = CharacterTokenizer()
TEXT = "the quick brown fox"


def document(text: str) -> np.ndarray:
    return np.array([*TOKENIZER.encode(text), EOD])


def parts(ids: np.ndarray, *markers: int) -> list[str]:
    """The texts between the markers, which must come in this order."""
    places = [ids.tolist().index(marker) for marker in markers] + [len(ids)]
    assert places[0] == 0
    assert places == sorted(places)
    return [TOKENIZER.decode(ids[a + 1 : b].tolist()) for a, b in pairwise(places)]


def test_prefix_suffix_middle() -> None:
    ids = rearrange(document(TEXT), TOKENIZER, 0.0, np.random.default_rng(3))
    assert ids[-1] == EOD
    prefix, suffix, middle = parts(ids[:-1], PREFIX, SUFFIX, MIDDLE)
    assert prefix + middle + suffix == TEXT
    assert all((prefix, suffix, middle))


def test_suffix_prefix_middle() -> None:
    """Yuan's SPM: <fim_prefix><fim_suffix> suffix <fim_middle> prefix middle."""
    random, twin = np.random.default_rng(3), np.random.default_rng(3)
    nothing, suffix, prefix_and_middle = parts(
        rearrange(document(TEXT), TOKENIZER, 1.0, random)[:-1], PREFIX, SUFFIX, MIDDLE
    )
    assert nothing == ""
    assert prefix_and_middle + suffix == TEXT
    _, second = sorted(twin.integers(len(TEXT) + 1, size=2).tolist())
    assert suffix == TEXT[second:]


def test_every_character_boundary_is_a_cut() -> None:
    random = np.random.default_rng(0)
    cuts = set()
    for _ in range(500):
        prefix, _, middle = parts(rearrange(document("abcd")[:-1], TOKENIZER, 0.0, random), PREFIX, SUFFIX, MIDDLE)
        cuts.add((len(prefix), len(prefix) + len(middle)))
    assert cuts == {(a, b) for a in range(5) for b in range(a, 5)}


@dataclass
class TextWindow:
    texts: list[str]

    def read(self, out: np.ndarray) -> list[int]:
        documents = [document(text) for text in self.texts]
        out[:] = np.concatenate(documents)[: len(out)]
        ends = np.cumsum([len(each) for each in documents])
        return ends[ends < len(out)].tolist()


def read(window: RearrangedWindow, length: int) -> tuple[np.ndarray, list[int]]:
    out = np.empty(length, np.int64)
    return out, window.read(out)


def window(texts: list[str], key: int = 0, **rates: float) -> RearrangedWindow:
    return RearrangedWindow(TextWindow(texts), TOKENIZER, FillInTheMiddleConfig(**rates), (key,))  # type: ignore[arg-type]


def test_no_document_is_touched_at_rate_0() -> None:
    plain = np.empty(100, np.int64)
    starts = TextWindow(4 * [TEXT]).read(plain)
    assert read(window(4 * [TEXT], rate=0.0), 100)[1] == starts
    assert np.array_equal(read(window(4 * [TEXT], rate=0.0), 100)[0], plain)


def test_a_grown_window_is_cut_and_boundaries_follow() -> None:
    length = 2 * (2 * len(TEXT) + 1)  # exactly two documents; each grows by three tokens
    ids, starts = read(window([TEXT, TEXT], rate=1.0), length)
    assert starts == [length // 2 + 3]
    assert [ids[0], ids[starts[0]], ids[starts[0] - 1]] == [PREFIX, PREFIX, EOD]
    assert EOD not in ids[starts[0] :]


class MergingTokenizer(CharacterTokenizer):
    """Writes a run of spaces as one token, so that an odd encoding gets shorter when encoded again."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace("aaaaaaaa", "b"))


def test_a_shrunk_window_is_padded_and_pads_have_no_label() -> None:
    stretched = window(["a" * 64], rate=1.0)._replace(tokenizer=MergingTokenizer())  # type: ignore[arg-type]
    ids, starts = read(stretched, 129)
    (padding,) = starts
    assert ids[padding - 1] == EOD
    assert (ids[padding:] == PAD).all()
    assert PAD not in ids[:padding]

    batch = pack([stretched], 128, reset_at_documents=True, reset_positions=True, pad_id=PAD)
    assert batch.cu_seqlens.tolist() == [0, padding, 128]
    assert (batch.labels[padding - 1 :] == -100).all()
    assert (batch.labels[: padding - 1] != -100).all()


@pytest.mark.parametrize(("rate", "suffix_first_rate"), [(0.5, 0.5), (0.9, 0.1)])
def test_rates(rate: float, suffix_first_rate: float) -> None:
    rearranged = suffix_first = 0
    for key in range(1000):
        ids, _ = read(window([TEXT], key, rate=rate, suffix_first_rate=suffix_first_rate), 2 * len(TEXT) + 1)
        rearranged += ids[0] == PREFIX
        suffix_first += ids[0] == PREFIX and ids[1] == SUFFIX
    assert rearranged / 1000 == pytest.approx(rate, abs=0.05)
    # A PSM document with an empty prefix looks the same; that is one of 20 cuts, twice.
    assert suffix_first / rearranged == pytest.approx(suffix_first_rate + (1 - suffix_first_rate) * 0.1, abs=0.06)


def test_the_key_alone_decides() -> None:
    results = [read(window(3 * [TEXT], key, rate=0.5), 100)[0].tolist() for key in (0, 1, 0)]
    assert results[0] == results[2] != results[1]
