"""The training loop, from the first batch to the last checkpoint."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pangu import __version__, device
from pangu import config as configuration
from pangu.config import Config
from pangu.data.batch import Batch
from pangu.data.loader import Loader
from pangu.data.schedule import Position, Schedule
from pangu.device import environment
from pangu.errors import ConfigError, TrainingError
from pangu.files import write_atomically
from pangu.model import Transformer, init_weights
from pangu.model.count import flops_per_token, num_parameters
from pangu.train.checkpoint import Checkpointer
from pangu.train.console import Console
from pangu.train.events import Event, EventLog, tensorboard
from pangu.train.optimizer import AdamW, clip_scale, gradient_norm
from pangu.train.run import CHECKPOINTS, CONFIG, TOKENIZER
from pangu.train.spikes import SpikeDetector
from pangu.train.statistics import LayerStatistics

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(config: Config, output: Path, *, resume: bool = False) -> bool:
    """Train `config` into the folder `output`; with `resume`, go on from its newest complete checkpoint if it has one.

    SIGINT and SIGTERM end the run after the step in progress, with a checkpoint. Returns whether the schedule's end was
    reached. Raises `ConfigError`, `DataError` and `DeviceError` before anything is allocated or written, later
    `CheckpointError` and `TrainingError`.
    """
    if not resume and any((output / CHECKPOINTS).glob("step_*")):
        raise ConfigError(f"{output} already holds a run; add --resume to go on with it, or choose another --output")
    if device.resolve(config.train.device) == "npu":
        environment.apply(config)
    target = device.select(config.train.device)
    schedule = Schedule(config)
    loader = Loader(config, schedule)
    with Checkpointer(output / CHECKPOINTS, config.checkpoint) as checkpointer:
        trainer = Trainer(config, output, target, schedule, loader, checkpointer)
        if resume:
            trainer.restore()
        return trainer.run()


def build_model(config: Config, target: torch.device) -> Transformer:
    """The model of `config` on `target`, initialized from train.seed."""
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=target)
    init_weights(model, config.train.seed)
    model.compute_dtype = _DTYPES[config.train.dtype]
    return model


@dataclass
class Counters:
    """What a run has counted so far; part of every checkpoint."""

    step: int = 0
    updates: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class Clock:
    """Wall-clock seconds of the last step, from the end of the one before, and of the mean step."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds = 0.0
        self.steps = 0

    def tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.last = now - self.last, now
        self.steps += 1

    @property
    def mean_seconds(self) -> float:
        return (self.last - self.started) / self.steps


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    statistics: dict[str, Any] | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Trainer:
    """Owns model, optimizer and counters; `run` takes steps until the schedule ends or a signal arrives."""

    def __init__(
        self,
        config: Config,
        output: Path,
        target: torch.device,
        schedule: Schedule,
        loader: Loader,
        checkpointer: Checkpointer,
    ) -> None:
        self.config = config
        self.output = output
        self.target = target
        self.schedule = schedule
        self.loader = loader
        self.checkpointer = checkpointer
        self.counters = Counters()
        self.spikes = SpikeDetector(config.metrics.spike_window, config.metrics.spike_deviations)
        torch.use_deterministic_algorithms(config.train.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
        self.model = build_model(config, target)
        self.optimizer = AdamW(self.model.named_parameters(), config.optimizer)
        self.statistics = LayerStatistics(self.model)
        self.peak_flops, self.peak_source = (
            (config.metrics.peak_flops, "metrics.peak_flops")
            if config.metrics.peak_flops
            else device.peak_flops(target)
        )

    def run(self) -> bool:
        """Train to the schedule's end; False when a signal stopped it before."""
        self._write_run_files()
        total_steps, first_step = self.schedule.total_steps, self.counters.step
        console = Console(total_steps, self.config.metrics.console_interval)
        console.header(self._describe())
        subscribers: list[Callable[[Event], None]] = [console]
        if self.config.metrics.tensorboard:
            subscribers.append(tensorboard(self.output / "tensorboard", first_step))
        with (
            closing(EventLog(self.output, first_step, subscribers)) as log,
            self.loader.prefetch(first_step) as prefetcher,
            _stop_signals() as received,
        ):
            clock = Clock()
            interval = self.config.train.validation_interval
            for step in range(first_step, total_steps):
                position = self.schedule.at(step)
                result = self.step(position, list(prefetcher.batches(step)))
                clock.tick()
                log.write("step", self.counters.step, **self._measurements(position, result, clock))
                if result.statistics:
                    log.write("statistics", self.counters.step, **result.statistics)
                last = self.counters.step == total_steps
                if self._reached(interval) or (last and interval):
                    log.write("validation", self.counters.step, losses=self.validate(position))
                if self._reached(self.config.checkpoint.interval) or last or received:
                    self.save()
                self.checkpointer.check()
                self._stop_if_stuck()
                if received:
                    break
            self.checkpointer.wait()
        if received:
            console.line(self._farewell(received[0]))
        return self.counters.step == total_steps

    def step(self, position: Position, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over `batches`, skipped when the loss or the gradient is not finite.

        The loss is the mean over all labelled tokens of the step, whatever the micro-batches they came in.
        """
        self.model.rope_base = position.phase.rope_base or self.config.model.rope_base
        interval = self.config.metrics.statistics_interval
        with self.statistics.record((position.step + 1) % interval == 0 if interval else False) as statistics:
            loss = self._accumulate_gradients(batches)
        norm = gradient_norm(self.model.parameters())
        result = StepResult(loss.item(), norm.item(), statistics.result())
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

    def _accumulate_gradients(self, batches: Sequence[Batch]) -> Tensor:
        num_labels = max(sum(batch.num_labels() for batch in batches), 1)
        loss = torch.zeros((), device=self.target)
        for batch in batches:
            batch = batch.to(self.target, non_blocking=True)
            loss_sum, _ = self.model.loss(
                batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens, batch.loss_weights
            )
            micro_batch_loss = loss_sum / num_labels
            micro_batch_loss.backward()
            loss += micro_batch_loss.detach()
        return loss

    @torch.no_grad()
    def validate(self, position: Position) -> dict[str, float]:
        """Mean loss per token of each domain's held-out sequences, at the sequence length of `position`."""
        losses = {}
        for domain in self.loader.validation_domains:
            total, num_labels = 0.0, 0
            for batch in self.loader.validation(
                domain, position.sequence_length, self.config.train.validation_sequences
            ):
                num_labels += batch.num_labels()
                batch = batch.to(self.target, non_blocking=True)
                total += self.model.loss(batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens)[0].item()
            losses[domain] = total / max(num_labels, 1)
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
            "model": dict(self.model.named_parameters()),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state()},
        }

    def _measurements(self, position: Position, result: StepResult, clock: Clock) -> dict[str, Any]:
        spike = self.spikes.update(result.loss, skipped=not result.finite)
        tokens_per_second = position.step_tokens / clock.seconds
        flops = flops_per_token(self.config.model, position.sequence_length)
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
            "seconds": clock.seconds,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * flops / self.peak_flops,
            "memory_bytes": device.memory_bytes(self.target),
            "seconds_left": clock.mean_seconds * (self.schedule.total_steps - self.counters.step),
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
            f"MFU = tokens/s x model FLOPs per token (6 per matmul weight, causal attention) / {self.peak_flops:.3g} "
            f"FLOP/s ({self.peak_source})",
        ]

    def _farewell(self, signal_number: int) -> str:
        name = signal.Signals(signal_number).name
        return f"stopped by {name} after step {self.counters.step}; the checkpoint is written, go on with --resume"

    def _write_run_files(self) -> None:
        write_atomically(self.output / CONFIG, configuration.show(self.config))
        if self.config.data.tokenizer:
            write_atomically(self.output / TOKENIZER, Path(self.config.data.tokenizer).read_bytes())


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
