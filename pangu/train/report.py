"""Where a run's events and messages go: on one rank to its folder and the console, on the others nowhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pangu.config import MetricsConfig
from pangu.train.console import Console
from pangu.train.events import Event, EventLog, tensorboard


class Report:
    """A context manager; use it only inside its `with` block."""

    def __init__(self, run: Path, metrics: MetricsConfig, first_step: int, total_steps: int, *, speaks: bool) -> None:
        """`speaks`: whether this is the rank that reports. Events up to `first_step` are kept, later ones removed."""
        self._log: EventLog | None = None
        self._console = Console(total_steps, metrics.console_interval) if speaks else None
        if self._console is None:
            return
        subscribers: list[Callable[[Event], None]] = [self._console]
        if metrics.tensorboard:
            subscribers.append(tensorboard(run / "tensorboard", first_step))
        self._log = EventLog(run, first_step, subscribers)

    def header(self, lines: Sequence[str]) -> None:
        if self._console is not None:
            self._console.header(list(lines))

    def line(self, text: str) -> None:
        if self._console is not None:
            self._console.line(text)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """As `EventLog.write`."""
        if self._log is not None:
            self._log.write(kind, step, **values)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._log is not None:
            self._log.close()
