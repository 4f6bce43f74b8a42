"""Training a few steps in any layout, and how far the result is from one device's."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pangu import config as configuration
from pangu.config import Config
from pangu.data.loader import Loader
from pangu.data.schedule import Schedule
from pangu.parallel.layout import make_layout
from pangu.parallel.model import build_model
from pangu.train.optimizer import AdamW, clip_scale

STEPS = 5

BASE = (
    *("--model.num_layers", "5", "--model.num_attention_heads", "8", "--model.num_key_value_heads", "4"),
    *("--phases.0.sequence_length", "64", "--phases.0.batch_size", "8", "--train.micro_batch_size", "1"),
    # With a small eps Adam's first steps are gradients' signs, which rounding decides where a gradient is tiny.
    *("--optimizer.eps", "1e-3", "--train.validation_interval", "0"),
)


@dataclass
class Result:
    """Of the parameters that a rank holds whole once it has gathered them; the numbers are the same on every rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After the last step."""


def load(*overrides: str) -> Config:
    return configuration.load("debug", (*BASE, *overrides))


def train_steps(config: Config, device: str = "cpu") -> Result:
    """Train `STEPS` steps on the ranks of the default process group, or on one device without it."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layout, schedule = make_layout(config, size), Schedule(config)
    model = build_model(config, layout, torch.device(device) if device == "cpu" else torch.device(device, rank))
    loader = Loader(config, schedule, layout.dp_rank(rank), layout.dp)
    optimizer = AdamW(model.parameters.items(), config.optimizer)
    result = Result()
    for step in range(STEPS):
        position, batches = schedule.at(step), list(loader.batches(step))
        part = model.forward_backward(batches, model.count_labels(batches))
        loss, norm = model.loss_and_gradient_norm(part)
        result.losses.append(loss.item())
        result.norms.append(norm.item())
        if step == 0:
            gradients = {name: weight.grad for name, weight in model.parameters.items() if weight.grad is not None}
            result.gradients = {name: whole(gradient) for name, gradient in gradients.items()}
        optimizer.step(step + 1, schedule.learning_rate(position), clip_scale(norm, config.optimizer.clip_norm))
        optimizer.zero_grad()
    batches = list(loader.batches(STEPS))
    result.validation = model.evaluate(batches) / model.count_labels(batches)
    result.weights = {name: whole(weight.detach()) for name, weight in model.parameters.items()}
    return result


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def merge(results: list[Result]) -> Result:
    """The result of a run from those of its ranks, which hold different pipeline stages."""
    merged = results[0]
    for result in results[1:]:
        assert result.losses == merged.losses
        assert result.norms == merged.norms
        assert result.validation == merged.validation
        merged.gradients |= result.gradients
        merged.weights |= result.weights
    return merged


@dataclass(frozen=True)
class Errors:
    """Largest relative errors: of numbers, and of tensors by their 2-norm."""

    loss: float
    norm: float
    gradient: float
    weight: float

    def row(self) -> tuple[float, ...]:
        """The cells of the table that the tests print."""
        return self.loss, self.norm, self.gradient, self.weight

    @property
    def worst(self) -> float:
        return max(self.row())


def errors(result: Result, expected: Result) -> Errors:
    """Of a run against the same on one device, which must have the same parameters."""
    assert result.weights.keys() == expected.weights.keys()
    assert result.gradients.keys() == expected.gradients.keys()
    losses = [*result.losses, result.validation], [*expected.losses, expected.validation]
    return Errors(
        max(abs(a - b) / b for a, b in zip(*losses, strict=True)),
        max(abs(a - b) / b for a, b in zip(result.norms, expected.norms, strict=True)),
        max(_relative(result.gradients[name], gradient) for name, gradient in expected.gradients.items()),
        max(_relative(result.weights[name], weight) for name, weight in expected.weights.items()),
    )


def _relative(tensor: Tensor, expected: Tensor) -> float:
    return ((tensor - expected).norm() / expected.norm()).item()
