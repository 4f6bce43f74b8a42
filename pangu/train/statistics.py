"""Layer statistics that the Pangu Ultra report plots over depth (figures 9 and 10): activations and norm gains."""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SUB_LAYERS = ("attention", "feed_forward")
NORMS = ("attention_norm", "post_attention_norm", "feed_forward_norm", "post_feed_forward_norm")


class LayerStatistics:
    """Watches the sub-layers of `model.layers` while `record` is open, and costs nothing at other times.

    Numbers stay on the device until `result`, so that recording does not wait for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, nn.Module] = dict(model.get_submodule("layers").named_children())
        self._outputs: list[tuple[str, str, int]] = []  # sub-layer, layer, elements
        self._moments: list[Tensor] = []  # [3] each: mean, variance, largest absolute value

    @contextmanager
    def record(self, active: bool = True) -> Iterator["LayerStatistics"]:
        """Start afresh and take in every forward pass inside the `with` block; nothing unless `active`."""
        self._outputs, self._moments = [], []
        with ExitStack() as hooks:
            for index, layer in self._layers.items() if active else ():
                for name in SUB_LAYERS:
                    hook = partial(self._add, name, index)
                    hooks.callback(layer.get_submodule(name).register_forward_hook(hook).remove)
            yield self

    @torch.no_grad()
    def result(self) -> dict[str, Any] | None:
        """What `record` saw, None if nothing. Lists have one entry per layer, in the order of `layers`:

        layers                                  their numbers
        activations.{sub-layer}.{mean,std,max}  over all elements and micro-batches; max is of absolute values
        gains.{norm}.{mean,std}                 of the norms that the model has
        """
        if not self._moments:
            return None
        outputs: defaultdict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for (name, index, elements), moments in zip(self._outputs, torch.stack(self._moments).tolist(), strict=True):
            outputs[name, index].append([elements, *moments])
        activations = {name: [_merge(outputs[name, index]) for index in self._layers] for name in SUB_LAYERS}
        gains = {name: gains for name in NORMS if (gains := self._gains(name))}
        return {
            "layers": [int(index) for index in self._layers],
            "activations": {name: _columns(rows, ("mean", "std", "max")) for name, rows in activations.items()},
            "gains": {name: _columns(rows, ("mean", "std")) for name, rows in gains.items()},
        }

    @torch.no_grad()
    def _add(self, name: str, index: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        variance, mean = torch.var_mean(output.float(), correction=0)
        self._outputs.append((name, index, output.numel()))
        self._moments.append(torch.stack((mean, variance, output.abs().amax().float())))

    def _gains(self, name: str) -> list[list[float]]:
        norms = [getattr(layer, name, None) for layer in self._layers.values()]
        moments = [torch.std_mean(norm.weight.float(), correction=0) for norm in norms if norm is not None]
        return torch.stack([torch.stack((mean, std)) for std, mean in moments]).tolist() if moments else []


def _merge(micro_batches: list[list[float]]) -> list[float]:
    """Mean, deviation and maximum over micro-batches given as elements, mean, variance, maximum."""
    total = sum(elements for elements, *_ in micro_batches)
    mean = sum(elements * part for elements, part, _, _ in micro_batches) / total
    squares = sum(elements * (variance + (part - mean) ** 2) for elements, part, variance, _ in micro_batches)
    return [mean, math.sqrt(squares / total), max(largest for *_, largest in micro_batches)]


def _columns(rows: list[list[float]], names: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
