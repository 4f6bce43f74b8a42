"""A bounded, reproducible sample of a corpus too large to hold."""

import heapq
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LONGEST_DOCUMENT = 1 << 14
"""Characters; a longer document is cut at line ends and counts as several."""

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


def draw(documents: Iterable[str], max_bytes: int, seed: str) -> Sample:
    """Draw documents uniformly, without replacement, until they have `max_bytes` bytes (or there are no more).

    Every document is read once; memory holds `max_bytes` and one document more. A part of them (`HELD_OUT_FRACTION` of
    the bytes) is set aside for measuring.
    """
    keys = random.Random(seed)
    chosen: list[tuple[float, int, str]] = []  # a heap, the largest key on top
    count = corpus_bytes = chosen_bytes = 0
    for text in _cut(documents):
        size = len(text.encode())
        corpus_bytes += size
        chosen_bytes += size
        heapq.heappush(chosen, (-keys.random(), count, text))
        count += 1
        while chosen_bytes - len(chosen[0][2].encode()) >= max_bytes:
            chosen_bytes -= len(heapq.heappop(chosen)[2].encode())
    texts = [text for *_, text in sorted(chosen, reverse=True)]
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


def _cut(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        if len(document) <= LONGEST_DOCUMENT:
            if document.strip():
                yield document
        else:
            yield from re.findall(rf"(?s).{{1,{LONGEST_DOCUMENT}}}(?:(?<=\n)|\Z)|.{{1,{LONGEST_DOCUMENT}}}", document)
