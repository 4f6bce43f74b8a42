"""A bounded, reproducible sample of a corpus too large to hold."""

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LONGEST_DOCUMENT = 1 << 14
"""Characters; a longer document, or one over a twentieth of the sample, is cut at line ends and counts as several."""

HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True)
class Sample:
    training: list[str]
    """Documents in random order."""
    held_out: list[str]
    """Other documents; at least one, unless the corpus has fewer than two."""
    documents: int
    """Of the whole corpus."""
    bytes: int
    """Of the whole corpus, in UTF-8."""


def draw(documents: Iterable[str], max_bytes: int, seed: int) -> Sample:
    """Draw documents uniformly, without replacement, until they have `max_bytes` bytes (or there are no more).

    Those with the smallest hashes are taken, so their order in the corpus does not matter and repetitions count once.
    Every document is read; memory holds `max_bytes` and one document more. A part of what is drawn (`HELD_OUT_FRACTION`
    of the bytes) is set aside for measuring.
    """
    chosen: list[tuple[int, str]] = []  # a heap, the largest hash on top
    hashes: set[int] = set()
    count = corpus_bytes = chosen_bytes = 0
    for text in _cut(documents, min(LONGEST_DOCUMENT, max(1, max_bytes // 20))):
        content = text.encode()
        count += 1
        corpus_bytes += len(content)
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest(), "big")
        if digest in hashes:
            continue
        hashes.add(digest)
        chosen_bytes += len(content)
        heapq.heappush(chosen, (-digest, text))
        while chosen_bytes - len(chosen[0][1].encode()) >= max_bytes:
            digest, text = heapq.heappop(chosen)
            hashes.remove(-digest)
            chosen_bytes -= len(text.encode())
    texts = [text for _, text in sorted(chosen, reverse=True)]
    held_out: list[str] = []
    held_out_bytes = 0
    while len(texts) > 1 and held_out_bytes < HELD_OUT_FRACTION * chosen_bytes:
        held_out.append(texts.pop())
        held_out_bytes += len(held_out[-1].encode())
    return Sample(texts, held_out, count, corpus_bytes)


def concatenate(samples: Iterable[Sample]) -> list[str]:
    """A sample of the concatenation of all corpora: from each in proportion to its bytes."""
    samples = list(samples)
    fraction = min(sum(len(text.encode()) for text in sample.training) / sample.bytes for sample in samples)
    texts = []
    for sample in samples:
        remaining = fraction * sample.bytes
        for text in sample.training:
            if remaining <= 0:
                break
            texts.append(text)
            remaining -= len(text.encode())
    return texts


def _cut(documents: Iterable[str], longest: int) -> Iterator[str]:
    part = re.compile(rf"(?s).{{1,{longest}}}(?:(?<=\n)|\Z)|.{{1,{longest}}}")
    for document in documents:
        if document.strip():
            yield from part.findall(document)
