"""One vocabulary per domain, and their merger.

Why Unigram and not BPE: the pieces of separately trained Unigram models carry probabilities, and those of a mixture of
domains are the weighted averages of the domains' (BloombergGPT and Yuan 2.0 merge this way; Pangu Ultra does not say
how it does). BPE has ranks only: merged lists of rules contradict one another and leave pieces no text leads to. Under
Unigram a piece is produced by some text if and only if it is the best segmentation of itself, which is easily ensured.
"""

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sentencepiece import SentencePieceTrainer

from pangu.tokenizer.pieces import (
    ALPHABET,
    BYTE_PIECES,
    LONGEST_PIECE,
    LOWEST_SCORE,
    SCHEMA,
    SCORE_STEPS,
    SPECIAL_PIECES,
    WORD,
    is_allowed,
)

Probabilities = Mapping[str, float]
"""Piece to probability."""

# sentencepiece's trainer reads tabs, line ends and spaces in its own way; it sees these instead.
_STAND_INS = {"\t": "␉", "\n": "␤", "\r": "␍", " ": "▁"}

# A letter of a script (Runic) that nothing else has, since pieces do not extend over scripts; see `_sentences`.
_MARK = "\u16a0"

# It has uses of its own for U+2047 and U+2585. These and control characters are in no vocabulary: bytes stand for them.
_UNLEARNABLE = [*_STAND_INS.values(), _MARK, "\u2047", "\u2585", *map(chr, (*range(0x20), 0x7F))]

_TO_TRAINER = str.maketrans({**dict.fromkeys(_UNLEARNABLE, ""), "\t": "␉", "\n": "␤", "\r": "␍"})
_FROM_TRAINER = str.maketrans({stand_in: character for character, stand_in in _STAND_INS.items()})

UNSEEN = math.exp(LOWEST_SCORE / SCORE_STEPS)
"""Probability of a character that is in the vocabulary, but not in the domain."""


@dataclass(frozen=True)
class Vocabulary:
    scores: Mapping[str, int]
    """Learned pieces from the likeliest on, with log probabilities in 1 / SCORE_STEPS."""
    unreachable: int
    """Candidates left out because the merged vocabulary segments their own text better than they do."""

    @property
    def size(self) -> int:
        """Pieces, bytes and special ones included."""
        return len(SPECIAL_PIECES) + len(BYTE_PIECES) + len(self.scores)


def count_words(documents: Iterable[str]) -> Counter[str]:
    """How often each word (`pieces.WORD`) occurs."""
    words: Counter[str] = Counter()
    for document in documents:
        words.update(re.findall(WORD, document))
    return words


def learn(words: Mapping[str, int], size: int, character_coverage: float) -> dict[str, float]:
    """The frequency analysis of one domain: its likeliest pieces with their probabilities in a Unigram model.

    Besides single characters these are up to `size`. Characters are kept by falling frequency until they cover
    `character_coverage` of the text; `ALPHABET` always is.
    """
    sentences = list(_sentences(words))
    if not sentences:
        return dict.fromkeys(ALPHABET, UNSEEN)
    alphabet = set().union(*sentences)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=size + len(alphabet),
        hard_vocab_limit=False,
        seed_sentencepiece_size=10 * size + len(alphabet),
        max_sentencepiece_length=LONGEST_PIECE,
        max_sentence_length=1 << 20,
        character_coverage=character_coverage,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_id=-1,
        shrinking_factor=0.5,  # this and one iteration give as many bytes per token as the defaults in half the time
        num_sub_iterations=1,
        num_threads=1,  # sums over threads would depend on their number
        minloglevel=2,
    )
    pieces = SCHEMA.ModelProto.FromString(model.getvalue()).pieces
    normal = SCHEMA.ModelProto.SentencePiece.NORMAL
    learned = {piece.piece.translate(_FROM_TRAINER): math.exp(piece.score) for piece in pieces if piece.type == normal}
    allowed = {piece: probability for piece, probability in learned.items() if is_allowed(piece) and _MARK not in piece}
    total = sum(allowed.values())
    return dict.fromkeys(ALPHABET, UNSEEN) | {piece: probability / total for piece, probability in allowed.items()}


def merge(domains: Mapping[str, Probabilities], weights: Mapping[str, float], vocab_size: int) -> Vocabulary:
    """Merge and de-duplicate domain vocabularies: the likeliest pieces of the mixture of the domains (`select`)."""
    return select(mix(domains, weights), vocab_size)


def select(probabilities: Probabilities, vocab_size: int) -> Vocabulary:
    """The likeliest pieces, in a vocabulary of `vocab_size`, bytes and special ones included, if there are so many.

    A piece brings its characters with it, so that what cannot be spelled is in no piece at all. Passed over is a piece
    whose text is segmented better by pieces already taken than it is by itself. Those taken later are less likely than
    it and cannot do that. Hence every piece is reachable: its own text is encoded with it.
    """
    room = vocab_size - len(SPECIAL_PIECES) - len(BYTE_PIECES)
    taken: dict[str, int] = {}
    unreachable = 0
    for piece in _by_priority(probabilities):
        if len(taken) == room:
            break
        score = max(LOWEST_SCORE, round(SCORE_STEPS * math.log(probabilities[piece])))
        if len(piece) == 1:
            taken[piece] = score
        elif all(character in taken for character in piece):
            if score >= best_segmentation(piece, taken)[0]:
                taken[piece] = score
            else:
                unreachable += 1
    return Vocabulary(dict(sorted(taken.items(), key=lambda item: (-item[1], item[0]))), unreachable)


def best_segmentation(text: str, scores: Mapping[str, int]) -> tuple[int, int]:
    """Score and length, in pieces, of the best segmentation of `text` into two pieces or more.

    Every character of it must be a piece.
    """
    best = [(0, 0)]
    for end in range(1, len(text) + 1):
        starts = range(1 if end == len(text) else 0, end)
        parts = [(best[start], scores[text[start:end]]) for start in starts if text[start:end] in scores]
        score, negative_length = max((score + last, negative_length - 1) for (score, negative_length), last in parts)
        best.append((score, negative_length))
    score, negative_length = best[-1]
    return score, -negative_length


def mix(domains: Mapping[str, Probabilities], weights: Mapping[str, float]) -> dict[str, float]:
    """The probabilities of a text that takes each piece from a domain drawn by `weights`."""
    total = sum(weights[name] for name in domains)
    mixture: dict[str, float] = {}
    for name, probabilities in domains.items():
        for piece, probability in probabilities.items():
            mixture[piece] = mixture.get(piece, 0.0) + weights[name] / total * probability
    return mixture


def _by_priority(probabilities: Probabilities) -> list[str]:
    """Pieces by falling probability, `ALPHABET` first and every other character as early as a piece that needs it."""
    priority = dict(probabilities)
    for piece, probability in probabilities.items():
        for character in piece:
            if character in priority:
                priority[character] = max(priority[character], probability)
    priority.update(dict.fromkeys(ALPHABET, 1.0))
    return sorted(priority, key=lambda piece: (-priority[piece], len(piece), piece))


def _sentences(words: Mapping[str, int]) -> Iterator[str]:
    """Words, as often as they occur, as the trainer is to see them.

    It only considers strings that it has seen before two different characters, or it would never think of a word that
    is always followed by the same other. So it gets words instead of lines, and each has a mark after it once.
    """
    for word, count in words.items():
        if sentence := word.translate(_TO_TRAINER):
            if count > 1:
                yield sentence + _MARK
            yield from itertools.repeat(sentence, max(1, count - 1))
