"""The weight of each domain in the merged vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor

from pangu.tokenizer.pieces import load
from pangu.tokenizer.pruning import SURPLUS, prune
from pangu.tokenizer.tokenizer import bytes_per_token
from pangu.tokenizer.vocabulary import Probabilities, Vocabulary, merge

# Up to eight times the weight of every other domain.
_RAISE = 1.3
_MOST_RAISES = 8


@dataclass(frozen=True)
class Domain:
    """What is known of a domain."""

    words: Mapping[str, int]
    """How often each occurs in the documents to learn from."""
    probabilities: Probabilities
    """Its own vocabulary."""
    held_out: Sequence[str]
    """Documents to measure on."""


@dataclass(frozen=True)
class Merged:
    weights: Mapping[str, float]
    """They sum to 1."""
    vocabulary: Vocabulary
    bytes_per_token: Mapping[str, float]
    """On each domain's held-out documents."""


def balance(
    domains: Mapping[str, Domain], single_corpus: Mapping[str, float], own: Mapping[str, float], vocab_size: int
) -> Merged:
    """Merge with equal weights, unless the poorest domain needs more than others to be served better than before.

    `single_corpus` and `own` are bytes per token by a tokenizer of the concatenation of all domains, and by one of each
    domain alone. As long as the poorest domain has no more than `single_corpus` its weight is raised; when that does
    not help, weights are equal.
    """
    poor = poorest(single_corpus, own)
    equal = dict.fromkeys(domains, 1.0)
    for raises in range(_MOST_RAISES + 1 if len(domains) > 1 else 0):
        merged = merge_and_measure(domains, {**equal, poor: _RAISE**raises}, vocab_size)
        if merged.bytes_per_token[poor] > single_corpus[poor]:
            return merged
    return merge_and_measure(domains, equal, vocab_size)


def poorest(single_corpus: Mapping[str, float], own: Mapping[str, float]) -> str:
    """The domain with the fewest bytes per token by the single-corpus tokenizer, of those that could have more.

    Text that is mostly digits cannot: each is a token by any tokenizer.
    """
    improvable = [name for name in single_corpus if own[name] > single_corpus[name]] or single_corpus
    return min(improvable, key=lambda name: single_corpus[name])


def merge_and_measure(domains: Mapping[str, Domain], weights: Mapping[str, float], vocab_size: int) -> Merged:
    """Merge the domains' vocabularies into one larger than wanted, and prune that."""
    total = sum(weights.values())
    weights = {name: weight / total for name, weight in weights.items()}
    probabilities = {name: domain.probabilities for name, domain in domains.items()}
    words = {name: domain.words for name, domain in domains.items()}
    vocabulary = prune(merge(probabilities, weights, round(SURPLUS * vocab_size)), words, weights, vocab_size)
    if vocabulary.size < vocab_size:  # there are few candidates, and pruning found some of them unreachable
        vocabulary = merge(probabilities, weights, vocab_size)
    return Merged(weights, vocabulary, measure(load(vocabulary.scores), domains))


def measure(processor: SentencePieceProcessor, domains: Mapping[str, Domain]) -> dict[str, float]:
    """Bytes per token on each domain's held-out documents."""
    return {name: bytes_per_token(processor, domain.held_out) for name, domain in domains.items()}
