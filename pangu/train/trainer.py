"""The training loop, from the first batch to the last checkpoint."""

import math
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pangu import __version__, device
from pangu import config as configuration
from pangu.config import Config
from pangu.data.batch import Batch
from pangu.data.loader import Loader
from pangu.data.schedule import Position, Schedule
from pangu.device import environment
from pangu.errors import ConfigError, TrainingError
from pangu.files import write_atomically
from pangu.model.count import num_parameters
from pangu.parallel.layout import Layout, make_layout
from pangu.parallel.mesh import connected, environment_rank
from pangu.parallel.model import ParallelModel, build_model
from pangu.train.checkpoint import Checkpointer, complete_steps
from pangu.train.meter import Meter, Predict
from pangu.train.optimizer import AdamW, clip_scale
from pangu.train.report import Report
from pangu.train.run import CHECKPOINTS, CONFIG, HANGS, TOKENIZER
from pangu.train.signals import stop_signals
from pangu.train.spikes import SpikeDetector
from pangu.train.statistics import LayerStatistics
from pangu.train.watchdog import Watchdog, spread


def train(config: Config, output: Path, *, resume: bool = False, predict: Predict | None = None) -> bool:
    """Train `config` into the folder `output`; with `resume`, go on from its newest complete checkpoint if it has one.

    Started by torchrun or `pangu launch`, this process is one rank of the layout that config.parallel describes;
    `output` must be the same folder for all of them. predict: adds fields to every step's event.
    SIGINT and SIGTERM end the run after the step in progress, with a checkpoint. Returns whether the schedule's end was
    reached. Raises `ConfigError`, `DataError` and `DeviceError` before anything is allocated or written, later
    `CheckpointError` and `TrainingError`.
    """
    rank, world_size, local_rank = environment_rank()
    existing = complete_steps(output / CHECKPOINTS)
    if existing and not resume:
        raise ConfigError(f"{output} already holds a run; add --resume to go on with it, or choose another --output")
    first_step = existing[-1] if existing else 0
    layout = make_layout(config, world_size, first_step)
    if device.resolve(config.train.device) == "npu":
        environment.apply(config)
    target = device.select(config.train.device, local_rank)
    schedule = Schedule(config)
    loader = Loader(config, schedule, layout.dp_rank(rank), layout.dp, first_step)
    with (
        connected(target, config.parallel, world_size),
        Checkpointer(output / CHECKPOINTS, config.checkpoint) as checkpointer,
    ):
        trainer = Trainer(config, output, target, schedule, loader, checkpointer, layout, predict)
        if resume:
            trainer.restore()
        return trainer.run()


@dataclass
class Counters:
    """What a run has counted so far; part of every checkpoint."""

    step: int = 0
    updates: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    statistics: dict[str, Any] | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Learner:
    """Owns model, optimizer and counters; `step` changes them."""

    def __init__(
        self, config: Config, schedule: Schedule, model: ParallelModel, predict: Predict | None = None
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.model = model
        self.counters = Counters()
        self.optimizer = AdamW(model.parameters.items(), config.optimizer)
        self.statistics = LayerStatistics(model.parts, model.gather)
        self.meter = Meter(config, schedule, model, predict)

    def step(self, position: Position, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over `batches`, skipped when the loss or the gradient is not finite.

        The loss is the mean over all labelled tokens of the step, whatever the micro-batches they came in.
        """
        self.model.rope_base = position.phase.rope_base or self.config.model.rope_base
        interval = self.config.metrics.statistics_interval
        with self.statistics.record((position.step + 1) % interval == 0 if interval else False) as statistics:
            part = self.model.forward_backward(batches, self.model.count_labels(batches))
        loss, norm = self.model.loss_and_gradient_norm(part)
        result = StepResult(loss.item(), norm.item(), statistics.result())
        self.meter.lap("forward_backward")
        self.counters.step += 1
        if result.finite:
            self.counters.updates += 1
            self.counters.skipped_in_a_row = 0
            self.optimizer.step(
                self.counters.updates,
                self.schedule.learning_rate(position),
                clip_scale(norm, self.config.optimizer.clip_norm),
            )
        else:
            self.counters.skipped_steps += 1
            self.counters.skipped_in_a_row += 1
        self.optimizer.zero_grad()
        return result


class Trainer(Learner):
    """Takes a `Learner` through a run: `run` takes steps until the schedule ends or a signal arrives.

    Every rank has one, and all of them take the same decisions; rank 0 alone writes events and talks to the console.
    """

    def __init__(
        self,
        config: Config,
        output: Path,
        target: torch.device,
        schedule: Schedule,
        loader: Loader,
        checkpointer: Checkpointer,
        layout: Layout,
        predict: Predict | None = None,
    ) -> None:
        torch.use_deterministic_algorithms(config.train.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
        super().__init__(config, schedule, build_model(config, layout, target), predict)
        self.output = output
        self.target = target
        self.loader = loader
        self.checkpointer = checkpointer
        self.spikes = SpikeDetector(config.metrics.spike_window, config.metrics.spike_deviations)

    def run(self) -> bool:
        """Train to the schedule's end; False when a signal stopped it before."""
        total_steps, first_step = self.schedule.total_steps, self.counters.step
        if self.speaks:
            self._write_run_files()
        with (
            Report(self.output, self.config.metrics, first_step, total_steps, speaks=self.speaks) as report,
            self.loader.prefetch(first_step) as prefetcher,
            stop_signals() as received,
            Watchdog(
                self.output / HANGS, self.config.train.hang_seconds, self.model.layout, self.model.rank, self.target
            ) as watchdog,
        ):
            report.header(self._describe())
            self.meter.restart()
            stopping = False
            while self.counters.step < total_steps and not stopping:
                position = self.schedule.at(self.counters.step)
                with watchdog.step(position.step):
                    batches = list(prefetcher.batches(position.step))
                    self.meter.lap("data")
                    result = self.step(position, batches)
                    self.meter.lap("optimizer")
                measurements = self._measurements(position, result)
                if self.model.layout.world_size > 1:
                    measurements |= spread(watchdog.busy_seconds, self.target)
                if self.model.layout.cp > 1:
                    measurements["context_imbalance"] = self.model.context_imbalance
                report.write("step", self.counters.step, **measurements)
                if result.statistics:
                    report.write("statistics", self.counters.step, **result.statistics)
                stopping = self.model.any_rank(bool(received))
                self._after_step(position, report, last=self.counters.step == total_steps, stopping=stopping)
            self.checkpointer.wait()
            if stopping:
                report.line(self._farewell(received))
        return self.counters.step == total_steps

    def _after_step(self, position: Position, report: Report, *, last: bool, stopping: bool) -> None:
        """What is not done at every step: validation and saving."""
        interval = self.config.train.validation_interval
        if self._reached(interval) or (last and interval):
            report.write("validation", self.counters.step, losses=self.validate(position))
        if self._reached(self.config.checkpoint.interval) or last or stopping:
            self.save()
        self.checkpointer.check()
        self._stop_if_stuck()

    def validate(self, position: Position) -> dict[str, float]:
        """Mean loss per token of each domain's held-out sequences, at the sequence length of `position`."""
        losses, count = {}, self.config.train.validation_sequences
        for domain in self.loader.validation_domains:
            batches = list(self.loader.validation(domain, position.sequence_length, count))
            losses[domain] = self.model.evaluate(batches) / max(self.model.count_labels(batches), 1)
        return losses

    def save(self) -> None:
        """Checkpoint the state after the step that was just taken."""
        metadata = {
            "counters": asdict(self.counters),
            "spikes": self.spikes.state_dict(),
            "config": configuration.to_tree(self.config),
            "rope_base": self.model.rope_base,
        }
        self.checkpointer.save(self.counters.step, self._state(), metadata)

    def restore(self) -> None:
        """Load the newest complete checkpoint; leaves everything as it is when there is none."""
        if self.checkpointer.latest() is None:
            return
        state = self._state()
        metadata = self.checkpointer.load(state, optional=("optimizer", "rng"))  # an imported model has neither
        torch.set_rng_state(state["rng"]["cpu"])
        self.counters = Counters(**metadata["counters"])
        if "spikes" in metadata:
            self.spikes.load_state_dict(metadata["spikes"])

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.parameters,
            "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state()},
        }

    @property
    def speaks(self) -> bool:
        """Whether this rank writes events and talks to the console."""
        return self.model.rank == 0

    def _measurements(self, position: Position, result: StepResult) -> dict[str, Any]:
        spike = self.spikes.update(result.loss, skipped=not result.finite)
        return {
            "phase": position.phase.name,
            "tokens": position.tokens + position.step_tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": self.schedule.learning_rate(position),
            "batch_size": position.batch_size,
            "skipped": not result.finite,
            "skipped_steps": self.counters.skipped_steps,
            "spike": spike,
            "spikes": self.spikes.count,
            **self.meter.measure(position),
        }

    def _reached(self, interval: int) -> bool:
        return interval > 0 and self.counters.step % interval == 0

    def _stop_if_stuck(self) -> None:
        limit = self.config.train.max_skipped_steps
        if self.counters.skipped_in_a_row >= limit:
            raise TrainingError(
                f"loss or gradient was not finite for {limit} steps in a row, up to step {self.counters.step}; "
                "resume from an earlier checkpoint with a lower learning rate, or raise train.max_skipped_steps"
            )

    def _describe(self) -> list[str]:
        return [
            f"Pangu {__version__}: {num_parameters(self.config.model):,} parameters on {self.target}, "
            f"{self.config.train.dtype}, {self.schedule.total_steps} steps, from step {self.counters.step}",
            self.meter.describe(),
            *(self.model.layout.describe() if self.model.layout.world_size > 1 else ()),
        ]

    def _farewell(self, received: Sequence[int]) -> str:
        cause = signal.Signals(received[0]).name if received else "another rank's signal"
        return f"stopped by {cause} after step {self.counters.step}; the checkpoint is written, go on with --resume"

    def _write_run_files(self) -> None:
        write_atomically(self.output / CONFIG, configuration.show(self.config))
        if self.config.data.tokenizer:
            write_atomically(self.output / TOKENIZER, Path(self.config.data.tokenizer).read_bytes())
