"""Documents rearranged so that a causal model learns to fill gaps (Bavarian et al. 2022; Yuan 2.0, section 4).

As in Yuan 2.0's `GPTDataset`: each document of a window is, with probability `rate`, decoded, cut at two random
characters into prefix, middle and suffix, and encoded again in one of two layouts:

    PSM   <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    SPM   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle

and the window is then cut, or filled with <pad>, to its length. One difference: Yuan's code trains on <pad> as a label,
here <pad> has none. A document that the window cuts inside a character of several tokens loses that character.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pangu.config import FillInTheMiddleConfig
from pangu.data.packing import Window
from pangu.tokenizer.tokenizer import Tokenizer


class RearrangedWindow(NamedTuple):
    """A window whose documents are rearranged by chance, drawn from `key` alone."""

    window: Window
    tokenizer: Tokenizer
    config: FillInTheMiddleConfig
    key: tuple[int, ...]

    def read(self, out: npt.NDArray[np.int64]) -> list[int]:
        """Fill `out` [length]; the offsets in (0, length) at which documents, or the padding, start."""
        random = np.random.default_rng(self.key)
        original = np.empty_like(out)
        documents = np.split(original, self.window.read(original))
        rearranged = [
            rearrange(document, self.tokenizer, self.config.suffix_first_rate, random)
            if random.random() < self.config.rate
            else document
            for document in documents
        ]
        stream = np.concatenate(rearranged)[: len(out)]
        out[: len(stream)] = stream
        out[len(stream) :] = self.tokenizer.pad_id
        ends = np.cumsum([len(document) for document in rearranged])
        return ends[ends < len(out)].tolist()


def rearrange(
    document: npt.NDArray[np.int64], tokenizer: Tokenizer, suffix_first_rate: float, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """One document [length], or a part of one, in PSM or SPM layout; an <eod> at its end stays there."""
    content, end = (document[:-1], document[-1:]) if document[-1] == tokenizer.eod_id else (document, document[:0])
    text = tokenizer.decode(content.tolist())
    first, second = sorted(random.integers(len(text) + 1, size=2).tolist())
    prefix, middle, suffix = map(tokenizer.encode, (text[:first], text[first:second], text[second:]))
    if random.random() < suffix_first_rate:
        ids = [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, *suffix, tokenizer.fim_middle_id, *prefix, *middle]
    else:
        ids = [tokenizer.fim_prefix_id, *prefix, tokenizer.fim_suffix_id, *suffix, tokenizer.fim_middle_id, *middle]
    return np.concatenate([np.array(ids, np.int64), end])
