"""An endless made-up token stream that a model can learn: for runs that should need no data.

Every document counts upwards, modulo the alphabet, from a random token in a stride of its own. The first two tokens and
the length are chance, everything between follows: the loss falls from ln(vocab_size) towards that remainder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pangu.data.packing import Window
from pangu.errors import ConfigError

DOMAIN = "synthetic"
EOD_ID = 0
_STRIDES = 8
_SHORTEST, _LONGEST = 8, 128
_TRAINING, _VALIDATION = 0, 1


@dataclass(frozen=True)
class SyntheticWindow:
    """One sequence, a function of its key alone."""

    key: tuple[int, ...]
    alphabet: int
    """Tokens 1 to `alphabet` are used, and EOD_ID."""

    def read(self, out: npt.NDArray[np.int64]) -> list[int]:
        """Fill `out` [length]; the offsets in (0, length) at which documents start."""
        random = np.random.default_rng(self.key)
        count = len(out) // _SHORTEST + 1
        lengths = random.integers(_SHORTEST, _LONGEST, count, endpoint=True)
        ends = np.cumsum(lengths)
        documents = np.repeat(np.arange(count), lengths)[: len(out)]  # [length]
        offsets = np.arange(len(out)) - (ends - lengths)[documents]
        first = random.integers(self.alphabet, size=count)
        stride = random.integers(1, _STRIDES, count, endpoint=True)
        out[:] = 1 + (first[documents] + stride[documents] * offsets) % self.alphabet
        out[ends[ends <= len(out)] - 1] = EOD_ID
        return ends[ends < len(out)].tolist()


class SyntheticSource:
    """Stands where a `DomainSource` stands when `data.synthetic` is set."""

    validation_domains: tuple[str, ...] = (DOMAIN,)
    pad_id: int | None = None

    def __init__(self, vocab_size: int, seed: int) -> None:
        if vocab_size < 3:
            raise ConfigError(f"model.vocab_size {vocab_size} is too small for data.synthetic; it needs 3")
        self._alphabet = vocab_size - 1
        self._seed = seed

    def windows(self, phase_index: int, sequences: npt.NDArray[np.int64]) -> Sequence[Window]:
        """The given sequences of a phase."""
        keys = [(self._seed, _TRAINING, phase_index, sequence) for sequence in sequences.tolist()]
        return [SyntheticWindow(key, self._alphabet) for key in keys]

    def validation_windows(self, domain: str, sequence_length: int, count: int) -> Sequence[Window]:
        """`count` sequences that training never sees, the same at every call."""
        return [SyntheticWindow((self._seed, _VALIDATION, sequence), self._alphabet) for sequence in range(count)]
