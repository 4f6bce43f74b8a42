"""AdamW over named parameters, and gradient clipping."""

from collections.abc import Iterable

import torch
from pangu_kernels import adamw
from torch import Tensor, nn

from pangu.config import OptimizerConfig
from pangu.model.local import local


class AdamW:
    """Decoupled-decay Adam (Loshchilov and Hutter) whose state is kept by parameter name, as checkpoints need it.

    Matrices decay; biases never do; norm gains do when `config.decay_norm_gains`. Parameters and moments are fp32. Of a
    distributed parameter this process updates its shard, with moments that are sharded alike.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = dict(named_parameters)
        self._decay_of_names = self._groups()
        self.exp_avg = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}

    def step(self, update: int, learning_rate: float, gradient_scale: Tensor | None = None) -> None:
        """Make the `update`-th update, counted from 1, from every `.grad` times `gradient_scale` (0-dimensional)."""
        beta1, beta2 = self.config.betas
        for names, weight_decay in self._decay_of_names:
            adamw(
                [local(self.parameters[name]) for name in names],
                [_gradient(name, self.parameters[name]) for name in names],
                [local(self.exp_avg[name]) for name in names],
                [local(self.exp_avg_sq[name]) for name in names],
                step=update,
                lr=learning_rate,
                beta1=beta1,
                beta2=beta2,
                eps=self.config.eps,
                weight_decay=weight_decay,
                grad_scale=1.0 if gradient_scale is None else gradient_scale,
            )

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The moments by parameter name, not copied."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def _groups(self) -> tuple[tuple[list[str], float], tuple[list[str], float]]:
        decayed = [name for name in self.parameters if self._decays(name)]
        kept = [name for name in self.parameters if not self._decays(name)]
        return (decayed, self.config.weight_decay), (kept, 0.0)

    def _decays(self, name: str) -> bool:
        if name.rsplit(".", 1)[-1].startswith("bias"):
            return False
        return self.config.decay_norm_gains or not name.endswith("norm.weight")


def clip_scale(norm: Tensor, clip_norm: float) -> Tensor | None:
    """What to multiply gradients by so that their norm does not pass `clip_norm`; None when clipping is off."""
    return torch.clamp(clip_norm / (norm + 1e-6), max=1.0) if clip_norm else None


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"{name} has no gradient; it takes no part in the forward pass")
    return local(parameter.grad)
