"""Which window of which domain a sequence is: pure arithmetic, no index to build, store or restore.

**Domain.** The sequences of a phase cycle through a table of 10,000 slots in which each domain has its share, as evenly
spaced as can be. Domain-local counts follow in closed form: full cycles times the share, plus a prefix count.

**Windows.** A domain is one stream of N tokens, its documents in stored order. A window of a phase is
`sequence_length + 1` tokens; neighbouring windows start `sequence_length` apart, so every token is predicted once.

**Regions.** No window comes twice before the domain is exhausted, across phases of any sequence lengths. To that end
the stream is cut into equal strata, which are consumed side by side from front to back: a phase reads, from each
stratum, the stretch that follows the previous phase's. With one stratum a phase would see one contiguous part of the
corpus; with up to 64 it sees samples from all over it. How much a phase consumes follows from its tokens alone, never
from `train.steps`, and phases appended later change nothing before them (unless they are the first to list a domain as
curriculum). An open-ended phase has the rest of the epoch.
An exhausted domain is read again from the front of its strata. What stays unread is less than one window per stratum at
the end of an epoch, and at most that at the end of a phase.

**Order.** Within the part of its region that lies in one epoch a phase reads windows in an order that is a
pseudo-random permutation of its own, or, in a domain of `PhaseConfig.curriculum`, as stored; such a domain has one
stratum.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pangu.config import Config, PhaseConfig
from pangu.data.permutation import mix, permute
from pangu.errors import ConfigError, DataError

CYCLE = 10_000
_STRATUM_TOKENS = 1 << 22
_MOST_STRATA = 64
_ENDLESS = 1 << 62

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interleaving:
    """The cycle of a phase through its domains."""

    domain: Integers  # [CYCLE], of each slot
    before: Integers  # [CYCLE], slots of the same domain before each slot
    share: Integers  # [domains], slots of each domain

    def locate(self, sequences: Integers) -> tuple[Integers, Integers]:
        """The domain of each sequence, and how many sequences of that domain come before it."""
        cycle, slot = np.divmod(sequences, CYCLE)
        domain = self.domain[slot]
        return domain, cycle * self.share[domain] + self.before[slot]

    def consumed(self, sequences: int) -> Integers:
        """Sequences of each domain among the first `sequences` of the phase, [domains]."""
        cycles, slots = divmod(sequences, CYCLE)
        return cycles * self.share + np.bincount(self.domain[:slots], minlength=len(self.share))


def interleave(weights: Sequence[float]) -> Interleaving:
    """Shares of CYCLE in proportion to `weights` [domains], rounded by largest remainder, spread evenly."""
    exact = np.asarray(weights) / sum(weights) * CYCLE
    share = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(share - exact, kind="stable")
    share[largest_first[: CYCLE - share.sum()]] += 1

    domain = np.repeat(np.arange(len(share)), share)
    before = np.concatenate([np.arange(count) for count in share])
    order = np.argsort((before + 0.5) / share[domain], kind="stable")
    return Interleaving(domain[order], before[order], share)


@dataclass(frozen=True)
class Region:
    """What one phase reads of one domain. A row is one window from each stratum."""

    first_offset: int
    """Tokens into each stratum at which the phase begins."""
    first_rows: int
    """Rows until the end of the current epoch or of the phase."""
    epoch_rows: int
    """Rows in every epoch after it."""
    later_rows: int
    """Rows after the first epoch; _ENDLESS for an open phase."""
    end_offset: int
    """Tokens into each stratum at which the next phase begins."""


def lay_out(stratum_tokens: int, offset: int, sequence_length: int, rows: int | None) -> Region:
    """The region of a phase that begins `offset` tokens into the strata and needs `rows` rows; None: no end."""
    epoch_rows = stratum_tokens // sequence_length
    rest_of_epoch = (stratum_tokens - offset) // sequence_length
    if rows is None:
        return Region(offset, rest_of_epoch, epoch_rows, _ENDLESS, 0)
    if rows <= rest_of_epoch:
        return Region(offset, rows, epoch_rows, 0, offset + rows * sequence_length)
    later = rows - rest_of_epoch
    return Region(offset, rest_of_epoch, epoch_rows, later, later % epoch_rows * sequence_length)


@dataclass(frozen=True)
class _Phase:
    """Per-domain numbers of a phase as arrays [domains], for lookup by domain."""

    interleaving: Interleaving
    sequence_length: int
    first_offset: Integers
    first_rows: Integers
    epoch_rows: Integers
    later_rows: Integers
    in_order: npt.NDArray[np.bool_]
    key: npt.NDArray[np.uint64]


class Mixture:
    """The order of all data of a run.

    config: its phases, domains and seed. phase_sequences: of `Schedule`. domain_tokens: stream length of each domain.
    Raises `DataError` for a domain too short for one window, `ConfigError` for a weight too small for the cycle.
    """

    def __init__(
        self,
        config: Config,
        phase_sequences: Sequence[int | None],
        domain_tokens: Sequence[int],
        stratum_tokens: int = _STRATUM_TOKENS,
    ) -> None:
        names = list(config.data.domains)
        curricula = {name for phase in config.phases for name in phase.curriculum}
        self._strata = np.array(
            [
                1 if name in curricula else min(max(tokens // stratum_tokens, 1), _MOST_STRATA)
                for name, tokens in zip(names, domain_tokens, strict=True)
            ]
        )
        # One token stays outside: the last window needs it as its last label.
        self._stratum_tokens = (np.array(domain_tokens) - 1) // self._strata
        self._phases: list[_Phase] = []
        offsets = [0] * len(names)
        for index, (phase, sequences) in enumerate(zip(config.phases, phase_sequences, strict=True)):
            interleaving = interleave(_weights(phase, names))
            regions = []
            for domain, name in enumerate(names):
                rows = None
                if sequences is not None or not interleaving.share[domain]:
                    rows = -(-int(interleaving.consumed(sequences or 0)[domain]) // int(self._strata[domain]))
                if interleaving.share[domain] and self._stratum_tokens[domain] < phase.sequence_length:
                    raise DataError(
                        f"domain {name!r} has {domain_tokens[domain]} tokens, less than one window of "
                        f"{phase.sequence_length} + 1 of phase {phase.name!r}; add data or shorten the sequences"
                    )
                regions.append(lay_out(int(self._stratum_tokens[domain]), offsets[domain], phase.sequence_length, rows))
            offsets = [region.end_offset for region in regions]
            self._phases.append(
                _Phase(
                    interleaving,
                    phase.sequence_length,
                    first_offset=np.array([region.first_offset for region in regions]),
                    first_rows=np.array([region.first_rows for region in regions]),
                    epoch_rows=np.array([region.epoch_rows for region in regions]),
                    later_rows=np.array([region.later_rows for region in regions]),
                    in_order=np.array([name in phase.curriculum for name in names]),
                    key=np.array([_key(config.train.seed, name, index) for name in names], np.uint64),
                )
            )

    def locate(self, phase_index: int, sequences: Integers) -> tuple[Integers, Integers]:
        """Domain (index into data.domains) and first token in the domain's stream, of sequences of a phase; all [n]."""
        phase = self._phases[phase_index]
        domain, index = phase.interleaving.locate(sequences)
        strata = self._strata[domain]
        first_rows, epoch_rows = phase.first_rows[domain], phase.epoch_rows[domain]

        # Epochs count from the one in which the phase begins.
        in_first = index < first_rows * strata
        later_epoch, later_index = np.divmod(index - first_rows * strata, epoch_rows * strata)
        later_rows = np.minimum(phase.later_rows[domain] - later_epoch * epoch_rows, epoch_rows)
        epoch = np.where(in_first, 0, later_epoch + 1)
        index = np.where(in_first, index, later_index)
        rows = np.where(in_first, first_rows, later_rows)

        key = mix(phase.key[domain] + epoch.astype(np.uint64))
        index = np.where(phase.in_order[domain], index, permute(index, rows * strata, key))
        row, stratum = np.divmod(index, strata)
        offset = np.where(in_first, phase.first_offset[domain], 0) + row * phase.sequence_length
        return domain, stratum * self._stratum_tokens[domain] + offset


def _weights(phase: PhaseConfig, names: Sequence[str]) -> list[float]:
    weights = [phase.weights.get(name, 0.0) if phase.weights else 1.0 for name in names]
    for name, weight in zip(names, weights, strict=True):
        if 0 < weight < sum(weights) / CYCLE:
            raise ConfigError(
                f"phase {phase.name!r}: weight {weight} of {name!r} is {weight / sum(weights):.2g} of all; "
                f"the smallest share that can be kept is {1 / CYCLE}: raise it, or set it to 0"
            )
    return weights


def _key(seed: int, domain: str, phase_index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{phase_index}/{domain}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
