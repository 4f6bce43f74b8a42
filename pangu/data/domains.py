"""The datasets of `data.domains`: opened, checked against the config, and read in the order of the mixture."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pangu.config import Config
from pangu.data.fill_in_the_middle import RearrangedWindow
from pangu.data.indexed_dataset import IndexedDataset
from pangu.data.mixture import Mixture
from pangu.data.packing import Window
from pangu.data.schedule import Schedule
from pangu.data.stream import StreamTable, StreamWindow, StreamWindows, TokenStream
from pangu.errors import DataError
from pangu.tokenizer.tokenizer import Tokenizer


class DomainSource:
    """Windows of the corpus for training, and of the held-out sets for validation.

    Raises `DataError`, naming domain and file, for a dataset that is missing, empty, too short for a window, or built
    with a tokenizer that is not `data.tokenizer`, is not that of the other datasets, or does not fit the model.
    """

    def __init__(self, config: Config, schedule: Schedule) -> None:
        self._seed = config.train.seed
        self._tokenizer = Tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        self._fill_in_the_middle = config.data.fill_in_the_middle
        streams, validation = {}, {}
        for name, domain in config.data.domains.items():
            streams[name] = _open(f"data.domains.{name}.paths", domain.paths, config.model.vocab_size)
            if domain.validation_paths:
                field = f"data.domains.{name}.validation_paths"
                validation[name] = _open(field, domain.validation_paths, config.model.vocab_size)
                _check_length(field, validation[name], config)
        _check_tokenizers([*streams.values(), *validation.values()], config.data.tokenizer, self._tokenizer)
        self._table = StreamTable(list(streams.values()))
        self._validation = validation
        self._mixture = Mixture(config, schedule.phase_sequences, [stream.num_tokens for stream in streams.values()])

    @property
    def validation_domains(self) -> tuple[str, ...]:
        return tuple(self._validation)

    @property
    def pad_id(self) -> int | None:
        """The token that fills windows, None where none needs filling."""
        return self._tokenizer.pad_id if self._tokenizer and self._fill_in_the_middle.rate else None

    def windows(self, phase_index: int, sequences: npt.NDArray[np.int64]) -> Sequence[Window]:
        """The given sequences of a phase."""
        domains, starts = self._mixture.locate(phase_index, sequences)
        windows = StreamWindows(self._table, np.stack([domains, starts], axis=1))
        if not self._tokenizer or not self._fill_in_the_middle.rate:
            return windows
        return [
            RearrangedWindow(window, self._tokenizer, self._fill_in_the_middle, (self._seed, phase_index, sequence))
            for window, sequence in zip(windows, sequences.tolist(), strict=True)
        ]

    def validation_windows(self, domain: str, sequence_length: int, count: int) -> Sequence[Window]:
        """`count` windows spread evenly over a held-out set, or all of them if there are fewer."""
        stream = self._validation[domain]
        available = (stream.num_tokens - 1) // sequence_length
        count = min(count, available)
        return [StreamWindow(stream, index * available // count * sequence_length) for index in range(count)]


def _open(field: str, paths: Sequence[str], vocab_size: int) -> TokenStream:
    datasets = []
    for path in paths:
        if not Path(f"{path}.idx").is_file():
            raise DataError(f"{field}: no dataset {path} ({path}.idx does not exist){_nearest(path)}")
        dataset = IndexedDataset(path)
        if dataset.num_tokens == 0:
            raise DataError(f"{field}: dataset {path} is empty; build it from a corpus that has text")
        if dataset.metadata and dataset.metadata.vocab_size > vocab_size:
            raise DataError(
                f"{field}: dataset {path} was built with {dataset.metadata.vocab_size} token ids, but "
                f"model.vocab_size is {vocab_size}; raise it, or build the dataset with another tokenizer"
            )
        datasets.append(dataset)
    return TokenStream(datasets, vocab_size)


def _nearest(path: str) -> str:
    """What else there is near a dataset that does not exist."""
    folder = Path(path).parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either: build the dataset with `pangu data build`"
    known = sorted(str(index.with_suffix("")) for index in folder.glob("*.idx"))
    nearest = difflib.get_close_matches(path, known, n=1) or known[:1]
    return (
        f"; did you mean {nearest[0]}?" if nearest else f"; {folder} has no datasets: build it with `pangu data build`"
    )


def _check_length(field: str, stream: TokenStream, config: Config) -> None:
    longest = max(config.phases, key=lambda phase: phase.sequence_length)
    if stream.num_tokens < longest.sequence_length + 1:
        raise DataError(
            f"{field}: {_names(stream)} has {stream.num_tokens} tokens, less than one window of "
            f"{longest.sequence_length} + 1 of phase {longest.name!r}; hold out more, or shorten the sequences"
        )


def _names(stream: TokenStream) -> str:
    return ", ".join(dataset.prefix for dataset in stream.datasets)


def _check_tokenizers(streams: Sequence[TokenStream], path: str, tokenizer: Tokenizer | None) -> None:
    """Every dataset that says so was built with `tokenizer`, or if there is none, with one and the same."""
    reference = (f"data.tokenizer {path} is", tokenizer.fingerprint) if tokenizer else None
    for dataset in (dataset for stream in streams for dataset in stream.datasets):
        if dataset.metadata is None:
            continue
        fingerprint = dataset.metadata.tokenizer_fingerprint
        if reference is None:
            reference = (f"dataset {dataset.prefix} was built with", fingerprint)
        elif fingerprint != reference[1]:
            raise DataError(
                f"dataset {dataset.prefix} was built with tokenizer {fingerprint[:12]}, but {reference[0]} "
                f"{reference[1][:12]} (sha256 of the model file); build the dataset again with the same tokenizer"
            )
