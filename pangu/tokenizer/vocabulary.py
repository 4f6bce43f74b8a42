"""One vocabulary per domain, and their merger.

Why Unigram and not BPE: the pieces of separately trained Unigram models carry probabilities, and those of a mixture of
domains are the weighted averages of the domains' (BloombergGPT and Yuan 2.0 merge this way; Pangu Ultra does not say
how it does). BPE has ranks only: merged lists of rules contradict one another and leave pieces no text leads to. Under
Unigram a piece is produced by some text if and only if it is the best segmentation of itself, which is easily ensured.
"""

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pangu.tokenizer.pieces import (
    ALPHABET,
    BYTE_PIECES,
    LONGEST_PIECE,
    LOWEST_SCORE,
    SCORE_STEPS,
    SPECIAL_PIECES,
    WORD,
    is_allowed,
    model_schema,
)

Probabilities = Mapping[str, float]
"""Piece to probability."""

# sentencepiece's trainer reads tabs, line ends and spaces in its own way; it sees these instead.
_STAND_INS = {"\t": "␉", "\n": "␤", "\r": "␍", " ": "▁"}

# It has uses of its own for U+2047 and U+2585. These and control characters are learned by no vocabulary: bytes do.
_UNLEARNABLE = [*_STAND_INS.values(), "\u2047", "\u2585", *map(chr, (*range(0x20), 0x7F))]

_TO_TRAINER = str.maketrans({**dict.fromkeys(_UNLEARNABLE, ""), "\t": "␉", "\n": "␤", "\r": "␍"})
_FROM_TRAINER = str.maketrans({stand_in: character for character, stand_in in _STAND_INS.items()})

_UNSEEN = math.exp(LOWEST_SCORE / SCORE_STEPS)
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


def learn(documents: Iterable[str], vocab_size: int, character_coverage: float) -> dict[str, float]:
    """The frequency analysis of one domain: its likeliest pieces with their probabilities in a Unigram model.

    Besides single characters there are up to `vocab_size` pieces, so that any domain could fill the merged vocabulary.
    Characters are kept by falling frequency until they cover `character_coverage` of the text; `ALPHABET` always is.
    """
    import sentencepiece

    words = list(_words(documents))
    if not words:
        return dict.fromkeys(ALPHABET, _UNSEEN)
    alphabet = set().union(*words)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size + len(alphabet),
        hard_vocab_limit=False,
        seed_sentencepiece_size=10 * vocab_size + len(alphabet),
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
    schema = model_schema().ModelProto
    pieces = schema.FromString(model.getvalue()).pieces
    normal = schema.SentencePiece.NORMAL
    learned = {piece.piece.translate(_FROM_TRAINER): math.exp(piece.score) for piece in pieces if piece.type == normal}
    allowed = {piece: probability for piece, probability in learned.items() if is_allowed(piece)}
    total = sum(allowed.values())
    return dict.fromkeys(ALPHABET, _UNSEEN) | {piece: probability / total for piece, probability in allowed.items()}


def merge(domains: Mapping[str, Probabilities], weights: Mapping[str, float], vocab_size: int) -> Vocabulary:
    """Merge and de-duplicate domain vocabularies into one of `vocab_size` pieces, bytes and special ones included.

    Pieces are taken by falling probability in the mixture of the domains. A piece brings its characters with it, so
    that what cannot be spelled has no pieces at all. A piece is passed over when pieces already taken segment its text
    better than it does itself. Those taken later are less likely than it, so they never do: every piece is reachable.

    The vocabulary is smaller when the domains have too few pieces.
    """
    mixture = mix(domains, weights)
    room = vocab_size - len(SPECIAL_PIECES) - len(BYTE_PIECES)
    taken: dict[str, int] = {}
    unreachable = 0
    for piece in _by_priority(mixture):
        if len(taken) == room:
            break
        score = max(LOWEST_SCORE, round(SCORE_STEPS * math.log(mixture[piece])))
        if len(piece) == 1:
            taken[piece] = score
        elif all(character in taken for character in piece):
            if score >= _best_score(piece, taken):
                taken[piece] = score
            else:
                unreachable += 1
    return Vocabulary(dict(sorted(taken.items(), key=lambda item: (-item[1], item[0]))), unreachable)


def mix(domains: Mapping[str, Probabilities], weights: Mapping[str, float]) -> dict[str, float]:
    """The probabilities of a text that takes each piece from a domain drawn by `weights`."""
    total = sum(weights[name] for name in domains)
    mixture: dict[str, float] = {}
    for name, probabilities in domains.items():
        for piece, probability in probabilities.items():
            mixture[piece] = mixture.get(piece, 0.0) + weights[name] / total * probability
    return mixture


def _by_priority(mixture: Probabilities) -> list[str]:
    """Pieces by falling probability, `ALPHABET` first and every other character as early as a piece that needs it."""
    priority = dict(mixture)
    for piece, probability in mixture.items():
        for character in piece:
            if character in priority:
                priority[character] = max(priority[character], probability)
    priority.update(dict.fromkeys(ALPHABET, 1.0))
    return sorted(mixture, key=lambda piece: (-priority[piece], len(piece), piece))


def _best_score(text: str, scores: Mapping[str, int]) -> int:
    """Score of the best segmentation of `text`, whose characters all are pieces."""
    best = [0]
    for end in range(1, len(text) + 1):
        best.append(max(best[start] + scores[text[start:end]] for start in range(end) if text[start:end] in scores))
    return best[-1]


def _words(documents: Iterable[str]) -> Iterator[str]:
    """Words as the trainer is to see them.

    Not lines, because it only considers substrings that occur in different surroundings, and would never think of a
    word that always follows the same other.
    """
    for document in documents:
        for word in re.findall(WORD, document):
            if word := word.translate(_TO_TRAINER):
                yield word
