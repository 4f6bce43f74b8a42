"""A few steps of a small model on a device and on the CPU: do they learn the same?"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pangu import config as configuration
from pangu.config import Config, TrainConfig
from pangu.train.events import read_events
from pangu.train.trainer import train

STEPS = 20
_EXACT, _APPROXIMATE = 1e-4, 2e-2


@dataclass(frozen=True)
class Training:
    """Losses step by step; difference is the largest, as a share of the CPU's."""

    losses: tuple[float, ...]
    cpu_losses: tuple[float, ...]
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance and self.losses[-1] < self.losses[0]


def compare(config: Config, device: str, *, exact: bool) -> Training:
    """Train a small model of the kind of `config` on `device` and on the CPU, in fp32."""
    small = small_config(config)
    losses, cpu_losses = _losses(small, device), _losses(small, "cpu")
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, cpu_losses, strict=True))
    return Training(losses, cpu_losses, difference, _EXACT if exact else _APPROXIMATE)


def small_config(config: Config) -> Config:
    """`debug` with what distinguishes the model of `config` from others of its size."""
    debug = configuration.load(
        "debug", ["--train.steps", str(STEPS), "--checkpoint.interval", "0", "--metrics.tensorboard", "false"]
    )
    kept = ("norm_placement", "initialization", "tie_embeddings", "attention_bias", "feed_forward_bias", "local_filter")
    model = dataclasses.replace(debug.model, **{name: getattr(config.model, name) for name in kept[:-1]})
    if config.model.local_filter != "none":
        heads = debug.model.num_attention_heads
        model = dataclasses.replace(model, local_filter=config.model.local_filter, num_key_value_heads=heads)
    return dataclasses.replace(debug, model=model)


def _losses(config: Config, device: str) -> tuple[float, ...]:
    chosen = TrainConfig(**{**dataclasses.asdict(config.train), "device": device})
    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(config, train=chosen), Path(folder))
        return tuple(event["loss"] for event in read_events(Path(folder)) if event["kind"] == "step")
