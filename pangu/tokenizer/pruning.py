"""From a vocabulary that is too large to one of the right size."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pangu.tokenizer.pieces import ALPHABET, load
from pangu.tokenizer.vocabulary import UNSEEN, Vocabulary, best_segmentation, mix, select

SURPLUS = 1.5
"""Size of a vocabulary worth pruning over that of the result."""

_ROUNDS = 2
_BATCH = 1 << 14


def prune(
    vocabulary: Vocabulary, words: Mapping[str, Mapping[str, int]], weights: Mapping[str, float], vocab_size: int
) -> Vocabulary:
    """Drop the pieces that save the fewest tokens, in two rounds, until `vocab_size` remain.

    A piece saves what the second-best segmentation of its text has more than it, as often as it is used; uses are
    shares of a domain's tokens, averaged over domains with `weights`. They become the new probabilities each round (EM
    with best segmentations only). sentencepiece prunes alike, but by likelihood; this gives more bytes per token in
    every domain. words: how often each occurs, per domain.
    """
    surplus = vocabulary.size / vocab_size
    for round_ in range(1, _ROUNDS + 1):
        if vocabulary.size <= vocab_size:
            break
        usage = mix({name: _usage(vocabulary, words[name]) for name in weights}, weights)
        size = math.ceil(vocab_size * surplus ** (1 - round_ / _ROUNDS))
        vocabulary = _keep(vocabulary, usage, size)
    return vocabulary


def _keep(vocabulary: Vocabulary, usage: Mapping[str, float], vocab_size: int) -> Vocabulary:
    """The pieces that save most, each with its characters, by their usage."""
    saved = {}
    for piece in vocabulary.scores:
        pieces_without = best_segmentation(piece, vocabulary.scores)[1] if len(piece) > 1 else len(piece.encode())
        saved[piece] = usage[piece] * (pieces_without - 1)
    for piece in vocabulary.scores:
        for character in piece:
            saved[character] = max(saved[character], saved[piece])
    saved.update(dict.fromkeys(ALPHABET, math.inf))
    ranking = sorted(saved, key=lambda piece: (-saved[piece], len(piece), piece))
    count = len(ranking) - (vocabulary.size - vocab_size)
    while True:
        kept = select({piece: max(usage[piece], UNSEEN) for piece in ranking[:count]}, vocab_size)
        if kept.size == vocab_size or count >= len(ranking):
            return Vocabulary(kept.scores, vocabulary.unreachable)
        count += vocab_size - kept.size  # by their usage, some are unreachable


def _usage(vocabulary: Vocabulary, words: Mapping[str, int]) -> dict[str, float]:
    """The share of each learned piece in the tokens of `words`."""
    processor = load(vocabulary.scores)
    counts: npt.NDArray[np.float64] = np.zeros(vocabulary.size)
    items = list(words.items())
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        encoded = processor.encode([word for word, _ in batch], num_threads=1)
        occurrences = np.repeat([count for _, count in batch], [len(ids) for ids in encoded])
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64)
        counts += np.bincount(ids, weights=occurrences, minlength=vocabulary.size)
    learned = counts[vocabulary.size - len(vocabulary.scores) :] / counts.sum()
    return dict(zip(vocabulary.scores, learned.tolist(), strict=True))
