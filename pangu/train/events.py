"""The event stream of a run: RUN/events.jsonl, one JSON object per line, that the console, TensorBoard and plots read.

Every event has `kind` and `step`, the number of optimizer steps taken when it happened. Kinds:

    step        tokens, loss, grad_norm, lr, tokens_per_second, mfu, memory_bytes, and whatever the trainer adds
    validation  losses: {domain: loss}
    statistics  activations, gains (see statistics.py)
    others      free, such as start, message, end

JSON has no NaN or infinity: non-finite numbers are written as null.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pangu.errors import PanguError, TrainingError

Event = dict[str, Any]

FILE_NAME = "events.jsonl"


class EventLog:
    """Appends events to a run's file, unbuffered, and hands them to subscribers."""

    def __init__(self, run: Path, step: int = 0, subscribers: Sequence[Callable[[Event], None]] = ()) -> None:
        """Keeps the events that `run` already has up to `step`, where training goes on, and removes later ones.

        A resumed run's file thus equals that of an uninterrupted one. Step 0 starts an empty file.
        """
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / FILE_NAME
        self.subscribers = list(subscribers)
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(_end_of(self.path, step))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Record one event. `values` are JSON values; floats may be non-finite.

        Raises `TrainingError` when the file cannot be written, such as for a full disk.
        """
        event = {"kind": kind, "step": step, **_finite(values)}
        self._append(json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        for subscriber in self.subscribers:
            subscriber(event)

    def close(self) -> None:
        self._file.close()

    def _append(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise TrainingError(f"{self.path}: {error.strerror}; mend that and --resume") from error


def read_events(run: Path) -> list[Event]:
    """All events of a run; a last line cut short by a kill is left out.

    Raises `PanguError` when `run` has no events file or a line of it is not an event.
    """
    path = run / FILE_NAME
    if not path.is_file():
        raise PanguError(f"{run} is not a run: it has no {FILE_NAME}; give the folder of `pangu train --output`")
    return [event for event, _ in _read(path)]


def tensorboard(folder: Path, step: int = 0) -> Callable[[Event], None]:
    """A subscriber that writes every number of every event to TensorBoard files in `folder`.

    `step` is where training goes on: TensorBoard hides what a killed run wrote after it.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(event: Event) -> None:
        values = {key: value for key, value in event.items() if key not in ("kind", "step")}
        for name, number in _numbers(event["kind"], values):
            writer.add_scalar(name, number, event["step"])
        writer.flush()

    return write


def _read(path: Path) -> Iterator[tuple[Event, int]]:
    """Events and the offset in bytes at which each one's line ends; a last line cut short is left out."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            end += len(line)
            try:
                event = json.loads(line)
                if not line.endswith(b"\n") or not {"kind", "step"} <= event.keys():
                    raise ValueError
            except (ValueError, AttributeError):
                if file.read(1):
                    raise PanguError(f"{path}: line {number} is not an event; remove it") from None
                return
            yield event, end


def _end_of(path: Path, step: int) -> int:
    """Where the events up to `step` end."""
    end = 0
    for event, offset in _read(path):
        if event["step"] > step:
            break
        end = offset
    return end


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers of nested dictionaries and lists under names such as statistics/gains/attention_norm/mean/3."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, int | float):
        yield name, value
