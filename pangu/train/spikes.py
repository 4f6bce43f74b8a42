"""Counting loss spikes: losses far above the recent ones."""

import math
from collections import deque
from typing import Any


class SpikeDetector:
    """A loss is a spike when it exceeds the mean of the last `window` accepted losses by `deviations` deviations.

    Spikes and non-finite losses are not accepted: one of them must not distort the statistics that later losses are
    judged by. `window` spikes in a row are a new level rather than spikes, and the statistics start afresh.
    Nothing is a spike before `window` losses have been accepted.
    """

    def __init__(self, window: int, deviations: float) -> None:
        self.window = window
        self.deviations = deviations
        self.count = 0
        self._accepted: deque[float] = deque(maxlen=window)
        self._in_a_row = 0

    def update(self, loss: float, *, skipped: bool = False) -> bool:
        """Whether `loss` is a spike. With `skipped` (the step was not taken) or not finite, it changes nothing."""
        if skipped or not math.isfinite(loss):
            return False
        if self._is_spike(loss):
            self.count += 1
            self._in_a_row += 1
            if self._in_a_row == self.window:
                self._accepted.clear()
                self._in_a_row = 0
            return True
        self._in_a_row = 0
        self._accepted.append(loss)
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "accepted": list(self._accepted), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self._accepted = deque(state["accepted"], maxlen=self.window)
        self._in_a_row = state["in_a_row"]

    def _is_spike(self, loss: float) -> bool:
        if len(self._accepted) < self.window:
            return False
        mean = math.fsum(self._accepted) / self.window
        variance = math.fsum((value - mean) ** 2 for value in self._accepted) / self.window
        return loss > mean + self.deviations * math.sqrt(variance)
