"""What a step took: time, rate, MFU and memory, beside what it computed."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from pangu import device
from pangu.config import Config
from pangu.data.schedule import Position, Schedule
from pangu.model.count import flops_per_token
from pangu.parallel.layout import Layout
from pangu.parallel.model import ParallelModel

Predict = Callable[[Layout, Position, float, Mapping[str, float]], dict[str, Any]]
"""From layout, position, peak FLOP/s and seconds by stage of a step: fields of its event, such as what was expected."""


class Meter:
    """Measures the steps of a run from its creation on, a step from the end of the one before."""

    def __init__(
        self, config: Config, schedule: Schedule, model: ParallelModel, predict: Predict | None = None
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.model = model
        self.predict = predict
        self.peak_flops, self.peak_source = (
            (config.metrics.peak_flops, "metrics.peak_flops")
            if config.metrics.peak_flops
            else device.peak_flops(model.target)
        )
        self.restart()

    def restart(self) -> None:
        """Forget the time that has passed: the first step begins now."""
        self._started = self._last = self._lap = time.perf_counter()
        self._steps = 0
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Count the time since the last lap, or since the step before, as that of a stage of the step.

        On an accelerator it is the host's time: a stage ends for it when a result is waited for.
        """
        now = time.perf_counter()
        self._stages[stage], self._lap = now - self._lap, now

    def measure(self, position: Position) -> dict[str, Any]:
        """To be called by all ranks at the end of the step at `position`; memory is that of the rank with the most."""
        now = time.perf_counter()
        seconds, self._last, self._lap = now - self._last, now, now
        self._steps += 1
        stages, self._stages = self._stages, {}
        stages["other"] = seconds - sum(stages.values())
        (memory_bytes,) = self.model.max_over_ranks(device.memory_bytes(self.model.target))
        tokens_per_second = position.step_tokens / seconds
        flops = flops_per_token(self.config.model, position.sequence_length)
        mean_seconds = (now - self._started) / self._steps
        return {
            "seconds": seconds,
            "stage_seconds": stages,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * flops / (self.peak_flops * self.model.layout.world_size),
            "memory_bytes": round(memory_bytes),
            "seconds_left": mean_seconds * (self.schedule.total_steps - position.step - 1),
            **(self.predict(self.model.layout, position, self.peak_flops, stages) if self.predict else {}),
        }

    def describe(self) -> str:
        """How MFU is counted."""
        devices = self.model.layout.world_size
        return (
            f"MFU = tokens/s x model FLOPs per token (6 per matmul weight, causal attention) / "
            f"{f'({devices} x ' if devices > 1 else ''}{self.peak_flops:.3g}{')' if devices > 1 else ''} FLOP/s "
            f"({self.peak_source})"
        )
