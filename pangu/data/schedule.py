"""Where a run stands at a step: phase, tokens, batch size, learning rate. Closed form, nothing to save or restore.

Steps count from 0. Inside a phase the batch size is piecewise constant: it changes at the first step whose phase tokens
have reached a threshold of the ramp. A phase ends at the first step boundary at which its tokens are spent, so it may
overshoot by less than one batch. `train.steps` cuts the whole run and changes nothing before the cut.

The learning rate of a step is the value, at the step's end, of one curve per phase: 0 at its start, linear to
`learning_rate` over `warmup_steps`, then a cosine in tokens to `final_learning_rate` at the phase's end. Step k of a
warm-up of w thus uses (k + 1) / w of the rate: no step is wasted on a rate of 0, and the last step of a phase has
exactly the final rate. (The Pangu Ultra report does not say whether its cosine runs over steps or tokens.)
"""

import bisect
import math
from dataclasses import dataclass, replace

from pangu.config import Config, PhaseConfig


@dataclass(frozen=True)
class Position:
    """One optimizer step. Counts are of what came before it."""

    step: int
    phase_index: int
    phase: PhaseConfig
    phase_step: int
    """Steps of the phase before this one."""
    tokens: int
    phase_tokens: int
    phase_sequences: int
    """Sequences of the phase before this step: the index, within the phase, of the step's first sequence."""
    batch_size: int
    """Sequences of this step, over all ranks and gradient-accumulation steps."""

    @property
    def sequence_length(self) -> int:
        return self.phase.sequence_length

    @property
    def step_tokens(self) -> int:
        """Tokens of this step."""
        return self.batch_size * self.phase.sequence_length

    def after(self, steps: int) -> "Position":
        """The position `steps` later if the batch size stayed as it is."""
        return replace(
            self,
            step=self.step + steps,
            phase_step=self.phase_step + steps,
            tokens=self.tokens + steps * self.step_tokens,
            phase_tokens=self.phase_tokens + steps * self.step_tokens,
            phase_sequences=self.phase_sequences + steps * self.batch_size,
        )


class Schedule:
    """The steps of a run.

    total_steps: optimizer steps of the run.
    phase_steps: the same per phase, 0 for a phase that `train.steps` cuts off.
    phase_sequences: sequences per phase before any cut, None for an open last phase. The data order is laid out by
        these, so that a longer or shorter run sees the same data.
    """

    def __init__(self, config: Config) -> None:
        self._segments: list[Position] = []
        phase_ends: list[Position | None] = []
        step = tokens = 0
        for index, phase in enumerate(config.phases):
            start = Position(step, index, phase, 0, tokens, 0, 0, phase.batch_size)
            segments, phase_end = _segments(start)
            self._segments += segments
            phase_ends.append(phase_end)
            if phase_end is not None:
                step, tokens = phase_end.step, phase_end.tokens
        self._first_steps = [segment.step for segment in self._segments]

        limits = [config.train.steps, None if phase_ends[-1] is None else phase_ends[-1].step]
        self.total_steps = min(limit for limit in limits if limit is not None)
        ends = [min(self.total_steps, end.step if end else self.total_steps) for end in phase_ends]
        self.phase_steps = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        self.phase_sequences = tuple(None if end is None else end.phase_sequences for end in phase_ends)

    def at(self, step: int) -> Position:
        """The position of `step`. Raises `ValueError` outside [0, total_steps)."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the run's {self.total_steps} steps")
        return self._at(step)

    def stretches(self, first_step: int = 0) -> list[Position]:
        """The stretches of equal batch size that a run from `first_step` on passes through, by their first steps."""
        ends = [*self._first_steps[1:], self.total_steps]
        passed = zip(self._segments, ends, strict=True)
        return [start for start, end in passed if start.step < self.total_steps and end > first_step]

    def learning_rate(self, position: Position) -> float:
        """The rate of the step at `position`; see the module's docstring for the curve."""
        phase = position.phase
        if position.phase_step < phase.warmup_steps:
            return phase.learning_rate * (position.phase_step + 1) / phase.warmup_steps
        if phase.final_learning_rate is None:
            return phase.learning_rate
        warm = self._at(position.step - position.phase_step + phase.warmup_steps).phase_tokens
        end = self._at(self.total_steps).phase_tokens if phase.tokens is None else phase.tokens
        progress = min((position.phase_tokens + position.step_tokens - warm) / (end - warm), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return phase.final_learning_rate + (phase.learning_rate - phase.final_learning_rate) * cosine

    def _at(self, step: int) -> Position:
        """Unchecked: a step past the end of the run extends its last segment."""
        segment = self._segments[bisect.bisect_right(self._first_steps, step) - 1]
        return segment.after(step - segment.step)


def _segments(start: Position) -> tuple[list[Position], Position | None]:
    """The first steps of a phase's stretches of equal batch size, and the position at which the phase has ended.

    The end is None for a phase without `tokens`.
    """
    phase = start.phase
    thresholds = [step.tokens for step in phase.batch_size_ramp]
    batch_sizes = [phase.batch_size, *(step.batch_size for step in phase.batch_size_ramp)]
    segments: list[Position] = []
    position = start
    for batch_size, threshold in zip(batch_sizes, [*thresholds, phase.tokens], strict=True):
        position = replace(position, batch_size=batch_size)
        if threshold is None:
            return [*segments, position], None
        until = threshold if phase.tokens is None else min(threshold, phase.tokens)
        steps = -(-(until - position.phase_tokens) // position.step_tokens)
        if steps > 0:
            segments.append(position)
            position = position.after(steps)
    return segments, position
