"""The weight of each domain in the merged vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor

from pangu.tokenizer.pieces import serialize
from pangu.tokenizer.tokenizer import bytes_per_token
from pangu.tokenizer.vocabulary import Probabilities, Vocabulary, merge

_ROUNDS = 16
_RAISE = 1.15
_MARGIN = 1.003


@dataclass(frozen=True)
class Merged:
    weights: Mapping[str, float]
    """They sum to 1."""
    vocabulary: Vocabulary
    bytes_per_token: Mapping[str, float]
    """On each domain's held-out documents."""


def merge_and_measure(
    learned: Mapping[str, Probabilities],
    weights: Mapping[str, float],
    held_out: Mapping[str, Sequence[str]],
    vocab_size: int,
) -> Merged:
    """Merge the domains that were `learned`, and measure on all that have `held_out` documents."""
    total = sum(weights.values())
    vocabulary = merge(learned, weights, vocab_size)
    processor = load(vocabulary)
    measured = {name: bytes_per_token(processor, texts) for name, texts in held_out.items()}
    return Merged({name: weight / total for name, weight in weights.items()}, vocabulary, measured)


def search(
    learned: Mapping[str, Probabilities],
    held_out: Mapping[str, Sequence[str]],
    single_corpus: Mapping[str, float],
    own: Mapping[str, float],
    vocab_size: int,
) -> Merged:
    """Weights, from equal ones on, that serve the worst-off domain best, by two measures of bytes per token.

    First, the domain with the fewest under the single-corpus tokenizer has more than that, where this can be had.
    Then, the domain furthest below what it has by its `own` tokenizer is as near to it as possible. Every round raises
    the weight of the domain that fails; the best round counts.
    """
    fewest = min(single_corpus, key=lambda name: single_corpus[name])
    weights: Mapping[str, float] = dict.fromkeys(learned, 1.0)
    best, best_merit = None, (False, 0.0)
    for _ in range(_ROUNDS):
        merged = merge_and_measure(learned, weights, held_out, vocab_size)
        improved = merged.bytes_per_token[fewest] >= _MARGIN * single_corpus[fewest]
        share_of_own = {name: merged.bytes_per_token[name] / own[name] for name in learned}
        furthest = min(share_of_own, key=lambda name: share_of_own[name])
        if best is None or (improved, share_of_own[furthest]) > best_merit:
            best, best_merit = merged, (improved, share_of_own[furthest])
        raised = furthest if improved else fewest
        weights = {**merged.weights, raised: _RAISE * merged.weights[raised]}
    assert best is not None
    return best


def load(vocabulary: Vocabulary) -> SentencePieceProcessor:
    """The encoder of a vocabulary, once it has encoded the text of each learned piece with that very piece."""
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(serialize(vocabulary.scores))
    pieces = list(vocabulary.scores)
    encoded = processor.encode(pieces, num_threads=1)
    lost = [piece for piece, ids in zip(pieces, encoded, strict=True) if ids != [processor.piece_to_id(piece)]]
    if lost:
        raise RuntimeError(f"pieces that their own text is not encoded with: {lost[:5]}")
    return processor
