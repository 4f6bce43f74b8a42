"""One console line per step, readable in a terminal and in a log file."""

import math
import sys
from datetime import timedelta
from typing import Any, TextIO

_COLUMNS = (
    ("step", 9),
    ("tokens", 8),
    ("loss", 9),
    ("grad norm", 10),
    ("lr", 9),
    ("tokens/s", 9),
    ("MFU", 7),
    ("memory", 9),
    ("left", 9),
)


class Console:
    """Prints events as they come: a table of steps, and a line for anything else worth a person's attention."""

    def __init__(self, total_steps: int, interval: int, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.interval = interval
        self.stream = stream or sys.stdout

    def header(self, lines: list[str]) -> None:
        for line in lines:
            self.line(line)
        self.line(" ".join(f"{name:>{width}}" for name, width in _COLUMNS))

    def __call__(self, event: dict[str, Any]) -> None:
        kind, step = event["kind"], event["step"]
        if kind == "step" and (step % self.interval == 0 or step == self.total_steps or event["skipped"]):
            self.line(self._row(event))
        elif kind == "validation":
            losses = "  ".join(f"{domain} {loss:.4f}" for domain, loss in event["losses"].items())
            self.line(f"{step:>9} validation loss: {losses}")

    def _row(self, event: dict[str, Any]) -> str:
        cells = (
            f"{event['step']}/{self.total_steps}",
            _count(event["tokens"]),
            _number(event["loss"], ".4f"),
            _number(event["grad_norm"], ".3f"),
            f"{event['lr']:.2e}",
            _count(event["tokens_per_second"]),
            _number(event["mfu"], ".1%"),
            f"{event['memory_bytes'] / 2**30:.2f} GiB",
            str(timedelta(seconds=round(event["seconds_left"]))),
        )
        row = " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
        marks = ("skipped" if event["skipped"] else "") + ("spike" if event["spike"] else "")
        return f"{row}  {marks}".rstrip()

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _count(value: float) -> str:
    for unit in ("", "K", "M", "B", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.0f}" if unit == "" else f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None and math.isfinite(value) else "-" if value is None else str(value)
