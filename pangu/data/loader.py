"""Micro-batches of a run, as a pure function of (config, step, data-parallel rank).

Nothing is saved to resume: `Loader.batches(step)` gives the same micro-batches in any process at any time. The
sequences of a step are numbered on from those of the phase's steps before it, and dealt to the data-parallel ranks in
equal contiguous shares; neither their number nor `train.micro_batch_size` changes which sequences a step consists of.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pangu.config import Config
from pangu.data.batch import IGNORED_LABEL, Batch
from pangu.data.domains import DomainSource
from pangu.data.packing import Window, pack_all
from pangu.data.schedule import Position, Schedule
from pangu.data.synthetic import SyntheticSource
from pangu.errors import ConfigError


class Source(Protocol):
    """Where windows of tokens come from: a `DomainSource`, or a `SyntheticSource`."""

    @property
    def validation_domains(self) -> tuple[str, ...]: ...

    @property
    def pad_id(self) -> int | None: ...

    def windows(self, phase_index: int, sequences: npt.NDArray[np.int64]) -> Sequence[Window]: ...

    def validation_windows(self, domain: str, sequence_length: int, count: int) -> Sequence[Window]: ...


class Loader:
    """The share of data-parallel rank `dp_rank` of `dp_size`, from `first_step` on.

    validation_domains: names that `validation` takes.

    Raises `DataError` when the datasets do not fit the config, `ConfigError` when a batch cannot be dealt evenly.
    """

    def __init__(
        self, config: Config, schedule: Schedule, dp_rank: int = 0, dp_size: int = 1, first_step: int = 0
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        _check_batch_sizes(config, schedule, dp_size, first_step)
        self._source: Source
        if config.data.synthetic:
            self._source = SyntheticSource(config.model.vocab_size, config.train.seed)
        else:
            self._source = DomainSource(config, schedule)
        self.validation_domains = self._source.validation_domains

    def num_micro_batches(self, position: Position) -> int:
        """Micro-batches per rank in the step at `position`."""
        return position.batch_size // (self.config.train.micro_batch_size * self.dp_size)

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of one optimizer step."""
        position = self.schedule.at(step)
        share = position.batch_size // self.dp_size
        first = position.phase_sequences + self.dp_rank * share
        windows = self._source.windows(position.phase_index, np.arange(first, first + share))
        yield from self._pack(windows, position.sequence_length)

    def prefetch(self, start_step: int = 0) -> "Prefetcher":
        """`batches` for start_step, start_step + 1, ... with `data.prefetch` micro-batches prepared ahead."""
        return Prefetcher(self, start_step)

    def validation(self, domain: str, sequence_length: int, count: int) -> Iterator[Batch]:
        """This rank's share of `count` windows spread evenly over a held-out set, the same at every call.

        Fewer if the set has fewer. Every rank gets equally many micro-batches of the same shapes, as collectives want;
        ranks that run out of windows get one without labels.
        """
        windows = self._source.validation_windows(domain, sequence_length, count)
        share = list(windows[self.dp_rank :: self.dp_size])
        idle = len(share) * self.dp_size < len(windows)
        labelled = len(share)
        for batch in self._pack(share + [windows[0]] * idle, sequence_length):
            batch.labels[labelled * sequence_length :] = IGNORED_LABEL
            labelled -= self.config.train.micro_batch_size
            yield batch

    def _pack(self, windows: Sequence[Window], sequence_length: int) -> Iterator[Batch]:
        return pack_all(
            windows,
            self.config.train.micro_batch_size,
            sequence_length,
            reset_at_documents=self.config.data.reset_at_documents,
            reset_positions=self.config.data.reset_positions,
            pad_id=self._source.pad_id,
        )


class Prefetcher:
    """Steps in order from `start_step`, prepared by a background thread. A context manager; `close` ends the thread."""

    def __init__(self, loader: Loader, start_step: int) -> None:
        self._loader = loader
        self._next_step = start_step
        self._closed = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=loader.config.data.prefetch)
        self._thread: threading.Thread | None = None
        if loader.config.data.prefetch:
            self._thread = threading.Thread(target=self._produce, args=(start_step,), name="loader", daemon=True)
            self._thread.start()

    def batches(self, step: int) -> Iterator[Batch]:
        """As `Loader.batches`. Steps must be asked for one after the other and each be read to its end.

        An exception of the background thread is raised here.
        """
        if step != self._next_step:
            raise ValueError(f"step {step} asked for, but {self._next_step} comes next")
        if self._thread is None:
            yield from self._loader.batches(step)
        else:
            for _ in range(self._loader.num_micro_batches(self._loader.schedule.at(step))):
                item = self._queue.get()
                if isinstance(item, BaseException):
                    self._queue.put(item)  # for whoever asks again: the thread has ended
                    raise item
                yield item
        self._next_step += 1

    def close(self) -> None:
        """End the background thread and wait for it."""
        self._closed.set()
        if self._thread is not None:
            # The thread notices after its next put, for which there has to be room.
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self, start_step: int) -> None:
        try:
            for step in range(start_step, self._loader.schedule.total_steps):
                for batch in self._loader.batches(step):
                    self._queue.put(batch)
                    if self._closed.is_set():
                        return
        except BaseException as error:
            self._queue.put(error)


def _check_batch_sizes(config: Config, schedule: Schedule, dp_size: int, first_step: int) -> None:
    unit = config.train.micro_batch_size * dp_size
    for stretch in schedule.stretches(first_step):
        if stretch.batch_size % unit:
            raise ConfigError(
                f"phase {stretch.phase.name!r}: batch_size {stretch.batch_size} is not a multiple of {unit}, which is "
                f"train.micro_batch_size {config.train.micro_batch_size} x {dp_size} data-parallel ranks"
            )
